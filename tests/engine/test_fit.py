"""The loop: what a run computes does not depend on interruptions, workers, parts, processes or the rest of the fleet."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import Ranks
from torch import Tensor

from seed_exp.config.schema import OptimizerConfig, ScheduleName
from seed_exp.engine import checkpoint
from seed_exp.engine.fit import Method, derive_seed

METHODS: dict[str, Callable[[], Method]] = {
    "seed": lambda: tiny.seed(["a", "b"], dropout=0.3),
    "moco": lambda: tiny.moco(["a", "b"], dropout=0.3),
    "linear": tiny.probe,
}


class KilledError(Exception):
    pass


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_runs(one: Path, two: Path) -> None:
    tiny.assert_same(tiny.last_checkpoint(one), tiny.last_checkpoint(two))
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("step", [0, 1, 5, 8, 11])
def test_a_run_interrupted_by_its_data_goes_on_bit_for_bit(name: str, step: int, tmp_path: Path) -> None:
    build = METHODS[name]
    straight, broken = build(), build()
    tiny.train(straight, tmp_path / "straight")
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(broken, tmp_path / "broken", source=tiny.Images(fail_after=8 * step + 3))
    resumed = build()
    tiny.train(resumed, tmp_path / "broken")
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")
    tiny.assert_same(tiny.weights(straight), tiny.weights(resumed))
    tiny.assert_same(straight.carried.state_dict(), resumed.carried.state_dict())


@pytest.mark.parametrize("step", [2, 4, 10, 12])
def test_a_run_interrupted_before_a_checkpoint_is_written_goes_on_bit_for_bit(step: int, tmp_path: Path) -> None:
    def kill(steps_done: int) -> None:
        if steps_done == step:
            raise KilledError

    tiny.train(METHODS["seed"](), tmp_path / "straight")
    with pytest.raises(KilledError):
        tiny.train(METHODS["seed"](), tmp_path / "broken", on_checkpoint=kill)
    tiny.train(METHODS["seed"](), tmp_path / "broken")
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


def test_a_run_interrupted_while_a_checkpoint_is_written_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.train(METHODS["moco"](), tmp_path / "straight")

    def half(state: dict[str, Any], file: Any) -> None:
        if state["step"] == 6:
            file.write(b"half of it")
            raise KilledError
        torch.save(state, file)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.torch, "save", _saving(half))
        with pytest.raises(KilledError):
            tiny.train(METHODS["moco"](), tmp_path / "broken")
    assert [path.name for path in sorted((tmp_path / "broken" / "checkpoints").iterdir())] == [
        "step_00000002.pt",
        "step_00000004.pt",
    ]
    tiny.train(METHODS["moco"](), tmp_path / "broken")
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


def _saving(half: Callable[[dict[str, Any], Any], None]) -> Callable[[dict[str, Any], Any], None]:
    save = torch.save

    def patched(state: dict[str, Any], file: Any) -> None:
        torch.save = save  # `half` itself saves
        try:
            half(state, file)
        finally:
            torch.save = patched

    return patched


def test_a_run_interrupted_by_its_evaluation_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def broken_evaluation() -> dict[str, float]:
        raise KilledError

    tiny.train(METHODS["seed"](), tmp_path / "straight")
    with pytest.raises(KilledError):
        tiny.train(METHODS["seed"](), tmp_path / "broken", evaluate=broken_evaluation)
    tiny.train(METHODS["seed"](), tmp_path / "broken")
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(tmp_path: Path, logged: list[str]) -> None:
    tiny.train(METHODS["seed"](), tmp_path / "straight")
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(METHODS["seed"](), tmp_path / "broken", source=tiny.Images(fail_after=8 * 9))
    newest = tmp_path / "broken" / "checkpoints" / "step_00000008.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    tiny.train(METHODS["seed"](), tmp_path / "broken")
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")
    assert "INFO resuming after step 6 of 12" in logged


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    tiny.train(METHODS["seed"](), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = METHODS["seed"]()
    tiny.train(again, tmp_path, source=tiny.Images(fail_after=0))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    tiny.assert_same(tiny.weights(again), tiny.last_checkpoint(tmp_path)["networks"])


def command(folder: Path, name: str, *options: str) -> list[str]:
    small = ["student=convnet_w2", "views=digits", "data=digits", "data.num_workers=1", "device=cpu", "batch_size=32"]
    often = ["log_every=3", "checkpoint_every=2", f"run_dir={folder}"]
    return [sys.executable, "-m", f"seed_exp.{name}", *small, *often, *options]


@pytest.mark.slow
def test_a_killed_process_goes_on_by_the_same_command_bit_for_bit(tmp_path: Path) -> None:
    pretrain = command(tmp_path / "teacher", "pretrain", "views.crops.global.num=2", "moco.queue_size=64", "steps=4")
    subprocess.run(pretrain, check=True, capture_output=True)

    def distill(folder: Path) -> list[str]:
        teacher = ["teacher=run", f"teacher.checkpoint={tmp_path / 'teacher'}"]
        return command(folder, "distill", *teacher, "objective.queue_size=100", "steps=200")

    broken, straight = tmp_path / "broken", tmp_path / "straight"
    for checkpoint_to_die_after in (2, 60):
        process = subprocess.Popen(distill(broken), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None and newest_step(broken) < checkpoint_to_die_after:
                time.sleep(0.01)
            assert process.poll() is None, "it ended before it could be killed"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert newest_step(broken) < 200
    subprocess.run(distill(broken), check=True, capture_output=True)
    assert "resuming after step" in (broken / "log.txt").read_text()
    subprocess.run(distill(straight), check=True, capture_output=True)
    assert_same_runs(straight, broken)
    student = "students/convnet_w2.safetensors"
    assert (straight / student).read_bytes() == (broken / student).read_bytes()


def newest_step(folder: Path) -> int:
    return max((int(path.stem.removeprefix("step_")) for path in folder.glob("checkpoints/step_*.pt")), default=0)


# --- workers, parts, fleets -------------------------------------------------------------------------------------------


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    for num_workers in (0, 2):
        tiny.train(METHODS["seed"](), tmp_path / str(num_workers), num_workers=num_workers)
    assert_same_runs(tmp_path / "0", tmp_path / "2")


@pytest.mark.parametrize("build", [tiny.seed, tiny.moco])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_the_whole_batch(build: Callable[..., Method], accumulation: int, tmp_path: Path) -> None:
    whole, parts = build(bn=False), build(bn=False)
    tiny.train(whole, tmp_path / "whole")
    tiny.train(parts, tmp_path / "parts", tiny.fit_config(accumulation=accumulation))
    one, two = tiny.flat(tiny.last_checkpoint(tmp_path / "whole")), tiny.flat(tiny.last_checkpoint(tmp_path / "parts"))
    tensors = [key for key in one if isinstance(one[key], Tensor) and not key.startswith("/interval")]
    assert any("queue" in key or "embeddings" in key for key in tensors)
    for key in tensors:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_metrics_of_accumulated_parts_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    tiny.train(tiny.seed(bn=False), tmp_path / "whole")
    tiny.train(tiny.seed(bn=False), tmp_path / "parts", tiny.fit_config(accumulation=2))
    for one, two in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        keys = [key for key in one if key not in ("teacher_entropy", "effective_neighbours")]  # of the last part only
        assert [two[key] for key in keys] == pytest.approx([one[key] for key in keys], abs=1e-5)


@pytest.mark.parametrize("build", [tiny.seed, tiny.moco])
def test_students_of_a_fleet_equal_those_of_single_runs(build: Callable[..., Method], tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    fleet = build(names, dropout=0.5)
    tiny.train(fleet, tmp_path / "fleet")
    logged_by_fleet = lines(tmp_path / "fleet")
    for name in names:
        single = build([name], dropout=0.5)
        tiny.train(single, tmp_path / name)
        tiny.assert_same(tiny.weights(single)[name], tiny.weights(fleet)[name])
        for one, two in zip(lines(tmp_path / name), logged_by_fleet, strict=True):
            assert one == {key: two[key] for key in one}


def test_dropout_differs_between_steps_parts_and_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = tiny.seed(["a", "b"])
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    tiny.train(method, tmp_path, tiny.fit_config(accumulation=2, steps=5))
    assert len(seeds) == len(set(seeds)) == 5 * 2 * 2


def test_derived_seeds_depend_on_every_part_of_the_key() -> None:
    seeds = {derive_seed(0, name, step, part, rank) for name in "ab" for step in (1, 11) for part in (0, 1) for rank in (0, 1)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("a", "bc") != derive_seed("ab", "c")


def test_the_teacher_stays_as_it_was(tmp_path: Path) -> None:
    method = tiny.seed()
    before = copy.deepcopy(method.teacher.state_dict())
    method.train()
    tiny.train(method, tmp_path)
    tiny.assert_same(before, method.teacher.state_dict())
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


# --- the optimiser's step ---------------------------------------------------------------------------------------------


def step_once(method: Method, folder: Path, lrs: dict[str, float] | None = None, **options: Any) -> dict[str, dict[str, Tensor]]:
    """How far each parameter moves in one step of plain gradient descent."""
    before = {name: {key: p.detach().clone() for key, p in net.named_parameters()} for name, net in method.trainable.items()}
    optimizer = tiny.optimizer_config(
        momentum=0.0, weight_decay=0.0, warmup_epochs=0.0, schedule=ScheduleName.constant, lr=0.1, **options
    )
    tiny.train(method, folder, tiny.fit_config(steps=1), optimizer, lrs=lrs)
    return {
        name: {key: p.detach() - before[name][key] for key, p in net.named_parameters()} for name, net in method.trainable.items()
    }


def test_each_network_gets_its_own_learning_rate(tmp_path: Path) -> None:
    common = step_once(tiny.seed(["a", "b", "c"]), tmp_path / "common")
    own = step_once(tiny.seed(["a", "b", "c"]), tmp_path / "own", lrs={"a": 0.3, "b": 1e-20})
    for key in common["a"]:
        torch.testing.assert_close(own["a"][key], 3 * common["a"][key], rtol=1e-3, atol=1e-6)
        assert own["b"][key].abs().max() < 1e-15
        assert torch.equal(own["c"][key], common["c"][key])
    assert any(step.count_nonzero() for step in common["a"].values())


def test_learning_rates_of_classifiers_reach_them(tmp_path: Path) -> None:
    method = tiny.probe((1e-20, 30.0))
    moved = step_once(method, tmp_path, lrs=method.lrs)
    assert moved["a/lr1e-20"]["weight"].abs().max() < 1e-15
    assert moved["a/lr30"]["weight"].norm() > 0.01


def test_the_learning_rate_scales_with_the_batch_and_follows_the_schedule(tmp_path: Path) -> None:
    optimizer = tiny.optimizer_config(lr=3.2, warmup_epochs=0.4)  # of 5 steps each: 2 steps
    tiny.train(tiny.seed(), tmp_path, tiny.fit_config(steps=4, log_every=1, eval_every=0), optimizer)
    metrics = [line for line in lines(tmp_path) if "lr" in line]
    peak = 3.2 * 8 / 256
    assert [line["lr"] for line in metrics] == pytest.approx([0, peak / 2, peak, peak / 2])
    assert [line["epoch"] for line in metrics] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_clipping_is_per_student_and_the_logged_norm_is_that_before_it(tmp_path: Path) -> None:
    free = step_once(tiny.seed(["a", "b"]), tmp_path / "free")
    clipped = step_once(tiny.seed(["a", "b"]), tmp_path / "clipped", clip_grad_norm=0.01)
    before, after = lines(tmp_path / "free")[0], lines(tmp_path / "clipped")[0]
    lr = 0.1 * 8 / 256
    for name in ("a", "b"):
        norm = torch.cat([step.flatten() for step in free[name].values()]).norm().item() / lr
        assert before[f"{name}/grad_norm"] == pytest.approx(norm, rel=1e-2)
        assert after[f"{name}/grad_norm"] == before[f"{name}/grad_norm"]
        assert torch.cat([step.flatten() for step in clipped[name].values()]).norm().item() / lr == pytest.approx(0.01, rel=1e-2)


def test_lars_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    lars = OptimizerConfig("lars", lr=10.0, warmup_epochs=0.4)
    tiny.train(tiny.seed(), tmp_path / "straight", optimizer=lars)
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(tiny.seed(), tmp_path / "broken", optimizer=lars, source=tiny.Images(fail_after=60))
    tiny.train(tiny.seed(), tmp_path / "broken", optimizer=lars)
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_log_lines_are_means_over_the_steps_since_the_line_before(tmp_path: Path) -> None:
    config = tiny.fit_config(steps=7, eval_every=0)
    tiny.train(tiny.seed(), tmp_path / "every", tiny.replaced(config, log_every=1))
    tiny.train(tiny.seed(), tmp_path / "third", config)
    every = {line["step"]: line for line in lines(tmp_path / "every") if "lr" in line}
    third = {line["step"]: line for line in lines(tmp_path / "third") if "lr" in line}
    assert list(third) == [3, 6, 7]
    for step, since in ((3, [1, 2, 3]), (6, [4, 5, 6]), (7, [7])):
        expected = sum(every[number]["a/loss"] for number in since) / len(since)
        assert third[step]["a/loss"] == pytest.approx(expected, abs=1e-5)
        assert third[step]["a/grad_norm"] == pytest.approx(every[step]["a/grad_norm"], abs=1e-5)


def test_evaluation_comes_every_so_many_epochs_and_at_the_end(tmp_path: Path) -> None:
    for eval_every, expected in ((1, [5, 10, 12]), (0.4, [2, 4, 6, 8, 10, 12]), (0, [12])):
        folder = tiny.train(tiny.seed(), tmp_path / str(eval_every), tiny.fit_config(eval_every=eval_every))
        assert [line["step"] for line in lines(folder) if "a/norm" in line] == expected


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    evaluated, not_evaluated = tiny.seed(dropout=0.3), tiny.seed(dropout=0.3)
    tiny.train(evaluated, tmp_path / "evaluated", tiny.fit_config(eval_every=0.2))
    tiny.train(not_evaluated, tmp_path / "not", tiny.fit_config(eval_every=0), evaluate=dict)
    tiny.assert_same(tiny.weights(evaluated), tiny.weights(not_evaluated))


def test_epochs_give_the_length_where_steps_do_not(tmp_path: Path) -> None:
    tiny.train(tiny.seed(), tmp_path, tiny.fit_config(steps=None, epochs=2))
    assert tiny.last_checkpoint(tmp_path)["step"] == 10


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    steps: list[int] = []
    tiny.train(tiny.seed(), tmp_path, tiny.fit_config(checkpoint_every=5), on_checkpoint=steps.append)
    assert steps == [5, 10, 12]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_and_student_and_reaches_no_checkpoint(tmp_path: Path) -> None:
    method = tiny.seed(["good", "bad"])
    with torch.no_grad():
        method.trainable["bad"].head[0].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"step 2: bad/loss is nan.*lower optimizer\.lr") as error:
        tiny.train(method, tmp_path)
    assert "good" not in str(error.value)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_part_that_does_not_divide_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulation=3 does not divide the 8 images"):
        tiny.train(tiny.seed(), tmp_path, tiny.fit_config(accumulation=3))


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exceeds the 40 images"):
        tiny.train(tiny.seed(), tmp_path, tiny.fit_config(batch_size=41))


# --- processes --------------------------------------------------------------------------------------------------------


def train_here(kind: str, folder: str, changes: dict[str, Any], fail_after: int | None = None) -> dict[str, Any] | str:
    """Runs on each rank: trains; returns what the method holds at the end, or the message of the error."""
    method: Method = {
        "seed": lambda: tiny.seed(["a", "b"], bn=False),
        "moco": lambda: tiny.moco(bn=False),
        "seed with bn": tiny.seed,
        "moco with bn": tiny.moco,
    }[kind]()
    source = tiny.Images(fail_after=fail_after)
    try:
        tiny.train(method, Path(folder), tiny.fit_config(**changes), source=source)
    except ValueError as error:
        return str(error)
    return {"networks": tiny.weights(method), "carried": method.carried.state_dict()}


@pytest.mark.parametrize("kind", ["seed", "moco"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one_with_the_same_global_batch(
    kind: str, accumulation: int, two_ranks: Ranks, tmp_path: Path
) -> None:
    one = train_here(kind, str(tmp_path / "one"), {})
    two = two_ranks.run(train_here, kind, str(tmp_path / "two"), {"accumulation": accumulation})
    tiny.assert_same(two[0], two[1])
    one_flat, two_flat = tiny.flat(one), tiny.flat(two[0])
    assert one_flat.keys() == two_flat.keys()
    for key, value in one_flat.items():
        expected = torch.as_tensor(value)
        torch.testing.assert_close(torch.as_tensor(two_flat[key]), expected, rtol=0, atol=1e-6)
    diagnostics = ("teacher_entropy", "effective_neighbours")  # with accumulation, of the last part only
    for single, double in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        keys = [key for key in single if accumulation == 1 or key not in diagnostics]
        assert [double[key] for key in keys] == pytest.approx([single[key] for key in keys], abs=1e-5)


def test_two_processes_resume_bit_for_bit(two_ranks: Ranks, tmp_path: Path) -> None:
    # The newest checkpoint is that of step 8, in the middle of the interval that the line of step 9 is the mean of.
    straight = two_ranks.run(train_here, "seed", str(tmp_path / "straight"), {})
    assert two_ranks.run(train_here, "seed", str(tmp_path / "broken"), {}, 4 * 9) == ["unplugged", "unplugged"]
    resumed = two_ranks.run(train_here, "seed", str(tmp_path / "broken"), {})
    tiny.assert_same(straight, resumed)
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize("kind", ["seed with bn", "moco with bn"])
def test_all_processes_end_with_the_same_network(kind: str, two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(train_here, kind, str(tmp_path), {})
    tiny.assert_same(first["networks"], second["networks"])  # running BN statistics included


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    messages = two_ranks.run(train_here, "seed", str(tmp_path), {"batch_size": 7})
    assert all("batch_size=7 does not divide by the 2 processes" in message for message in messages)
