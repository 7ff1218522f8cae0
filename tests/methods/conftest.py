from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from seed_exp.methods import streaming


@pytest.fixture(params=[1, 7, 10_000], ids=["chunk=1", "chunk=7", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_ELEMENTS", {"cpu": 5 * request.param})


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Five students and teachers, and a queue of 23.

    Each teacher has near neighbours in the queue, so that targets are not one-hot.
    """
    teacher = tiny.embeddings(5, 16, seed=0)
    queue = torch.cat(
        [tiny.embeddings(5, 16, seed=1, near=teacher), tiny.embeddings(18, 16, seed=2)]
    )
    return tiny.embeddings(5, 16, seed=3), teacher, queue
