"""k-NN classification of frozen features: no training, only k and a temperature to choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MIB = 2**20
GROUP = 8
"""Number of similarities of a query that are skipped together if their maximum is too small."""


@torch.no_grad()
def nearest(
    bank: Tensor, queries: Tensor, k: int, *, memory: int = 256 * MIB
) -> tuple[Tensor, Tensor]:
    """The k rows of the bank with the largest cosine similarity to each query, nearest first.

    Streams over bank and queries, so the Q x M similarities never exist: a bank of 1.28 M x 512
    float32 values (2.4 GiB) and 50 k queries stay below 4 GiB. Among equal similarities the lower
    index comes first, whatever the chunks; but the last bits of a similarity may depend on the
    chunk size, as those of any matrix product do.

    Args:
        bank: Features [M, D], any length and floating type, on any device; moved to the queries'
            device in chunks.
        queries: Features [Q, D], any length and floating type.
        k: Neighbours per query, 1 <= k <= M.
        memory: Bytes for temporary tensors, in addition to the arguments and the result (12 bytes
            per neighbour).

    Returns:
        Similarities [Q, k], float32 in [-1, 1], and indices into the bank [Q, k], int64; both on
        the queries' device.

    Raises:
        ValueError: k is out of range, the feature widths differ, or a feature is not finite.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank and queries must be [M, D] and [Q, D], "
            f"got {[*bank.shape]} and {[*queries.shape]}"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(
            f"k-NN needs 1 <= k <= size of the bank, got k={k} and {len(bank)} images; "
            "choose a smaller k"
        )
    query_rows, bank_rows = _tile_rows(bank.shape[1], k, memory)
    similarities = torch.full((len(queries), k), -torch.inf, device=queries.device)
    indices = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    blocks = [slice(first, first + query_rows) for first in range(0, len(queries), query_rows)]
    # All tiles share one buffer: fresh memory would cost time.
    buffer = torch.empty(query_rows * bank_rows, device=queries.device)
    for start in range(0, len(bank), bank_rows):
        keys = unit_rows(bank[start : start + bank_rows].to(queries.device))
        for rows in blocks:
            tile = _product(unit_rows(queries[rows]), keys, buffer)
            _improve(similarities[rows], indices[rows], tile, start, at_most=len(buffer) // 4)
    for rows in blocks:
        columns, order = indices[rows].sort(dim=1)
        values, order = (
            similarities[rows].gather(1, order).sort(dim=1, descending=True, stable=True)
        )
        similarities[rows], indices[rows] = values.clamp_(-1, 1), columns.gather(1, order)
    return similarities, indices


def majority_vote(labels: Tensor, num_classes: int) -> Tensor:
    """The most frequent label among each query's neighbours; ties go to the nearest neighbour.

    Args:
        labels: Labels of the neighbours [Q, k] in 0..num_classes-1, nearest first.
        num_classes: Number of classes.

    Returns:
        Predicted labels [Q], int64.
    """
    return _vote(torch.ones_like(labels, dtype=torch.float32), labels, num_classes)


def weighted_vote(
    similarities: Tensor, labels: Tensor, num_classes: int, temperature: float
) -> Tensor:
    """The label with the largest sum of exp(similarity / temperature) over each query's neighbours.

    Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018,
    Section 3.4; also DINO's.

    Args:
        similarities: Cosine similarities of the neighbours [Q, k], nearest first.
        labels: Their labels [Q, k] in 0..num_classes-1.
        num_classes: Number of classes.
        temperature: Greater than 0; towards 0 only the nearest neighbour counts.

    Returns:
        Predicted labels [Q], int64.
    """
    # Relative to the nearest neighbour: the same vote, without the overflow of exp(1 /
    # temperature).
    return _vote(((similarities - similarities[:, :1]) / temperature).exp(), labels, num_classes)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """Share of queries that their neighbours' vote classifies correctly.

    Args:
        bank: Features of the labelled (training) images [M, D].
        bank_labels: Their labels [M], int64 >= 0.
        queries: Features of the images to classify [Q, D].
        query_labels: Their labels [Q], int64 >= 0.
        ks: Numbers of neighbours.
        temperature: Temperature of the weighted vote.

    Returns:
        Top-1 accuracy in percent under `knn{k}_majority` and `knn{k}_weighted` for each k.

    Raises:
        ValueError: an image has no label, there are no queries, a k is out of range, or temperature
            is not positive.
    """
    if not ks or min(ks) < 1 or max(ks) > len(bank):
        raise ValueError(
            f"k-NN compares with {len(bank)} labelled images, "
            f"so each of ks must be from 1 to {len(bank)}, got {[*ks]}; "
            "choose smaller ks or a larger bank"
        )
    if temperature <= 0:
        raise ValueError(f"the temperature of the k-NN vote must be positive, got {temperature}")
    if len(queries) == 0:
        raise ValueError("k-NN has no images to classify; check the validation images of the data")
    for name, labels, features in (("bank", bank_labels, bank), ("query", query_labels, queries)):
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"k-NN needs one label per {name} image, "
                f"got {len(labels)} labels for {len(features)} images"
            )
        if (labels < 0).any():
            raise ValueError(
                f"k-NN needs labels, but {int((labels < 0).sum())} of {len(labels)} {name} "
                "images have none"
            )
    similarities, indices = nearest(bank, queries, max(ks))
    neighbour_labels = bank_labels.to(indices.device)[indices]
    truth = query_labels.to(indices.device)
    num_classes = int(bank_labels.max()) + 1
    results: dict[str, float] = {}
    for k in ks:
        votes = {
            "majority": majority_vote(neighbour_labels[:, :k], num_classes),
            "weighted": weighted_vote(
                similarities[:, :k], neighbour_labels[:, :k], num_classes, temperature
            ),
        }
        for vote, predictions in votes.items():
            results[f"knn{k}_{vote}"] = 100 * int((predictions == truth).sum()) / len(truth)
    return results


