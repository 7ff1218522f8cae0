from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import Ranks
from torch import Tensor, nn

from seed_exp.engine.averages import Averages

CPU = torch.device("cpu")
NEVER, ALWAYS = torch.tensor(False), torch.tensor(True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()


def move(module: nn.Module, step: int) -> None:
    """A step of a training: other weights, other running statistics."""
    torch.manual_seed(100 + step)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, dtype=tensor.dtype) + step)
            else:
                tensor.add_(1)


def test_weights_and_statistics_are_averaged_one_by_one_and_counters_copied() -> None:
    module = network()
    averages = Averages({"a": module}, 0.9, CPU)
    expected = {key: value.flatten().tolist() for key, value in module.state_dict().items()}
    for step in range(5):
        move(module, step)
        skipped = step == 3
        averages.update("a", module, ALWAYS if skipped else NEVER)
        for key, tensor in module.state_dict().items():
            new = tensor.flatten().tolist()
            if not tensor.is_floating_point():
                expected[key] = new
            elif not skipped:
                expected[key] = [
                    0.9 * old + (1 - 0.9) * value
                    for old, value in zip(expected[key], new, strict=True)
                ]
    found = averages.networks["a"].state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.flatten().tolist() == pytest.approx(expected[key], rel=1e-7), key
    assert found["1.num_batches_tracked"] == 5


def test_a_skipped_step_leaves_the_average_bit_for_bit() -> None:
    module = network().float()
    averages = Averages({"a": module}, 0.999, CPU)
    move(module, 0)
    averages.update("a", module, NEVER)
    before = tiny.flat({key: value.clone() for key, value in averages.state()["a"].items()})
    averages.update("a", module, ALWAYS)
    tiny.assert_same(before, tiny.flat(averages.state()["a"]))


def test_weights_that_layers_share_are_averaged_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    averages = Averages({"a": module}, 0.5, CPU)
    start = module[0].weight.detach().clone()
    move(module, 1)
    averages.update("a", module, NEVER)
    expected = (start + module[0].weight) / 2
    torch.testing.assert_close(averages.networks["a"][1].weight, expected)
    assert averages.networks["a"][0].weight is averages.networks["a"][1].weight


def test_an_average_neither_learns_nor_changes_its_network() -> None:
    module = network()
    averages = Averages({"a": module}, 0.5, CPU)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    averages.update("a", module, NEVER)
    tiny.assert_same(before, dict(module.state_dict()))
    assert not averages.networks["a"].training
    assert not any(one.requires_grad for one in averages.networks["a"].parameters())
    assert all(one.requires_grad for one in module.parameters())


# --- in a training --------------------------------------------------------------------------------

SHORT = {"b": 1}
"""Epochs of the student that ends first; an epoch of `tiny` has 5 steps."""


def trained(
    folder: Path, *, fail_after: int | None = None, ema_decay: float | None = 0.8, **options: Any
) -> dict[int, tuple[dict[str, int], dict[str, dict[str, Tensor]]]]:
    """Trains two students with mixup; what each checkpoint gave, by step."""
    written = {}

    def keep(steps: Mapping[str, int], networks: Mapping[str, Any], _: int) -> None:
        written[max(steps.values())] = dict(steps), dict(networks)

    tiny.train(
        tiny.seed(["a", "b"], dropout=0.3),
        folder,
        tiny.fit_config(steps=None, epochs=2, checkpoint_every=1, **options),
        tiny.optimizer_config(name="adamw", lr=0.01),
        source=tiny.Images(fail_after=fail_after),
        on_checkpoint=keep,
        epochs=SHORT,
        ema_decay=ema_decay,
        mixup=True,
    )
    return written


def test_the_average_follows_every_step_of_its_student_and_ends_with_it(tmp_path: Path) -> None:
    written = trained(tmp_path)
    expected = {
        name: {key: value.double() for key, value in student.state_dict().items()}
        for name, student in tiny.students(["a", "b"]).items()
    }
    for step in range(1, 11):
        steps, networks = written[step]
        assert steps == {"a": step, "a_ema": step, "b": min(step, 5), "b_ema": min(step, 5)}
        for name in ("a", "b"):
            if step > steps[name]:
                continue
            for key, value in networks[name].items():
                mean = 0.8 * expected[name][key] + 0.2 * value
                expected[name][key] = mean if value.is_floating_point() else value
        for name in ("a", "b"):
            for key, value in networks[f"{name}_ema"].items():
                torch.testing.assert_close(
                    value.double(), expected[name][key].double(), rtol=1e-5, atol=1e-6
                )


def test_averages_change_nothing_of_the_training(tmp_path: Path) -> None:
    averaged, alone = trained(tmp_path / "with"), trained(tmp_path / "without", ema_decay=None)
    for step, (steps, networks) in alone.items():
        assert steps.keys() == networks.keys() == {"a", "b"}
        tiny.assert_same(networks, {name: averaged[step][1][name] for name in networks})
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("with", "without")]
    assert metrics[0] == metrics[1]


def test_a_run_with_averages_mixup_and_adamw_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = trained(tmp_path / "straight")
    with pytest.raises(ValueError, match="unplugged"):
        trained(tmp_path / "broken", fail_after=8 * 7 + 3)
    resumed = trained(tmp_path / "broken")
    assert min(resumed) > 1
    for step, state in resumed.items():
        tiny.assert_same(straight[step][1], state[1])
    tiny.assert_same(
        tiny.last_checkpoint(tmp_path / "straight"), tiny.last_checkpoint(tmp_path / "broken")
    )


def train_here(folder: str, fail_after: int | None = None, bn: bool = True) -> str | dict[str, Any]:
    """Trains on each rank; the averages in the last checkpoint, or the error's message."""
    try:
        tiny.train(
            tiny.seed(["a"], bn=bn),
            Path(folder),
            source=tiny.Images(fail_after=fail_after),
            ema_decay=0.8,
            mixup=True,
        )
    except ValueError as error:
        return str(error)
    averages: dict[str, Any] = tiny.last_checkpoint(Path(folder))["averages"]
    return averages


def test_two_processes_with_averages_and_mixup_resume_bit_for_bit(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    two_ranks.run(train_here, str(straight))
    assert two_ranks.run(train_here, str(broken), 4 * 9) == ["unplugged", "unplugged"]
    two_ranks.run(train_here, str(broken))
    tiny.assert_same(tiny.last_checkpoint(straight), tiny.last_checkpoint(broken))
    assert (straight / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()


def test_two_processes_mix_and_average_as_one_does(two_ranks: Ranks, tmp_path: Path) -> None:
    one = train_here(str(tmp_path / "one"), bn=False)
    two, _ = two_ranks.run(train_here, str(tmp_path / "two"), None, False)
    for value, other in zip(tiny.flat(one).values(), tiny.flat(two).values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("decay", "is_warned"), [(0.999, True), (0.5, False)])
def test_an_average_that_keeps_much_of_the_initial_weights_is_warned_of(
    decay: float, is_warned: bool, tmp_path: Path, logged: list[str]
) -> None:
    tiny.train(tiny.seed(), tmp_path, ema_decay=decay)
    assert any("of the initial weights when the run ends" in line for line in logged) is is_warned
