from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from seed_exp.evaluation import votes

MIB = 2**20


def features(rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def ties(rows: int, seed: int = 0) -> Tensor:
    """Entries of +-1/2 in four dimensions, so that nearly all similarities are tied.

    Lengths are 1, and cosines exactly one of {-1, -1/2, 0, 1/2, 1}.
    """
    return torch.randint(0, 2, (rows, 4), generator=torch.Generator().manual_seed(seed)) - 0.5


def slow_nearest(
    bank: Tensor, queries: Tensor, k: int
) -> tuple[list[list[float]], list[list[int]]]:
    """Sorts all cosines in float64, one query at a time; of equal ones the lower index is first."""
    similarities, indices = [], []
    for query in queries.double():
        cosines = [
            float(query @ row / (query.norm() * row.norm()).clamp_min(1e-12))
            for row in bank.double()
        ]
        order = sorted(range(len(bank)), key=lambda j: (-cosines[j], j))[:k]
        similarities.append([cosines[j] for j in order])
        indices.append(order)
    return similarities, indices


def slow_vote(weights: list[float], labels: list[int]) -> int:
    """Adds the weights up per class; of equal sums the class whose member comes first wins."""
    return max(
        labels,
        key=lambda label: sum(
            w for w, other in zip(weights, labels, strict=True) if other == label
        ),
    )


@pytest.mark.parametrize("k", [1, 7, 40])
def test_nearest_equals_a_sort_of_all_cosines(k: int) -> None:
    bank, queries = 3 * features(40, 6), features(9, 6, seed=1)
    similarities, indices = votes.nearest(bank, queries, k)
    slow_similarities, slow_indices = slow_nearest(bank, queries, k)
    assert indices.tolist() == slow_indices
    torch.testing.assert_close(similarities, torch.tensor(slow_similarities), rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory", [1, 20_000, 40_000])
@pytest.mark.parametrize("k", [1, 5, 33])
def test_tile_sizes_do_not_change_the_result(memory: int, k: int) -> None:
    bank, queries = features(211, 8), features(31, 8, seed=1)
    assert votes._tile_rows(8, k, memory)[1] < len(bank)
    expected_similarities, expected_indices = votes.nearest(bank, queries, k)
    similarities, indices = votes.nearest(bank, queries, k, memory=memory)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(similarities, expected_similarities, rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory", [1, 30_000, MIB])
@pytest.mark.parametrize("k", [1, 3, 20, 99])
def test_of_equal_similarities_the_lower_index_wins_in_every_tiling(memory: int, k: int) -> None:
    bank, queries = ties(100), ties(20, seed=1)
    _, indices = votes.nearest(bank, queries, k, memory=memory)
    assert indices.tolist() == slow_nearest(bank, queries, k)[1]


@pytest.mark.parametrize("seed", range(30))
def test_sizes_of_every_kind_give_the_first_of_a_stable_sort(seed: int) -> None:
    generator = random.Random(seed)
    num_bank, num_queries = generator.randint(1, 3000), generator.randint(1, 400)
    k, memory = generator.randint(1, min(num_bank, 150)), 2 ** generator.randint(15, 22)
    bank, queries = ties(num_bank, seed), ties(num_queries, seed + 100)
    similarities, indices = votes.nearest(bank, queries, k, memory=memory)
    expected = (queries @ bank.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(similarities, expected.values[:, :k])
    assert torch.equal(indices, expected.indices[:, :k])


def test_neighbours_may_lie_on_the_far_side() -> None:
    bank, queries = features(300, 6).abs(), -features(20, 6, seed=1).abs()
    similarities, indices = votes.nearest(bank, queries, 7)
    assert similarities.max() < 0
    assert indices.tolist() == slow_nearest(bank, queries, 7)[1]


@pytest.mark.parametrize("k", [3, 200])
def test_a_bank_sorted_by_similarity_is_searched_from_end_to_end(k: int) -> None:
    angles = torch.linspace(0, 3, 4000)
    bank, queries = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([[2.0, 0.0]])
    for order in (torch.arange(4000), torch.arange(4000).flip(0)):
        _, indices = votes.nearest(bank[order], queries, k, memory=100_000)
        assert order[indices].tolist() == [list(range(k))]


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_gpu_finds_the_same_neighbours_wherever_the_bank_is(where: str) -> None:
    bank, queries = ties(3000), ties(400, seed=1)
    similarities, indices = votes.nearest(bank.to(where), queries.cuda(), 150, memory=4 * MIB)
    expected_similarities, expected_indices = votes.nearest(bank, queries, 150)
    assert torch.equal(similarities.cpu(), expected_similarities)
    assert torch.equal(indices.cpu(), expected_indices)


def test_few_similarities_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, above = [0], votes._above

    def counted(groups: Tensor, rows: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        looked_at[0] += votes.GROUP * len(rows)
        return above(groups, rows, *others)

    monkeypatch.setattr(votes, "_above", counted)
    votes.nearest(features(20_000, 16), features(100, 16, seed=1), 10, memory=16 * MIB)
    assert 100 * 10 <= looked_at[0] < 0.03 * 20_000 * 100


def test_a_collapsed_encoder_gives_the_first_images() -> None:
    _, indices = votes.nearest(torch.ones(300, 4), torch.ones(5, 4), 10, memory=50_000)
    assert indices.tolist() == [list(range(10))] * 5


def test_length_of_features_does_not_matter_and_zero_is_far_from_all() -> None:
    bank, queries = features(50, 5), features(4, 5, seed=1)
    _, expected = votes.nearest(bank, queries, 10)
    _, indices = votes.nearest(bank * torch.rand(50, 1).add(0.1), queries * 100, 10)
    assert torch.equal(indices, expected)
    similarities, _ = votes.nearest(bank, torch.zeros(1, 5), 3)
    assert similarities.tolist() == [[0, 0, 0]]


def test_half_precision_bank_is_compared_in_float32() -> None:
    bank, queries = features(200, 16).half(), features(10, 16, seed=1)
    similarities, indices = votes.nearest(bank, queries, 5)
    expected_similarities, expected_indices = votes.nearest(bank.float(), queries, 5)
    assert similarities.dtype == torch.float32
    assert torch.equal(similarities, expected_similarities)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("k", [0, 11])
def test_k_outside_the_bank_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"got k={k} and 10 images"):
        votes.nearest(features(10, 3), features(2, 3), k)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["bank", "queries"])
@pytest.mark.parametrize("row", [0, -1])
def test_features_that_are_not_finite_are_refused(value: float, where: str, row: int) -> None:
    tensors = {"bank": features(300, 3), "queries": features(20, 3, seed=1)}
    tensors[where][row, 1] = value
    with pytest.raises(ValueError, match="must be finite"):
        votes.nearest(tensors["bank"], tensors["queries"], 2, memory=10_000)


def test_features_of_different_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[10, 3\] and \[2, 4\]"):
        votes.nearest(features(10, 3), features(2, 4), 1)


def test_votes_equal_the_slow_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(votes, "MIB", 8)  # so that the 50 queries need several batches
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (50, 6), generator=generator)
    similarities = torch.rand(50, 6, generator=generator).sort(dim=1, descending=True).values
    ones = [1.0] * 6
    assert votes.majority_vote(labels, 4).tolist() == [
        slow_vote(ones, row) for row in labels.tolist()
    ]
    for temperature in (1.0, 0.07, 0.01):
        weights = similarities.double().div(temperature).exp().tolist()
        expected = [slow_vote(w, row) for w, row in zip(weights, labels.tolist(), strict=True)]
        assert votes.weighted_vote(similarities, labels, 4, temperature).tolist() == expected


def test_tied_classes_go_to_the_nearest_neighbour() -> None:
    labels = torch.tensor([[2, 0, 0, 2], [1, 3, 3, 1], [5, 4, 3, 2]])
    assert votes.majority_vote(labels, 6).tolist() == [2, 1, 5]
    assert votes.weighted_vote(torch.full((3, 4), 0.5), labels, 6, 0.07).tolist() == [2, 1, 5]


def test_weighted_vote_does_not_overflow_at_low_temperature() -> None:
    # exp(100) is infinite in float32, and all infinite sums would be tied.
    similarities, labels = torch.tensor([[1.0, 0.9999, 0.9999]]), torch.tensor([[1, 0, 0]])
    assert votes.weighted_vote(similarities, labels, 2, 0.01).tolist() == [0]
    assert votes.weighted_vote(similarities, labels, 2, 1e-5).tolist() == [1]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


@pytest.mark.parametrize("k", [1, 9])
def test_accuracy_on_digits_equals_scikit_learn(k: int) -> None:
    bank, bank_labels, queries, query_labels = digits()
    temperature = 0.07
    result = votes.knn_accuracy(
        bank, bank_labels, queries, query_labels, ks=[k], temperature=temperature
    )
    weightings = {
        "majority": "uniform",
        "weighted": lambda distances: np.exp((1 - distances) / temperature),
    }
    assert set(result) == {f"knn{k}_majority", f"knn{k}_weighted"}
    for vote, weights in weightings.items():
        classifier = KNeighborsClassifier(
            n_neighbors=k, metric="cosine", algorithm="brute", weights=weights
        )
        classifier.fit(bank.numpy(), bank_labels.numpy())
        # scikit-learn gives tied classes to the lowest label, we to the nearest neighbour: a few
        # digits may differ.
        expected = 100 * classifier.score(queries.numpy(), query_labels.numpy())
        tolerance = 0.0 if k == 1 or vote == "weighted" else 0.4
        assert result[f"knn{k}_{vote}"] == pytest.approx(expected, abs=tolerance + 1e-9)


def test_accuracy_with_several_ks_equals_each_alone() -> None:
    bank, bank_labels, queries, query_labels = digits()
    together = votes.knn_accuracy(
        bank, bank_labels, queries, query_labels, ks=[20, 5, 1200], temperature=0.07
    )
    alone: dict[str, float] = {}
    for k in (20, 5, 1200):
        alone |= votes.knn_accuracy(
            bank, bank_labels, queries, query_labels, ks=[k], temperature=0.07
        )
    assert together == alone
    assert 0 < together["knn1200_majority"] < together["knn20_majority"] <= 100


def test_a_class_that_the_bank_lacks_counts_as_wrong() -> None:
    bank = torch.eye(2)
    result = votes.knn_accuracy(
        bank, torch.tensor([0, 1]), bank, torch.tensor([0, 7]), ks=[1], temperature=0.07
    )
    assert result == {"knn1_majority": 50.0, "knn1_weighted": 50.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [5, 31]}, r"from 1 to 30, got \[5, 31\]; choose smaller ks"),
        ({"ks": []}, "each of ks"),
        ({"ks": [0]}, "each of ks"),
        ({"temperature": 0.0}, "must be positive, got 0.0"),
        ({"bank_labels": torch.tensor([-1, -1] + [0] * 28)}, "2 of 30 bank images have none"),
        ({"query_labels": torch.tensor([-1] * 4)}, "4 of 4 query images have none"),
        ({"query_labels": torch.zeros(3, dtype=torch.int64)}, "got 3 labels for 4 images"),
        ({"queries": torch.zeros(0, 3)}, "no images to classify"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "bank": features(30, 3),
        "bank_labels": torch.zeros(30, dtype=torch.int64),
        "queries": features(4, 3),
        "query_labels": torch.zeros(4, dtype=torch.int64),
        "ks": [5],
        "temperature": 0.07,
    }
    with pytest.raises(ValueError, match=message):
        votes.knn_accuracy(**(arguments | change))  # type: ignore[arg-type]


MEASURE_MEMORY = """
import json, sys, torch
from seed_exp.evaluation.votes import nearest

def peak():  # bytes; getrusage would report the parent's peak where that is larger
    lines = open("/proc/self/status")
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

case, memory, num_bank, num_queries, dim, k = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(2)
# The first call loads what torch loads on first use.
nearest(torch.randn(1000, 64), torch.randn(300, 64), 20, memory=2**20)
empty = peak()
bank, queries = torch.randn(num_bank, dim), torch.randn(num_queries, dim)
if case == "tied":
    bank.fill_(1), queries.fill_(1)
# Every tile is nearer than all before it, to all queries or to some.
if case in ("ascending", "uneven"):
    bank[:, 0], queries[:, 0] = torch.linspace(0, 100, num_bank), 0
    queries[:: 1 if case == "ascending" else 50, 0] = 100
before = peak()
nearest(bank, queries, k, memory=memory)
print(json.dumps({"growth": peak() - before, "all": peak() - empty}))
"""


def measure_memory(case: str, *sizes: int) -> dict[str, int]:
    """Bytes by which a new process's memory grows: in `nearest` alone, and with its arguments."""
    line = [sys.executable, "-c", MEASURE_MEMORY, case, *map(str, sizes)]
    found: dict[str, int] = json.loads(
        subprocess.run(line, capture_output=True, text=True, check=True).stdout
    )
    return found


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux_only
@pytest.mark.parametrize(
    "case",
    [
        "uneven",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("random", "tied", "ascending")),
    ],
)
def test_peak_memory_stays_within_the_bound(case: str) -> None:
    # All similarities at once would be 200 MB. Allowed beside the bound: result, heap
    # fragmentation, buffers of the matmul.
    memory = 32 * MIB
    assert (
        4 * MIB < measure_memory(case, memory, 50_000, 1_000, 64, 20)["growth"] < memory + 24 * MIB
    )


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize("case", ["random", "ascending"])
def test_a_quarter_of_imagenet_takes_its_features_the_bound_and_the_result(case: str) -> None:
    num_bank, num_queries, dim, k, memory = 320_000, 1_500, 512, 200, 256 * MIB
    arguments, result = 4 * dim * (num_bank + num_queries), 12 * k * num_queries
    assert (
        measure_memory(case, memory, num_bank, num_queries, dim, k)["all"]
        < arguments + result + memory + 64 * MIB
    )