def unit_rows(features: Tensor) -> Tensor:
    """Features [n, D] at unit length, float32.

    Raises:
        ValueError: a feature is not finite.
    """
    unit = F.normalize(features.float(), dim=1)
    if unit.sum().isnan():
        raise ValueError("features must be finite, got NaN or infinity: has the training diverged?")
    return unit


def _tile_rows(dim: int, k: int, memory: int) -> tuple[int, int]:
    """Rows of queries and of the bank in a tile whose temporary tensors fit into `memory` bytes.

    The bank's rows are whole groups. At any time, a similarity takes at most 8 bytes, an examined
    similarity (a quarter of them, or all of one query) 56 more, a feature value (as given, in
    float32, normalised) 12, and a neighbour of a query 64.
    """
    query_rows = max(1, min(1024, memory // (4 * (12 * dim + 64 * k))))
    bank_rows = (memory - query_rows * (12 * dim + 64 * k)) // (
        8 * query_rows + 56 * (1 + query_rows // 4) + 12 * dim
    )
    return query_rows, max(1, bank_rows // GROUP) * GROUP


def _product(queries: Tensor, keys: Tensor, buffer: Tensor) -> Tensor:
    """Similarities [Q, M] in `buffer`, padded with -inf to whole groups of columns."""
    columns = -(-len(keys) // GROUP) * GROUP
    tile = buffer[: len(queries) * columns].view(len(queries), columns)
    torch.mm(queries, keys.T, out=tile[:, : len(keys)])
    tile[:, len(keys) :] = -torch.inf
    return tile


def _improve(similarities: Tensor, indices: Tensor, tile: Tensor, start: int, at_most: int) -> None:
    """Updates the k best similarities and indices [Q, k] with the nearer images of a tile.

    Works in place. Only groups whose maximum is large enough are examined.

    Args:
        similarities: Largest similarities in earlier tiles [Q, k].
        indices: Their rows of the bank [Q, k].
        tile: Similarities [Q, M] to the rows of the bank from `start` on.
        start: First row of the tile in the bank.
        at_most: Similarities to examine at once; a single query may exceed it.
    """
    k = similarities.shape[1]
    groups = tile.view(len(tile), GROUP, -1)
    maxima = groups.amax(1)
    # An equal similarity comes later in the bank, so it is not nearer.
    threshold = similarities.amin(1, keepdim=True)
    # The first two tiles have no good threshold yet, but k maxima of groups are k similarities.
    if start <= tile.shape[1]:
        least = (
            torch.cat([similarities, maxima], dim=1)
            .topk(k, dim=1, sorted=False)
            .values.amin(1, keepdim=True)
        )
        threshold = least.nextafter(least.new_tensor(-torch.inf))
    rows, group = (maxima > threshold).nonzero(as_tuple=True)
    if len(tile) > 1 and GROUP * len(rows) > at_most:
        for half in (slice(0, len(tile) // 2), slice(len(tile) // 2, None)):
            _improve(similarities[half], indices[half], tile[half], start, at_most)
    elif len(rows) > 0:
        rows, columns, values = _above(groups, rows, group, threshold)
        changed, values, columns = _padded(similarities, indices, rows, columns.add_(start), values)
        best = _top(values, columns, k)
        similarities[changed], indices[changed] = values.gather(1, best), columns.gather(1, best)


def _above(
    groups: Tensor, rows: Tensor, group: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of each similarity in these groups that exceeds its row's threshold."""
    members = groups[rows, :, group]
    hit, member = (members > threshold[rows]).nonzero(as_tuple=True)
    return rows[hit], group[hit].add_(member, alpha=groups.shape[2]), members[hit, member]


def _padded(
    similarities: Tensor, indices: Tensor, rows: Tensor, columns: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with candidates [R]; values and columns [R, k + most] of their best, then candidates.

    Missing candidates have the value -inf.
    """
    changed, row, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
    slots = (
        torch.arange(len(rows), device=rows.device)
        .sub_((counts.cumsum(0) - counts)[row])
        .add_(similarities.shape[1])
    )
    most = int(counts.max())
    all_values = F.pad(similarities[changed], (0, most), value=-torch.inf)
    all_columns = F.pad(indices[changed], (0, most))
    all_values[row, slots] = values
    all_columns[row, slots] = columns
    return changed, all_values, all_columns


def _top(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """Positions [R, k] of the k largest values of each row [R, n], in any order.

    Among equal values, those with the lower `indices` are taken.
    """
    best, positions = values.topk(k, dim=1, sorted=False)
    last = best.amin(1, keepdim=True)
    tied = ((values >= last).sum(1) > k).nonzero()[:, 0]
    if len(tied):  # topk took any of the values that equal the k-th
        values, last = values[tied], last[tied]
        keys = (
            indices[tied]
            .neg_()
            .masked_fill_(values > last, 1)
            .masked_fill_(values < last, -(2**62))
        )
        positions[tied] = keys.topk(k, dim=1, sorted=False).indices
    return positions


def _vote(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    predictions = torch.empty(len(labels), dtype=torch.int64, device=labels.device)
    # In parts, as the scores of all queries would be gigabytes for ImageNet-21k.
    rows = max(1, 64 * MIB // (4 * num_classes))
    for first in range(0, len(labels), rows):
        label = labels[first : first + rows]
        scores = weights.new_zeros(len(label), num_classes).scatter_add_(
            1, label, weights[first : first + rows]
        )
        # Looked up per neighbour, nearest first; argmax returns the first of equal scores.
        winner = scores.gather(1, label).argmax(dim=1, keepdim=True)
        predictions[first : first + rows] = label.gather(1, winner)[:, 0]
    return predictions
