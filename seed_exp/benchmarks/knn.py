"""Nearest neighbours of features, as k-NN evaluation looks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

from seed_exp.benchmarks.measure import Contender, Report, interleave, machine
from seed_exp.config.schema import BenchConfig
from seed_exp.engine.distributed import local_device
from seed_exp.evaluation.knn import nearest


def bench(config: BenchConfig) -> Report:
    """Queries per second of finding the `config.k` nearest of `config.bank_size` features, all of unit length.

    Raises:
        ValueError: k exceeds the bank.
    """
    device, k = local_device(config.device), config.k
    if k > config.bank_size:
        raise ValueError(f"k={k} exceeds bank_size={config.bank_size}; choose a smaller k or a larger bank")
    generator = torch.Generator().manual_seed(0)
    bank, queries = (
        F.normalize(torch.randn(num, config.feature_dim, generator=generator), dim=1).to(device)
        for num in (config.bank_size, config.query_size)
    )
    ways = [
        Contender("plain", lambda: (queries @ bank.T).topk(k, dim=1), len(queries)),
        Contender("ours", lambda: nearest(bank, queries, k), len(queries)),
    ]
    if device.type == "cpu":
        # Of unit length, the nearest by Euclidean distance are those by cosine, and scikit-learn is faster at it.
        search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean").fit(bank.numpy())
        ways.append(Contender("scikit-learn, brute force", lambda: search.kneighbors(queries.numpy()), len(queries)))
        if faiss_search := _faiss(bank):
            ways.append(Contender("faiss, flat", lambda: faiss_search(queries, k), len(queries)))
    bounds = [Contender("matrix products", lambda: _products(bank, queries), len(queries))]
    rows = interleave([*ways, *bounds], seconds=config.seconds, device=device)
    facts = {"bank": f"{config.bank_size:,} x {config.feature_dim}", "queries": f"{config.query_size:,}", "k": str(k)}
    return Report("nearest neighbours", "queries/s", rows[: len(ways)], "plain", rows[len(ways) :], facts | machine(device))


def _products(bank: Tensor, queries: Tensor) -> None:
    """All similarities, a tile at a time, none of them kept."""
    for keys in bank.split(8192):  # type: ignore[no-untyped-call]
        queries @ keys.T


def _faiss(bank: Tensor) -> Callable[[Tensor, int], Any] | None:
    """Search in faiss's flat index of inner products; None where faiss is not installed."""
    try:
        import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return lambda queries, k: index.search(queries.numpy(), k)
