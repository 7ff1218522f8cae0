"""The loop: what a run computes does not depend on how it runs.

Interruptions, workers, parts, processes and the rest of the fleet change nothing.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny
import torch
from ranks import Ranks
from torch import Tensor

from seed_exp.config.schema import OptimizerConfig, Resume, ScheduleName
from seed_exp.engine import checkpoint, fleet
from seed_exp.engine.fleet import derive_seed
from seed_exp.engine.method import Method

METHODS: dict[str, Callable[[], Method]] = {
    "seed": lambda: tiny.seed(["a", "b"], dropout=0.3),
    "moco": lambda: tiny.moco(["a", "b"], dropout=0.3),
    "linear": tiny.probe,
}


OF_THE_LAST_PART = (
    "teacher_entropy",
    "effective_neighbours",
    "a/embedding_rank",
    "b/embedding_rank",
)
"""Measured on the last part only of a batch that is split."""


class KilledError(Exception):
    pass


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_runs(one: Path, two: Path) -> None:
    tiny.assert_same(tiny.last_checkpoint(one), tiny.last_checkpoint(two))
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "step",
    [0, 5, 8, pytest.param(1, marks=pytest.mark.slow), pytest.param(11, marks=pytest.mark.slow)],
)
def test_a_run_interrupted_by_its_data_goes_on_bit_for_bit(
    name: str, step: int, tmp_path: Path
) -> None:
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
def test_a_run_interrupted_before_a_checkpoint_is_written_goes_on_bit_for_bit(
    step: int, tmp_path: Path
) -> None:
    def kill(trained: Mapping[str, int], *_: object) -> None:
        if trained["a"] == step:
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
        "step_00000004.pt",
        "step_00000005.pt",  # before the evaluation
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
    def broken_evaluation(names: Collection[str]) -> dict[str, float]:
        raise KilledError

    tiny.train(METHODS["seed"](), tmp_path / "straight")
    with pytest.raises(KilledError):
        tiny.train(METHODS["seed"](), tmp_path / "broken", evaluate=broken_evaluation)
    tiny.train(METHODS["seed"](), tmp_path / "broken")
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(
    tmp_path: Path, logged: list[str]
) -> None:
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
    small = [
        "student=convnet_w2",
        "views=digits",
        "data=digits",
        "data.num_workers=1",
        "device=cpu",
        "batch_size=32",
    ]
    often = ["log_every=3", "checkpoint_every=2", "tracker=files", f"run_dir={folder}"]
    return [sys.executable, "-m", f"seed_exp.{name}", *small, *often, *options]


@pytest.mark.slow
def test_a_killed_process_goes_on_by_the_same_command_bit_for_bit(tmp_path: Path) -> None:
    pretrain = command(
        tmp_path / "teacher",
        "pretrain",
        "views.crops.global.num=2",
        "moco.queue_size=64",
        "steps=4",
    )
    forks.run(pretrain, check=True, capture_output=True)

    def distill(folder: Path) -> list[str]:
        teacher = ["teacher=run", f"teacher.checkpoint={tmp_path / 'teacher'}"]
        return command(folder, "distill", *teacher, "objective.queue_size=100", "steps=200")

    broken, straight = tmp_path / "broken", tmp_path / "straight"
    for checkpoint_to_die_after in (2, 60):
        process = forks.Popen(
            distill(broken),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while process.poll() is None and newest_step(broken) < checkpoint_to_die_after:
                time.sleep(0.01)
            assert process.poll() is None, "it ended before it could be killed"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert newest_step(broken) < 200
    forks.run(distill(broken), check=True, capture_output=True)
    assert "resuming after step" in (broken / "log.txt").read_text()
    forks.run(distill(straight), check=True, capture_output=True)
    assert_same_runs(straight, broken)
    student = "students/convnet_w2.safetensors"
    assert (straight / student).read_bytes() == (broken / student).read_bytes()


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_still_writes_a_checkpoint(tmp_path: Path) -> None:
    options = [
        "views.crops.global.num=2",
        "moco.queue_size=64",
        "steps=100000",
        "checkpoint_every=100000",
        "data.num_workers=2",
    ]
    pretrain = command(tmp_path, "pretrain", *options)
    process = forks.Popen(
        pretrain, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and '"step": 3,' not in read_if_there(
            tmp_path / "metrics.jsonl"
        ):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: to the workers too
        assert process.wait(timeout=120) == 75
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert newest_step(tmp_path) >= 3


def read_if_there(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def newest_step(folder: Path) -> int:
    return max(
        (int(path.stem.removeprefix("step_")) for path in folder.glob("checkpoints/step_*.pt")),
        default=0,
    )


# --- stopping where it can go on ------------------------------------------------------------------


class SignallingImages(tiny.Images):
    """Sends this process a signal when the given number of images has been read."""

    def __init__(self, number: int, after: int, times: int = 1) -> None:
        super().__init__()
        self.number, self.after, self.times, self.read = number, after, times, 0

    def image(self, index: int) -> Tensor:
        self.read += 1
        if self.read >= self.after and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)
        return super().image(index)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)],
)
def test_a_signal_writes_a_checkpoint_and_ends_the_run_which_goes_on_bit_for_bit(
    number: signal.Signals, status: int, tmp_path: Path, logged: list[str]
) -> None:
    config = tiny.fit_config(checkpoint_every=100)
    tiny.train(tiny.seed(), tmp_path / "straight", config)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        tiny.train(
            tiny.seed(), tmp_path / "broken", config, source=SignallingImages(number, 8 * 6 + 2)
        )
    assert stopped.value.code == status
    assert signal.getsignal(number) is before
    assert tiny.last_checkpoint(tmp_path / "broken")["step"] == 7
    assert "WARNING stopped after step 7 of 12; the same command goes on from there" in logged
    tiny.train(tiny.seed(), tmp_path / "broken", config)
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run_where_it_is_done(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    written: list[int] = []

    def warn(steps: Mapping[str, int], *_: object) -> None:
        written.append(max(steps.values()))
        if written[-2:] == [12, 12]:  # after the last evaluation
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stopped:
        tiny.train(tiny.seed(), tmp_path, on_checkpoint=warn)
    assert stopped.value.code == status
    assert tiny.last_checkpoint(tmp_path)["step"] == 12
    tiny.train(tiny.seed(), tmp_path)  # nothing is left to do, and nothing stops it


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny.train(
            tiny.seed(), tmp_path, source=SignallingImages(signal.SIGINT, 8 * 4 + 2, times=2)
        )
    assert tiny.last_checkpoint(tmp_path)["step"] == 4


def test_resume_never_and_must_refuse_what_they_rule_out(tmp_path: Path) -> None:
    must, never = (tiny.fit_config(resume=resume) for resume in (Resume.must, Resume.never))
    with pytest.raises(ValueError, match=r"resume=must, but .* holds no checkpoint"):
        tiny.train(tiny.seed(), tmp_path, must)
    tiny.train(tiny.seed(), tmp_path, never)
    with pytest.raises(ValueError, match=r"resume=never, but .* holds step_00000012\.pt"):
        tiny.train(tiny.seed(), tmp_path, never)
    tiny.train(tiny.seed(), tmp_path, must)


def test_checkpoints_of_every_few_epochs_are_kept(tmp_path: Path) -> None:
    tiny.train(
        tiny.seed(),
        tmp_path,
        tiny.fit_config(steps=None, epochs=5, keep_every=2, checkpoint_every=7, eval_every=0),
    )
    kept = [
        int(path.stem.removeprefix("step_"))
        for path in sorted((tmp_path / "checkpoints").iterdir())
    ]
    assert kept == [10, 20, 21, 25]


# --- workers, parts, fleets -----------------------------------------------------------------------


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    for num_workers in (0, 2):
        tiny.train(METHODS["seed"](), tmp_path / str(num_workers), num_workers=num_workers)
    assert_same_runs(tmp_path / "0", tmp_path / "2")


@pytest.mark.parametrize(
    ("build", "accumulation"),
    [
        (tiny.seed, 2),
        (tiny.moco, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((tiny.seed, 4), (tiny.moco, 2))),
    ],
)
def test_accumulation_equals_the_whole_batch(
    build: Callable[..., Method], accumulation: int, tmp_path: Path
) -> None:
    whole, parts = build(bn=False), build(bn=False)
    tiny.train(whole, tmp_path / "whole")
    tiny.train(parts, tmp_path / "parts", tiny.fit_config(accumulation=accumulation))
    one, two = (
        tiny.flat(tiny.last_checkpoint(tmp_path / "whole")),
        tiny.flat(tiny.last_checkpoint(tmp_path / "parts")),
    )
    tensors = [
        key for key in one if isinstance(one[key], Tensor) and not key.startswith("/interval")
    ]
    assert any("queue" in key or "embeddings" in key for key in tensors)
    for key in tensors:
        torch.testing.assert_close(
            two[key], one[key], rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_metrics_of_accumulated_parts_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    tiny.train(tiny.seed(bn=False), tmp_path / "whole")
    tiny.train(tiny.seed(bn=False), tmp_path / "parts", tiny.fit_config(accumulation=2))
    for one, two in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        keys = [
            key for key in one if key not in OF_THE_LAST_PART and not key.endswith("std")
        ]  # not the mean of the parts' std
        assert [two[key] for key in keys] == pytest.approx([one[key] for key in keys], abs=1e-5)


@pytest.mark.parametrize("build", [tiny.seed, tiny.moco])
def test_students_of_a_fleet_equal_those_of_single_runs(
    build: Callable[..., Method], tmp_path: Path
) -> None:
    names = ["a", "b", "c"]
    together = build(names, dropout=0.5)
    tiny.train(together, tmp_path / "fleet")
    logged_by_fleet = lines(tmp_path / "fleet")
    for name in names:
        single = build([name], dropout=0.5)
        tiny.train(single, tmp_path / name)
        tiny.assert_same(tiny.weights(single)[name], tiny.weights(together)[name])
        for one, two in zip(lines(tmp_path / name), logged_by_fleet, strict=True):
            assert one == {key: two[key] for key in one}


def poison(method: Method, name: str) -> None:
    with torch.no_grad():
        next(method.trainable[name].parameters()).fill_(torch.nan)


@pytest.mark.parametrize(
    ("build", "checkpoint_every"),  # found at a checkpoint, found at a log line
    [
        (tiny.seed, 2),
        (tiny.moco, 5),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((tiny.seed, 5), (tiny.moco, 2))),
    ],
)
def test_a_diverged_student_disturbs_no_other(
    build: Callable[..., Method], checkpoint_every: int, tmp_path: Path, logged: list[str]
) -> None:
    config = tiny.fit_config(checkpoint_every=checkpoint_every, max_skipped=1)
    together, single = build(["a", "bad", "c"], dropout=0.5), build(["a"], dropout=0.5)
    poison(together, "bad")
    trained: list[Mapping[str, int]] = []
    evaluated: list[Collection[str]] = []

    def norms(names: Collection[str]) -> dict[str, float]:
        evaluated.append(names)
        return {}

    tiny.train(
        together,
        tmp_path / "fleet",
        config,
        evaluate=norms,
        on_checkpoint=lambda steps, *_: trained.append(steps),
    )
    tiny.train(single, tmp_path / "single", config, evaluate=lambda _: {})
    tiny.assert_same(tiny.weights(single)["a"], tiny.weights(together)["a"])
    found = {line["step"]: line for line in lines(tmp_path / "fleet")}
    for line in lines(tmp_path / "single"):
        assert line == {key: found[line["step"]][key] for key in line}
    assert not any(key.startswith("bad/") for line in found.values() for key in line)
    assert {name for names in [*trained, *evaluated] for name in names} == {"a", "c"}
    error = next(line for line in logged if line.startswith("ERROR"))
    assert re.search(
        r"step [23]: [23] steps of bad had gradients that are not finite \(learning rate bad 0\.0",
        error,
    )
    assert re.search(
        r"first step 1 with images \d+, .*; last good checkpoint: (none|/.*step_0+2\.pt)\)", error
    )
    assert "Training of bad ends here, 2 others go on" in error


def hiccuping(names: list[str], bad: str, steps: set[int], at: str) -> Method:
    """SEED whose student `bad` has an infinite loss or features in some of its steps (from 0)."""
    method = tiny.seed(names)
    network, count = method.trainable[bad], itertools.count()

    def features(module: Any, args: Any, output: Tensor) -> Tensor:
        return (
            output * torch.inf if next(count) // 2 in steps else output
        )  # two resolutions in each step

    def loss(name: str, network: Any, prepared: Any) -> dict[str, Tensor]:
        out = type(method).loss(method, name, network, prepared)
        return (
            {**out, "loss": out["loss"] * torch.nan}
            if name == bad and next(count) in steps
            else out
        )

    if at == "features":
        network.encoder.layers[0].register_forward_hook(
            features
        )  # before batch norm, whose statistics become NaN
    else:
        method.loss = loss
    return method


@pytest.mark.parametrize("at", ["features", "loss"])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(
    at: str, tmp_path: Path, logged: list[str]
) -> None:
    config = tiny.fit_config(steps=5, log_every=1, eval_every=0, checkpoint_every=1, keep_every=1)
    method = hiccuping(["a", "bad"], "bad", {3}, at)
    seen: list[dict[str, Any]] = []
    tiny.train(
        method,
        tmp_path / "fleet",
        config,
        on_checkpoint=lambda _, networks, __: seen.append(copy.deepcopy(networks["bad"])),
    )
    tiny.assert_same(seen[2], seen[3])  # weights and statistics are as after step 3
    assert any(not torch.equal(seen[3][key], seen[4][key]) for key in seen[3])
    assert all(value.isfinite().all() for value in seen[-1].values())
    single = tiny.seed(["a"])
    tiny.train(single, tmp_path / "single", config)
    tiny.assert_same(tiny.weights(single)["a"], tiny.weights(method)["a"])
    skipped = [line for line in lines(tmp_path / "fleet") if "bad/skipped_steps" in line]
    assert [(line["step"], line["bad/skipped_steps"]) for line in skipped] == [(4, 1)]
    assert not any(key in skipped[0] for key in ("bad/loss", "bad/grad_norm"))
    assert all(
        "bad/loss" in line
        for line in lines(tmp_path / "fleet")
        if line["step"] in (3, 5) and "lr" in line
    )
    assert any(
        line.startswith("WARNING bad: 1 steps skipped") and "first step 4 with images" in line
        for line in logged
    )


def test_a_collapsed_student_is_named_loudly_once_the_warm_up_is_over(
    tmp_path: Path, logged: list[str]
) -> None:
    method = tiny.seed(["a", "flat"])
    with torch.no_grad():
        method.trainable["flat"].head[2].weight.zero_()
    tiny.train(method, tmp_path, lrs={"flat": 1e-20})
    loud = [line for line in logged if "flat HAS COLLAPSED" in line]
    assert len(loud) == 1
    assert loud[0].startswith(
        "WARNING flat HAS COLLAPSED: it sees all images alike (embedding std "
    )
    first, *_ = (line for line in lines(tmp_path) if "lr" in line)
    assert first["flat/embedding_std"] < 1e-6
    assert first["flat/embedding_rank"] == pytest.approx(1, abs=1e-3)
    assert first["a/embedding_std"] > 0.05


def test_skipped_steps_are_counted_over_log_lines_and_resumes(tmp_path: Path) -> None:
    def train(folder: Path, fail_after: int | None = None) -> None:
        method = hiccuping(["a", "bad"], "bad", set(range(12)), "loss")
        tiny.train(
            method,
            folder,
            tiny.fit_config(max_skipped=6),
            source=tiny.Images(fail_after=fail_after),
        )

    train(tmp_path / "straight")
    with pytest.raises(ValueError, match="unplugged"):
        train(tmp_path / "broken", 8 * 5)
    train(tmp_path / "broken")
    assert tiny.last_checkpoint(tmp_path / "straight")["diverged"] == {
        "bad": 8
    }  # found at the checkpoint
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


def test_means_leave_skipped_steps_out(tmp_path: Path) -> None:
    config = tiny.fit_config(steps=3, eval_every=0)
    tiny.train(hiccuping(["bad"], "bad", {1}, "loss"), tmp_path / "third", config)
    tiny.train(
        hiccuping(["bad"], "bad", {1}, "loss"),
        tmp_path / "every",
        tiny.replaced(config, log_every=1),
    )
    losses = [line["bad/loss"] for line in lines(tmp_path / "every") if "bad/loss" in line]
    assert len(losses) == 2
    assert lines(tmp_path / "third")[0]["bad/loss"] == pytest.approx(sum(losses) / 2)


def test_a_diverged_student_stays_out_after_a_resume(tmp_path: Path) -> None:
    def build() -> Method:
        method = tiny.seed(["a", "bad"])
        poison(method, "bad")
        return method

    config = tiny.fit_config(max_skipped=1)
    tiny.train(build(), tmp_path / "straight", config)
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(build(), tmp_path / "broken", config, source=tiny.Images(fail_after=8 * 9))
    tiny.train(build(), tmp_path / "broken", config)
    assert (tmp_path / "straight" / "metrics.jsonl").read_bytes() == (
        tmp_path / "broken" / "metrics.jsonl"
    ).read_bytes()
    assert tiny.last_checkpoint(tmp_path / "broken")["diverged"] == {"bad": 2}


@pytest.mark.parametrize("build", [tiny.seed, tiny.moco])
def test_a_student_that_ends_earlier_equals_its_own_shorter_run_and_disturbs_no_other(
    build: Callable[..., Method], tmp_path: Path
) -> None:
    config = tiny.fit_config(steps=None, epochs=3)
    together = build(["a", "short"], dropout=0.5)
    trained: list[Mapping[str, int]] = []
    tiny.train(
        together,
        tmp_path / "fleet",
        config,
        epochs={"short": 2},
        on_checkpoint=lambda steps, *_: trained.append(steps),
    )
    for name, epochs in (("a", 3), ("short", 2)):
        single = build([name], dropout=0.5)
        tiny.train(single, tmp_path / name, tiny.replaced(config, epochs=epochs))
        tiny.assert_same(tiny.weights(single)[name], tiny.weights(together)[name])
        found = {(line["step"], "lr" in line): line for line in lines(tmp_path / "fleet")}
        for line in lines(tmp_path / name)[
            :-2
        ]:  # the last lines of the shorter run come at its own end
            mine = {key: value for key, value in line.items() if key.startswith(f"{name}/")}
            assert mine == {key: found[line["step"], "lr" in line][key] for key in mine}
    assert trained[-1] == {"a": 15, "short": 10}


def test_a_fleet_with_students_of_different_lengths_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = tiny.fit_config(steps=None, epochs=3)
    for fail_after in (8 * 7, 8 * 13):
        straight, broken = tmp_path / f"straight{fail_after}", tmp_path / f"broken{fail_after}"
        tiny.train(tiny.seed(["a", "b"]), straight, config, epochs={"b": 2})
        with pytest.raises(ValueError, match="unplugged"):
            tiny.train(
                tiny.seed(["a", "b"]),
                broken,
                config,
                epochs={"b": 2},
                source=tiny.Images(fail_after=fail_after),
            )
        tiny.train(tiny.seed(["a", "b"]), broken, config, epochs={"b": 2})
        assert_same_runs(straight, broken)


@pytest.mark.parametrize("name", METHODS)
def test_batch_size_auto_is_a_run_with_the_size_that_was_found_and_keeps_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.fit_config(steps=None, epochs=2, batch_size="auto", accumulation=2, eval_every=0)
    tried: list[int] = []

    def found(
        step: Callable[[int], None], *, limit: int, multiple_of: int, device: torch.device
    ) -> int:
        assert (limit, multiple_of, device.type) == (40, 2, "cpu")
        for size in (4, 8):
            step(size)
            tried.append(size)
        return tried[-1]

    monkeypatch.setattr(fleet, "largest_batch_size", found)
    tiny.train(METHODS[name](), tmp_path / "given", tiny.replaced(config, batch_size=8))
    tiny.train(METHODS[name](), tmp_path / "found", config)
    assert tried == [4, 8]
    assert_same_runs(tmp_path / "given", tmp_path / "found")
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(
            METHODS[name](), tmp_path / "broken", config, source=tiny.Images(fail_after=8 * 5)
        )
    monkeypatch.setattr(
        fleet, "largest_batch_size", lambda *_, **__: 4
    )  # less memory is left when it goes on
    tiny.train(METHODS[name](), tmp_path / "broken", config)
    assert_same_runs(tmp_path / "found", tmp_path / "broken")


def test_batch_size_auto_measures_memory_and_trains(tmp_path: Path, logged: list[str]) -> None:
    tiny.train(tiny.seed(), tmp_path, tiny.fit_config(steps=None, epochs=1, batch_size="auto"))
    assert (
        "INFO batch_size=32 fits into the memory" in logged
    )  # of 40 images, and memory for thousands
    assert tiny.last_checkpoint(tmp_path)["step"] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_a_compiled_run_equals_an_eager_one_up_to_rounding_and_resumes_bit_for_bit(
    tmp_path: Path,
) -> None:
    config = tiny.fit_config(steps=6, eval_every=0)
    compiled = tiny.replaced(config, compile=True)
    tiny.train(tiny.seed(["a", "b"]), tmp_path / "eager", config)
    tiny.train(tiny.seed(["a", "b"]), tmp_path / "compiled", compiled)
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(
            tiny.seed(["a", "b"]),
            tmp_path / "broken",
            compiled,
            source=tiny.Images(fail_after=8 * 5),
        )
    tiny.train(tiny.seed(["a", "b"]), tmp_path / "broken", compiled)
    assert_same_runs(tmp_path / "compiled", tmp_path / "broken")
    one, two = (tiny.flat(tiny.last_checkpoint(tmp_path / name)) for name in ("eager", "compiled"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)


def test_dropout_differs_between_steps_parts_and_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = tiny.seed(["a", "b"])
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    tiny.train(method, tmp_path, tiny.fit_config(accumulation=2, steps=5))
    assert len(seeds) == len(set(seeds)) == 5 * 2 * 2


def test_derived_seeds_depend_on_every_part_of_the_key() -> None:
    seeds = {
        derive_seed(0, name, step, part, rank)
        for name in "ab"
        for step in (1, 11)
        for part in (0, 1)
        for rank in (0, 1)
    }
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


# --- the optimiser's step -------------------------------------------------------------------------


def step_once(
    method: Method, folder: Path, lrs: dict[str, float] | None = None, **options: Any
) -> dict[str, dict[str, Tensor]]:
    """How far each parameter moves in one step of plain gradient descent."""
    before = {
        name: {key: p.detach().clone() for key, p in net.named_parameters()}
        for name, net in method.trainable.items()
    }
    optimizer = tiny.optimizer_config(
        momentum=0.0,
        weight_decay=0.0,
        warmup_epochs=0.0,
        schedule=ScheduleName.constant,
        lr=0.1,
        **options,
    )
    tiny.train(method, folder, tiny.fit_config(steps=1), optimizer, lrs=lrs)
    return {
        name: {key: p.detach() - before[name][key] for key, p in net.named_parameters()}
        for name, net in method.trainable.items()
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
    tiny.train(
        tiny.seed(), tmp_path, tiny.fit_config(steps=4, log_every=1, eval_every=0), optimizer
    )
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
        assert torch.cat(
            [step.flatten() for step in clipped[name].values()]
        ).norm().item() / lr == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig("lars", lr=10.0, warmup_epochs=0.4),
        OptimizerConfig("adamw", lr=0.005, weight_decay=0.1, warmup_epochs=0.4),
    ],
    ids=lambda one: one.name,
)
def test_other_optimisers_train_and_resume_bit_for_bit(
    optimizer: OptimizerConfig, tmp_path: Path
) -> None:
    tiny.train(tiny.seed(), tmp_path / "straight", optimizer=optimizer)
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(
            tiny.seed(),
            tmp_path / "broken",
            optimizer=optimizer,
            source=tiny.Images(fail_after=60),
        )
    tiny.train(tiny.seed(), tmp_path / "broken", optimizer=optimizer)
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize(
    ("name", "lr", "lrs", "is_warned"),
    [
        ("adamw", 1.0, None, True),
        ("adamw", 0.03, None, False),  # 0.001 at the batch of 8
        ("adamw", 0.001, None, False),
        ("adamw", 1.0, {"a": 0.001}, False),  # multiples of lr, as linear evaluation has them
        ("sgd", 0.03, None, False),
    ],
)
def test_a_rate_of_sgds_scale_is_warned_of_with_adamw(
    name: str,
    lr: float,
    lrs: dict[str, float] | None,
    is_warned: bool,
    tmp_path: Path,
    logged: list[str],
) -> None:
    optimizer = OptimizerConfig(name, lr=lr, warmup_epochs=0)
    tiny.train(tiny.seed(), tmp_path, tiny.fit_config(steps=1), optimizer, lrs=lrs)
    assert any(f"learning rate of {lr:g}" in line and "adamw" in line for line in logged) is (
        is_warned
    )


# --- what is logged -------------------------------------------------------------------------------


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
        folder = tiny.train(
            tiny.seed(), tmp_path / str(eval_every), tiny.fit_config(eval_every=eval_every)
        )
        assert [line["step"] for line in lines(folder) if "a/norm" in line] == expected


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    evaluated, not_evaluated = tiny.seed(dropout=0.3), tiny.seed(dropout=0.3)
    tiny.train(evaluated, tmp_path / "evaluated", tiny.fit_config(eval_every=0.2))
    tiny.train(
        not_evaluated, tmp_path / "not", tiny.fit_config(eval_every=0), evaluate=lambda _: {}
    )
    tiny.assert_same(tiny.weights(evaluated), tiny.weights(not_evaluated))


def test_epochs_give_the_length_where_steps_do_not(tmp_path: Path) -> None:
    tiny.train(tiny.seed(), tmp_path, tiny.fit_config(steps=None, epochs=2))
    assert tiny.last_checkpoint(tmp_path)["step"] == 10


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    steps: list[Mapping[str, int]] = []
    tiny.train(
        tiny.seed(),
        tmp_path,
        tiny.fit_config(checkpoint_every=5, eval_every=0),
        on_checkpoint=lambda trained, *_: steps.append(trained),
    )
    assert steps == [{"a": 5}, {"a": 10}, {"a": 12}, {"a": 12}]  # before and after the evaluation


# --- refusals -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_and_student_and_reaches_no_checkpoint(
    tmp_path: Path,
) -> None:
    method = tiny.seed(["a", "b"])
    poison(method, "a")
    poison(method, "b")
    with pytest.raises(
        ValueError, match=r"step 2: 2 steps of a had .*, 2 steps of b had .*lower optimizer\.lr"
    ):
        tiny.train(method, tmp_path, tiny.fit_config(max_skipped=1))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_part_that_does_not_divide_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulation=3 does not divide the 8 images"):
        tiny.train(tiny.seed(), tmp_path, tiny.fit_config(accumulation=3))


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exceeds the 40 images"):
        tiny.train(tiny.seed(), tmp_path, tiny.fit_config(batch_size=41))


# --- processes ------------------------------------------------------------------------------------


def train_here(
    kind: str, folder: str, changes: dict[str, Any], fail_after: int | None = None
) -> dict[str, Any] | str:
    """Trains on each rank; returns the method's state at the end, or the error's message."""
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


@pytest.mark.parametrize(
    ("kind", "accumulation"),
    [
        ("seed", 1),
        ("moco", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("seed", 2), ("moco", 1))),
    ],
)
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
        torch.testing.assert_close(torch.as_tensor(two_flat[key]), expected, rtol=1e-6, atol=1e-6)
    # The std and rank of half a batch are not those of the batch, and with accumulation entropies
    # are those of the last part.
    parts = ("a/embedding_std", "b/embedding_std", "a/embedding_rank", "b/embedding_rank")
    diagnostics = OF_THE_LAST_PART if accumulation > 1 else ()
    for single, double in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        keys = [key for key in single if key not in {*parts, *diagnostics}]
        assert [double[key] for key in keys] == pytest.approx(
            [single[key] for key in keys], abs=1e-5
        )


def test_two_processes_resume_bit_for_bit(two_ranks: Ranks, tmp_path: Path) -> None:
    # The newest checkpoint is that of step 8, in the middle of the interval that the line of step 9
    # is the mean of.
    straight = two_ranks.run(train_here, "seed", str(tmp_path / "straight"), {})
    assert two_ranks.run(train_here, "seed", str(tmp_path / "broken"), {}, 4 * 9) == [
        "unplugged",
        "unplugged",
    ]
    resumed = two_ranks.run(train_here, "seed", str(tmp_path / "broken"), {})
    tiny.assert_same(straight, resumed)
    assert_same_runs(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(
    accumulation: int, two_ranks: Ranks, tmp_path: Path
) -> None:
    options = {"accumulation": accumulation, "steps": 12}
    straight = train_here("seed", str(tmp_path / "straight"), options)
    assert train_here("seed", str(tmp_path / "elastic"), options, 8 * 7) == "unplugged"
    elastic = two_ranks.run(train_here, "seed", str(tmp_path / "elastic"), options)
    tiny.assert_same(elastic[0], elastic[1])
    expected, found = tiny.flat(straight), tiny.flat(elastic[0])
    for key, value in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(found[key]), torch.as_tensor(value), rtol=1e-5, atol=1e-5
        )
    for one, two in zip(lines(tmp_path / "straight"), lines(tmp_path / "elastic"), strict=True):
        losses = [key for key in one if "loss" in key]
        assert [two[key] for key in losses] == pytest.approx([one[key] for key in losses], abs=1e-5)


@pytest.mark.parametrize("kind", ["seed with bn", "moco with bn"])
def test_all_processes_end_with_the_same_network(
    kind: str, two_ranks: Ranks, tmp_path: Path
) -> None:
    first, second = two_ranks.run(train_here, kind, str(tmp_path), {})
    tiny.assert_same(first["networks"], second["networks"])  # running BN statistics included


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    messages = two_ranks.run(train_here, "seed", str(tmp_path), {"batch_size": 7})
    assert all("batch_size=7 does not divide by the 2 processes" in message for message in messages)
