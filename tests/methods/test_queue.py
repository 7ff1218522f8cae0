from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seed_exp.methods.queue import Queue


@given(size=st.integers(1, 13), pushes=st.lists(st.integers(1, 30), max_size=6))
def test_queue_holds_what_a_deque_holds(size: int, pushes: list[int]) -> None:
    queue = Queue(size, dim=2, seed=0)
    expected: deque[tuple[float, ...]] = deque(
        (tuple(row) for row in queue.embeddings.tolist()), maxlen=size
    )
    counter = 0
    for num in pushes:
        rows = torch.arange(counter, counter + 2 * num, dtype=torch.float32).reshape(num, 2)
        counter += 2 * num
        queue.enqueue(rows)
        expected.extend(tuple(row) for row in rows.tolist())
    in_order = torch.roll(queue.embeddings, -queue.position, 0)
    assert [tuple(row) for row in in_order.tolist()] == list(expected)


def test_initial_vectors_are_unit_and_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = Queue(100, 16, seed=5).embeddings
    torch.manual_seed(2)
    assert torch.equal(first, Queue(100, 16, seed=5).embeddings)
    assert not torch.equal(first, Queue(100, 16, seed=6).embeddings)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(100))


def test_state_includes_the_position() -> None:
    queue, other = Queue(5, 2, seed=0), Queue(5, 2, seed=1)
    queue.enqueue(torch.ones(3, 2))
    other.load_state_dict(queue.state_dict())
    assert other.position == 3
    assert torch.equal(other.embeddings, queue.embeddings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_queue_stays_float32(dtype: torch.dtype) -> None:
    queue = Queue(4, 2, seed=0)
    queue.enqueue(torch.ones(3, 2, dtype=dtype))
    assert queue.embeddings.dtype == torch.float32


def test_an_embedding_that_is_not_finite_takes_no_place() -> None:
    queue = Queue(4, 2, seed=0)
    before = queue.embeddings.clone()
    queue.enqueue(torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [0.0, torch.inf]]))
    assert queue.position == 3
    assert torch.equal(queue.embeddings[0], torch.tensor([1.0, 0.0]))
    assert torch.equal(queue.embeddings[1:], before[1:])
