"""Times the search for nearest neighbours of features, as k-NN evaluation does it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from seed_exp.benchmarks.measure import BenchReport, Contender, interleave, machine
from seed_exp.config.schema import BenchConfig
from seed_exp.engine.distributed import local_device
from seed_exp.evaluation.votes import nearest

Search = Callable[[Tensor, Tensor, int], tuple[Any, Any]]
"""Maps bank [M, D], queries [Q, D] and k to similarities (or distances) and indices [Q, k]."""

PLAIN_QUERIES = 1000
"""Queries whose similarities to the whole bank the plain way holds at once.

For all 50 k of ImageNet these would be 240 GiB.
"""


def bench(config: BenchConfig) -> BenchReport:
    """Measures queries per second, from features of any length to the `config.k` nearest by cosine.

    The time includes normalising and indexing.

    Raises:
        ValueError: k exceeds the bank.
    """
    device, k, num = local_device(config.device), config.k, config.query_size
    if k > config.bank_size:
        raise ValueError(
            f"k={k} exceeds bank_size={config.bank_size}; choose a smaller k or a larger bank"
        )
    torch.manual_seed(0)
    bank, queries = (
        torch.randn(rows, config.feature_dim, device=device) for rows in (config.bank_size, num)
    )
    searches: dict[str, Search] = {"plain": plain, "ours": nearest}
    if device.type == "cpu":
        searches |= {"scikit-learn, brute force": scikit_learn}
        if faiss := faiss_flat():
            searches |= {"faiss, flat": faiss}
    ways = [
        Contender(name, partial(search, bank, queries, k), num) for name, search in searches.items()
    ]
    products = Contender("matrix products", matrix_products(bank, queries), num)
    # scikit-learn and faiss have thread pools of their own.
    with threadpool_limits(torch.get_num_threads()):
        *rows, bound = interleave([*ways, products], seconds=config.seconds, device=device)
    few = queries[:PLAIN_QUERIES]
    same = (nearest(bank, few, k)[1] == plain(bank, few, k)[1]).float().mean().item()
    facts = {
        "bank x queries x dim": f"{config.bank_size} x {num} x {config.feature_dim}",
        "k": str(k),
        "matrix products": f"{2 * num * bank.numel() / bound.median_s / 1e9:,.0f} GFLOP/s",
        "neighbours as in plain": f"{100 * same:.3f} %",
    }
    return BenchReport(
        "nearest neighbours", "queries/s", rows, "plain", [bound], facts | machine(device)
    )


def plain(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices of the k nearest, by topk over all similarities of a block of queries."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    found = [(block @ bank.T).topk(k, dim=1) for block in torch.split(queries, PLAIN_QUERIES)]
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


def scikit_learn(bank: Tensor, queries: Tensor, k: int) -> tuple[Any, Any]:
    """Distances and indices of the k nearest, by scikit-learn.

    The distance is Euclidean at unit length. It gives the same order as the cosine, with which
    scikit-learn is much slower.
    """
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(
        F.normalize(bank, dim=1).numpy()
    )
    distances, indices = search.kneighbors(F.normalize(queries, dim=1).numpy())
    return distances, indices


def faiss_flat() -> Search | None:
    """The search by faiss's flat index of inner products; None if faiss is not installed."""
    try:
        import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None

    def search(bank: Tensor, queries: Tensor, k: int) -> tuple[Any, Any]:
        index = faiss.IndexFlatIP(bank.shape[1])
        index.add(F.normalize(bank, dim=1).numpy())
        similarities, indices = index.search(F.normalize(queries, dim=1).numpy(), k)
        return similarities, indices

    return search


def matrix_products(bank: Tensor, queries: Tensor) -> Callable[[], None]:
    """Returns a function that computes all similarities, tile by tile, and keeps none of them."""
    rows, columns = 1024, 4096
    buffer = torch.empty(rows * columns, device=bank.device)

    def run() -> None:
        for keys in torch.split(bank, columns):
            for block in torch.split(queries, rows):
                torch.mm(
                    block, keys.T, out=buffer[: len(block) * len(keys)].view(len(block), len(keys))
                )

    return run
