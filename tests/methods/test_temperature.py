"""A calibrated temperature gives the target the neighbours that were asked for, or says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from reference import seed_loss as plain_seed_loss
from torch import Tensor
from torch.nn import functional as F

from seed_exp.config.compose import compose
from seed_exp.config.schema import NeighboursPer, QueueInit, SeedConfig
from seed_exp.methods import losses
from seed_exp.methods.seed import Seed
from seed_exp.methods.temperature import (
    ROW_WINDOW,
    calibrated_temperature,
    row_temperatures,
)


def scene(num: int = 200, dim: int = 16, alike: float = 1.0) -> tuple[Tensor, Tensor]:
    """Teacher embeddings of 30 views and a queue, around a common direction: cosines are high."""
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(1, dim, generator=generator)
    drawn = alike * common + torch.randn(30 + num, dim, generator=generator)
    embeddings = F.normalize(drawn, dim=1)
    return embeddings[:30], embeddings[30:]


def neighbours(teacher: Tensor, queue: Tensor, tau: float | Tensor) -> Tensor:
    """exp(entropy) of each row's target [N], from the whole matrix of similarities in float64."""
    teacher, queue = teacher.double(), queue.double()
    own = (teacher * teacher).sum(1, keepdim=True)
    logits = torch.cat([own, teacher @ queue.T], 1) / (
        tau[:, None] if isinstance(tau, Tensor) else tau
    )
    target = torch.softmax(logits, 1)
    return torch.exp(-torch.xlogy(target, target).sum(1))


@pytest.mark.parametrize("wanted", [1.5, 10, 60, 195])
def test_the_target_has_the_neighbours_that_were_asked_for_on_average(wanted: float) -> None:
    teacher, queue = scene()
    tau = calibrated_temperature(teacher, queue, wanted)
    assert neighbours(teacher, queue, tau).mean().item() == pytest.approx(wanted, rel=5e-3)
    assert neighbours(teacher, queue, tau).std() > 0.01, "of rows that differ"
    assert tau == float(f"{tau:.4g}")


@pytest.mark.parametrize("wanted", [3.0, 20.0])
def test_a_temperature_for_each_row_gives_each_row_its_neighbours(wanted: float) -> None:
    teacher, queue = scene()
    around = calibrated_temperature(teacher, queue, wanted)
    taus = row_temperatures(teacher, queue, wanted, around)
    found = neighbours(teacher, queue, taus)
    torch.testing.assert_close(found, torch.full_like(found, wanted), rtol=2e-2, atol=0)
    assert taus.std() > 1e-4
    assert ((taus > around / ROW_WINDOW) & (taus < around * ROW_WINDOW)).all()


def test_the_loss_with_a_temperature_for_each_row_is_the_mean_of_the_rows_losses() -> None:
    teacher, queue = scene()
    student, taus = tiny.embeddings(30, 16, seed=9), torch.linspace(0.02, 0.4, 30)
    target = losses.seed_target(teacher, queue, tau_teacher=taus)
    found = losses.seed_loss(
        student, teacher, queue, tau_student=0.2, tau_teacher=1.0, target=target
    )
    expected = [
        plain_seed_loss(student[i : i + 1], teacher[i : i + 1], queue, 0.2, float(taus[i]))
        for i in range(30)
    ]
    assert found.item() == pytest.approx(sum(expected) / 30, rel=1e-5)
    entropy = losses.target_entropy(teacher, queue, tau_teacher=taus).double()
    torch.testing.assert_close(
        entropy.exp(), neighbours(teacher, queue, taus), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "wanted", "words"),
    [
        (lambda rows: torch.full_like(rows, 0.25), 5, "embeddings of all images are equal"),
        (lambda rows: rows, 202, r"has 1 at tau_teacher=0\.0001 and 201 at .* a number in between"),
        (lambda rows: rows[:1].expand(len(rows), -1), 5, "embeddings of all images are equal"),
        (lambda rows: rows * float("nan"), 5, "embeddings that are not finite"),
    ],
)
def test_neighbours_that_cannot_be_reached_are_an_error(
    change: Callable[[Tensor], Tensor], wanted: float, words: str
) -> None:
    teacher, queue = change(torch.cat(scene())).split([30, 200])
    with pytest.raises(ValueError, match=rf"effective_neighbours={wanted} .*{words}"):
        calibrated_temperature(teacher, queue, wanted)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "objective.effective_neighbours=66 objective.queue_size=64",
            "a queue of 64; choose fewer",
        ),
        ("objective.effective_neighbours=1", "more than 1, which is the image itself, got 1"),
        ("objective.effective_neighbours=nan", "more than 1"),
        ("objective.effective_neighbours_per=row", "needs a number of"),
        ("objective.effective_neighbours=9 objective.tau_teacher=0.1", "both choose the temper"),
        ("objective=compress objective.effective_neighbours=9", "effective_neighbours"),
    ],
)
def test_options_that_cannot_go_together_are_refused(words: str, expected: str) -> None:
    with pytest.raises(Exception, match=expected):
        compose("distill", ["student=convnet_w2", "data=digits", *words.split()])


def test_more_neighbours_than_an_automatic_queue_holds_are_refused_once_images_are_counted() -> (
    None
):
    words = ["student=convnet_w2", "data=digits", "objective.effective_neighbours=600"]
    config = compose("distill", words)
    assert config.sized_for(5000).objective.queue_size == 2048
    with pytest.raises(ValueError, match=r"600 cannot be reached.*queue of 512"):
        config.sized_for(1437)


def calibrated(per: NeighboursPer = NeighboursPer.run) -> Seed:
    config = SeedConfig(effective_neighbours=5.0, effective_neighbours_per=per, queue_size=21)
    return Seed(tiny.students(), tiny.teacher(), config, ["global", "local"], seed=3)


def trained(method: Seed) -> dict[str, Any]:
    views = {"global": torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    views["local"] = views["global"][..., :6, :6]
    batch = method.prepare(views, tiny.host_batch(5))
    return {
        **method.loss("a", method.trainable["a"], batch),
        **{key: value for key, value in method.diagnostics(batch).items() if "rank" not in key},
    }


@pytest.mark.parametrize("per", NeighboursPer)
def test_a_checkpoint_keeps_the_temperature_and_training_goes_by_it(per: NeighboursPer) -> None:
    method, other = calibrated(per), calibrated(per)
    assert method.found() == {}
    before = trained(copy.deepcopy(method))
    assert method.temperature is not None
    method.temperature.value = 0.37
    assert method.found() == {"tau_teacher": 0.37}
    expected = trained(copy.deepcopy(method))
    assert not torch.equal(before["teacher_entropy"], expected["teacher_entropy"]) or (
        per is NeighboursPer.row
    )
    other.carried.load_state_dict(method.carried.state_dict())
    other.trainable["a"].load_state_dict(method.trainable["a"].state_dict())
    tiny.assert_same(expected, trained(other))
    if per is NeighboursPer.run:
        assert expected["tau_teacher"].item() == pytest.approx(0.37)
    else:
        assert expected["effective_neighbours"].item() == pytest.approx(5, rel=0.1)


def test_a_calibrated_run_is_told_nothing_of_a_one_hot_target() -> None:
    config = SeedConfig(effective_neighbours=5.0, queue_size=16, queue_init=QueueInit.teacher)
    method = Seed(tiny.students(), tiny.teacher(), config, ["global"], seed=0)
    for line in range(9):
        shown = {"effective_neighbours": 1.0}
        assert method.advice(shown, num_seen=100 * line, num_images=40) is None
