from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seed_exp.config.schema import OptimizerConfig, ScheduleName
from seed_exp.engine.schedules import lr_factor, peak_lr


def config(
    schedule: ScheduleName,
    warmup: float = 5.0,
    milestones: list[float] | None = None,
    gamma: float = 0.1,
) -> OptimizerConfig:
    return OptimizerConfig(
        "sgd",
        lr=1.0,
        schedule=schedule,
        warmup_epochs=warmup,
        milestones=milestones or [],
        gamma=gamma,
    )


@pytest.mark.parametrize("schedule", ScheduleName)
def test_warm_up_rises_linearly_from_exactly_zero_to_the_peak(schedule: ScheduleName) -> None:
    assert lr_factor(config(schedule), 0, 200) == 0
    assert lr_factor(config(schedule), 1.25, 200) == 0.25
    assert lr_factor(config(schedule), 4.999, 200) == pytest.approx(0.9998)
    assert lr_factor(config(schedule), 5, 200) == 1


@pytest.mark.parametrize("schedule", ScheduleName)
def test_without_warm_up_training_begins_at_the_peak(schedule: ScheduleName) -> None:
    assert lr_factor(config(schedule, warmup=0), 0, 200) == 1


def test_cosine_falls_from_the_peak_to_zero() -> None:
    cosine = config(ScheduleName.cosine)
    assert lr_factor(cosine, 102.5, 200) == pytest.approx(0.5)
    assert lr_factor(cosine, 5 + 195 / 3, 200) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert lr_factor(cosine, 200, 200) == 0
    values = [lr_factor(cosine, 5 + step / 10, 200) for step in range(1950)]
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


def test_steps_come_exactly_at_the_milestones() -> None:
    steps = config(ScheduleName.step, warmup=0, milestones=[30, 40], gamma=0.1)
    epochs = [0, 29.999, 30, 39.999, 40, 50]
    assert [lr_factor(steps, epoch, 50) for epoch in epochs] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_constant_stays_at_the_peak() -> None:
    assert {
        lr_factor(config(ScheduleName.constant), epoch, 200) for epoch in (5, 17.3, 199.9, 200)
    } == {1.0}


@given(
    schedule=st.sampled_from(ScheduleName),
    warmup=st.floats(0, 300),
    epoch=st.floats(0, 400),
    num_epochs=st.floats(0.01, 300),
)
def test_the_share_is_always_between_zero_and_one(
    schedule: ScheduleName, warmup: float, epoch: float, num_epochs: float
) -> None:
    assert 0 <= lr_factor(config(schedule, warmup, [100, 200]), epoch, num_epochs) <= 1


@pytest.mark.parametrize(("batch_size", "expected"), [(256, 0.03), (512, 0.06), (16, 0.001875)])
def test_the_learning_rate_scales_linearly_with_the_batch(batch_size: int, expected: float) -> None:
    assert peak_lr(0.03, batch_size) == pytest.approx(expected)
