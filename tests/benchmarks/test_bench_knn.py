from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info
from torch.utils.flop_counter import FlopCounterMode

from seed_exp.benchmarks import bench_knn
from seed_exp.benchmarks.measure import BenchRow, Contender
from seed_exp.config.compose import compose

SIZES = ["bank_size=300", "query_size=40", "feature_dim=6", "k=5", "device=cpu", "seconds=0"]


def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of very different lengths.

    Products and distances of them would give other neighbours than cosines.
    """
    torch.manual_seed(0)
    return torch.randn(300, 6) * torch.rand(300, 1).exp2() * 10, torch.randn(40, 6) * 3


def test_all_ways_find_the_nearest_by_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_knn, "PLAIN_QUERIES", 7)  # several blocks
    bank, queries = features()
    cosines = torch.cosine_similarity(queries[:, None].double(), bank[None].double(), dim=2)
    expected = cosines.argsort(dim=1, descending=True)[:, :5]
    ways = [
        bench_knn.plain,
        bench_knn.nearest,
        bench_knn.scikit_learn,
        *filter(None, [bench_knn.faiss_flat()]),
    ]
    for way in ways:
        assert np.asarray(way(bank, queries, 5)[1]).tolist() == expected.tolist()


def test_without_faiss_there_is_no_row_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert bench_knn.faiss_flat() is None
    assert [row.name for row in bench_knn.bench(compose("bench", ["bench=knn", *SIZES])).rows] == [
        "plain",
        "ours",
        "scikit-learn, brute force",
    ]


def test_every_library_has_as_many_threads_as_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    interleave = bench_knn.interleave

    def watched(
        contenders: list[Contender], *, seconds: float, device: torch.device
    ) -> list[BenchRow]:
        found.extend(library["num_threads"] for library in threadpool_info())
        return interleave(contenders, seconds=seconds, device=device)

    monkeypatch.setattr(bench_knn, "interleave", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        report = bench_knn.bench(compose("bench", ["bench=knn", *SIZES]))
    finally:
        torch.set_num_threads(before)
    assert set(found) == {1}
    assert report.facts["CPU threads"] == "1"
    assert report.facts["neighbours as in plain"] == "100.000 %"


def test_the_matrix_products_are_all_similarities() -> None:
    bank, queries = torch.randn(5000, 3), torch.randn(1100, 3)  # several tiles either way
    with FlopCounterMode(display=False) as counter:
        bench_knn.matrix_products(bank, queries)()
    assert counter.get_total_flops() == 2 * 5000 * 1100 * 3


def test_k_beyond_the_bank_is_refused() -> None:
    with pytest.raises(ValueError, match="k=301 exceeds bank_size=300"):
        bench_knn.bench(compose("bench", ["bench=knn", *SIZES, "k=301"]))
