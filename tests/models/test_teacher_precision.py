"""On a GPU a teacher computes in float16, and in float32 once that does not hold its embeddings."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from seed_exp.models import frozen_teacher, teacher_precision
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.teacher_precision import (
    Arriving,
    Overflow,
    callers_dtype,
    computing_in,
    teacher_dtype,
)

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("students", "device", "expected"),
    [
        (BFLOAT, "cuda", HALF),
        (FLOAT, "cuda", FLOAT),
        (BFLOAT, "cpu", BFLOAT),
        (FLOAT, "cpu", FLOAT),
        (FLOAT, "meta", FLOAT),
    ],
)
def test_float16_takes_the_place_of_bfloat16_on_a_gpu_only(
    students: torch.dtype, device: str, expected: torch.dtype
) -> None:
    assert teacher_dtype(students, device) is expected


def test_the_callers_format_is_that_of_its_autocast() -> None:
    assert callers_dtype("cpu") is callers_dtype("meta") is FLOAT
    with torch.autocast("cpu", BFLOAT):
        assert callers_dtype("cpu") is BFLOAT
        with torch.autocast("cpu", enabled=False):
            assert callers_dtype("cpu") is FLOAT


@pytest.mark.parametrize("caller", [FLOAT, BFLOAT, HALF])
@pytest.mark.parametrize("wanted", [FLOAT, BFLOAT, HALF])
def test_a_format_holds_whatever_the_callers(caller: torch.dtype, wanted: torch.dtype) -> None:
    layer = nn.Linear(2, 2)
    with computing_in(caller, "cpu"), computing_in(wanted, "cpu"):
        assert layer(torch.ones(1, 2)).dtype is wanted


class Scaled(nn.Module):
    """The image's mean, times a number."""

    num_features = 4

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.layer.weight, scale)
        self.seen: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layer(images.mean((2, 3))[:, [0, 1, 2, 0]])
        self.seen.append(out.dtype)
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a GPU."""
    monkeypatch.setattr(
        frozen_teacher, "teacher_dtype", lambda dtype, _: teacher_dtype(dtype, "cuda")
    )


def teacher(scale: float) -> Teacher:
    return Teacher(Scaled(scale), nn.Identity(), 4)


def formats(one: Teacher) -> list[torch.dtype]:
    found: list[torch.dtype] = one.encoder.seen  # type: ignore[assignment]
    return found


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_teacher_under_bfloat16_computes_in_float16() -> None:
    ours = teacher(1.0)
    with torch.autocast("cpu", BFLOAT):
        embeddings = ours(torch.rand(5, 3, 8, 8))
    assert formats(ours) == [HALF]
    assert embeddings.dtype is FLOAT


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_teacher_without_autocast_computes_in_float32() -> None:
    ours = teacher(1.0)
    ours(torch.rand(5, 3, 8, 8))
    assert formats(ours) == [FLOAT]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_embeddings_beyond_float16_are_computed_again_in_float32_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, images = teacher(1e5), torch.rand(5, 3, 8, 8)
    expected = teacher(1e5)(images)
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", BFLOAT):
        found = [ours(images), ours(images), ours(images[:, :, :4, :4])]
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    assert formats(ours) == [HALF, FLOAT, FLOAT, FLOAT]
    assert len(caplog.records) == 1
    assert "computes in float32 from now on" in caplog.text


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_copy_of_a_teacher_tries_float16_anew() -> None:
    ours, images = teacher(1e5), torch.rand(5, 3, 8, 8)
    with torch.autocast("cpu", BFLOAT):
        ours(images)
        twin = copy.deepcopy(ours)
        formats(twin).clear()
        twin(images)
    assert formats(twin) == [HALF, FLOAT]


def test_only_the_first_views_of_a_shape_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag of later ones is read when it has arrived, with those that came in the meantime."""
    sent: list[Tensor] = []
    there = False

    def send(flag: Tensor) -> Arriving:
        sent.append(flag)
        return Arriving(flag, lambda: there)

    monkeypatch.setattr(teacher_precision, "sent_to_host", send)
    overflow, shape = Overflow(), torch.Size((2, 3, 8, 8))
    good, bad = torch.ones(2, 4), torch.tensor([[1.0, torch.nan]])
    overflow.add(good, shape)
    assert sent == []
    overflow.add(good, shape)  # under way
    overflow.add(bad, shape)  # goes with the next
    overflow.add(good, shape)
    assert [bool(flag) for flag in sent] == [False]
    assert not overflow.seen()
    there = True
    assert not overflow.seen()  # the first answer, which knows nothing of the second
    there = False
    overflow.add(good, shape)
    assert [bool(flag) for flag in sent] == [False, True]
    assert not overflow.seen()
    there = True
    assert overflow.seen()
