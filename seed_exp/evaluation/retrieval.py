"""Retrieval: how high a gallery's images of a query's class stand among all of its images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seed_exp.evaluation.votes import MIB, unit_rows

Images = Callable[[int, int], Tensor]
"""Features of a part of the gallery, sorted by class, at unit length: from, to -> [n, D]."""


class Retrieved(NamedTuple):
    """Numbers of a set of queries."""

    measures: dict[str, float]
    """`map` and `recall<k>` for each k, in percent."""
    num_queries: int
    """Queries that they are means over: those of a class that the gallery shows."""


@torch.no_grad()
def retrieval(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    ks: Sequence[int],
    own: Tensor | None = None,
    memory: int = 256 * MIB,
) -> Retrieved:
    """Mean average precision and recall@k of a search by cosine similarity.

    A gallery image is relevant if it has the query's class. With the gallery sorted by similarity
    and r_1 < r_2 < ... < r_n the ranks of the n relevant images, from 1, a query's average
    precision is the mean over i of i / r_i, and it counts for recall@k if r_1 <= k. Among equal
    similarities, images of other classes stand first: an encoder that gives all images the same
    feature gets no credit for the order of the files.

    Streams over queries and gallery, so the Q x M similarities never exist. No row is sorted as a
    whole: r_i is i plus the number of images of other classes that are not less similar, and those
    are counted tile by tile.

    Args:
        gallery: Features [M, D], any length.
        gallery_labels: Their classes [M], int64.
        queries: Features [Q, D], any length.
        query_labels: Their classes [Q], int64.
        ks: Numbers of images that recall looks at, each at least 1.
        own: Row of the gallery [Q] that is the query itself and does not count for it; None = the
            gallery has none of the queries.
        memory: Bytes for temporary tensors; those of a single query may exceed it.

    Returns:
        Means over the queries that have a relevant image.

    Raises:
        ValueError: no query has one, or a feature is not finite.
    """
    device = queries.device
    gallery_labels, query_labels = gallery_labels.to(device), query_labels.to(device)
    # Sorted by class: the relevant images of a query are a slice, and queries of a block have few
    # different numbers of them.
    order, query_order = gallery_labels.argsort(stable=True), query_labels.argsort(stable=True)
    sorted_labels = gallery_labels[order]

    def images(start: int, end: int) -> Tensor:
        return unit_rows(gallery[order[start:end].to(gallery.device)].to(device))

    starts = torch.searchsorted(sorted_labels, query_labels)
    ends = torch.searchsorted(sorted_labels, query_labels, right=True)
    if own is not None:
        own = order.argsort()[own.to(device)]
    num_relevant = ends - starts - (0 if own is None else 1)
    answerable = query_order[num_relevant[query_order] > 0]
    if len(answerable) == 0:
        raise ValueError(
            "retrieval has nothing to find: no query has another image of its class in the gallery"
        )
    precision = torch.zeros((), dtype=torch.float64, device=device)
    hits = torch.zeros(len(ks), dtype=torch.float64, device=device)
    for rows in _blocks(answerable, ends - starts, memory):
        keys = unit_rows(queries[rows])
        relevant = _relevant(
            keys, images, starts[rows], ends[rows], None if own is None else own[rows]
        )
        above = _num_above(keys, relevant, images, sorted_labels, query_labels[rows], memory)
        number = torch.arange(1, relevant.shape[1] + 1, device=device)
        counted = number <= num_relevant[rows, None]
        share = torch.where(counted, number / (number + above).double(), 0)
        precision += (share.sum(1) / num_relevant[rows]).sum()
        hits += (above[:, :1] + 1 <= torch.tensor(ks, device=device)).sum(0)
    num = len(answerable)
    recall = {f"recall{k}": 100 * hit / num for k, hit in zip(ks, hits.tolist(), strict=True)}
    return Retrieved({"map": 100 * precision.item() / num, **recall}, num)


_EQUAL = 1e-6
"""Difference up to which similarities are equal: products of other shapes round differently."""


def _blocks(order: Tensor, lengths: Tensor, memory: int) -> Iterator[Tensor]:
    """Queries in blocks whose relevant similarities take at most a quarter of the memory."""
    # A relevant similarity takes at most 40 bytes here: values, sorted, counts and shares.
    longest = lengths[order]
    start = 0
    while start < len(order):
        size = 1024
        while size > 1 and 160 * size * int(longest[start : start + size].max()) > memory:
            size //= 2
        yield order[start : start + size]
        start += size


def _relevant(
    keys: Tensor, images: Images, starts: Tensor, ends: Tensor, own: Tensor | None
) -> Tensor:
    """Similarities [b, R] of a block's queries to the images of their class, largest first.

    -inf where a class has fewer than R images, and for the query itself.
    """
    found = keys.new_full((len(keys), int((ends - starts).max())), -torch.inf)
    _, counts = torch.unique_consecutive(starts, return_counts=True)
    first = 0
    for count in counts.tolist():
        start, end = int(starts[first]), int(ends[first])
        mine = slice(first, first + count)
        found[mine, : end - start] = keys[mine] @ images(start, end).T
        first += count
    if own is not None:
        found.scatter_(1, (own - starts)[:, None], -torch.inf)
    return found.sort(dim=1, descending=True).values


def _num_above(
    keys: Tensor,
    relevant: Tensor,
    images: Images,
    gallery_labels: Tensor,
    labels: Tensor,
    memory: int,
) -> Tensor:
    """Number of images of other classes at least as similar as each relevant one: int64 [b, R]."""
    ascending = (relevant - _EQUAL).flip(1).contiguous()
    beaten = torch.zeros((len(keys), relevant.shape[1] + 1), dtype=torch.int64, device=keys.device)
    # A similarity takes at most 24 bytes: its value, what it is compared with, its position.
    columns = max(1, memory // (2 * (24 * len(keys) + 12 * keys.shape[1])))
    for start in range(0, len(gallery_labels), columns):
        same_class = labels[:, None] == gallery_labels[None, start : start + columns]
        tile = (keys @ images(start, start + columns).T).masked_fill_(same_class, -torch.inf)
        # How many relevant images are not more similar: those stand behind this one. Only
        # missing ones do behind -inf.
        position = torch.searchsorted(ascending, tile, right=True)
        beaten.scatter_add_(1, position, torch.ones_like(position))
    # An image that stands before p of them stands before the p least similar.
    return beaten[:, 1:].flip(1).cumsum(1)
