"""k-NN classification of frozen features: no training, no hyper-parameter but k (and a temperature)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MIB = 2**20


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int, *, memory: int = 256 * MIB) -> tuple[Tensor, Tensor]:
    """The k rows of the bank with the largest cosine similarity to each query, nearest first.

    Streams over bank and queries, so the Q x M similarities never exist: a bank of 1.28 M x 512 float32 values (2.4 GiB) and
    50 k queries stay below 4 GiB. Among equal similarities the lower index comes first, whatever the chunks; but the last
    bits of a similarity may depend on the chunk size, as those of any matrix product do.

    Args:
        bank: Features [M, D], any length and floating type, on any device; moved to the queries' device in chunks.
        queries: Features [Q, D], any length and floating type.
        k: Neighbours per query, 1 <= k <= M.
        memory: Bytes for temporary tensors, beside the arguments and the result (12 bytes per neighbour).

    Returns:
        Similarities [Q, k], float32 in [-1, 1], and indices into the bank [Q, k], int64; both on the queries' device.

    Raises:
        ValueError: k is out of range, the feature widths differ, or a feature is not finite.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank and queries must be [M, D] and [Q, D], got {[*bank.shape]} and {[*queries.shape]}")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k-NN needs 1 <= k <= size of the bank, got k={k} and {len(bank)} images; choose a smaller k")
    query_rows, bank_rows = _chunk_rows(bank.shape[1], k, memory)
    similarities = torch.full((len(queries), k), -torch.inf, device=queries.device)
    indices = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), bank_rows):
        keys = _unit(bank[start : start + bank_rows].to(queries.device))
        for first in range(0, len(queries), query_rows):
            rows = slice(first, first + query_rows)
            values, columns = _top(_unit(queries[rows]) @ keys.T, min(k, len(keys)))
            # Earlier chunks hold lower indices and stand first, so a stable sort keeps the lower index in front.
            values = torch.cat([similarities[rows], values], dim=1)
            columns = torch.cat([indices[rows], columns + start], dim=1)
            values, order = values.sort(dim=1, descending=True, stable=True)
            similarities[rows] = values[:, :k]
            indices[rows] = columns.gather(1, order[:, :k])
    if similarities.isnan().any():  # NaN sorts above every number, so one in the bank reaches every result
        raise ValueError("features must be finite, got NaN or infinity: has the training diverged?")
    return similarities.clamp_(-1, 1), indices


def majority_vote(labels: Tensor, num_classes: int) -> Tensor:
    """The most frequent label among each query's neighbours; of tied classes, the one with the nearest neighbour.

    Args:
        labels: Labels of the neighbours [Q, k] in 0..num_classes-1, nearest first.
        num_classes: Number of classes.

    Returns:
        Predicted labels [Q], int64.
    """
    return _vote(torch.ones_like(labels, dtype=torch.float32), labels, num_classes)


def weighted_vote(similarities: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """The label with the largest sum of exp(similarity / temperature) over each query's neighbours.

    Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018, Section 3.4; also DINO's.

    Args:
        similarities: Cosine similarities of the neighbours [Q, k], nearest first.
        labels: Their labels [Q, k] in 0..num_classes-1.
        num_classes: Number of classes.
        temperature: Greater than 0; towards 0 only the nearest neighbour counts.

    Returns:
        Predicted labels [Q], int64.
    """
    # Relative to the nearest one: the same vote, without the overflow of exp(1 / temperature).
    return _vote(((similarities - similarities[:, :1]) / temperature).exp(), labels, num_classes)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, *, ks: Sequence[int], temperature: float
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
        ValueError: an image has no label, there are no queries, a k is out of range, or temperature is not positive.
    """
    if not ks or min(ks) < 1 or max(ks) > len(bank):
        raise ValueError(
            f"k-NN compares with {len(bank)} labelled images, so each of ks must be from 1 to {len(bank)}, got {[*ks]}; "
            "choose smaller ks or a larger bank"
        )
    if temperature <= 0:
        raise ValueError(f"the temperature of the k-NN vote must be positive, got {temperature}")
    if len(queries) == 0:
        raise ValueError("k-NN has no images to classify; check the validation images of the data")
    for name, labels, features in (("bank", bank_labels, bank), ("query", query_labels, queries)):
        if labels.shape != features.shape[:1]:
            raise ValueError(f"k-NN needs one label per {name} image, got {len(labels)} labels for {len(features)} images")
        if (labels < 0).any():
            raise ValueError(f"k-NN needs labels, but {int((labels < 0).sum())} of {len(labels)} {name} images have none")
    similarities, indices = nearest(bank, queries, max(ks))
    neighbour_labels = bank_labels.to(indices.device)[indices]
    truth = query_labels.to(indices.device)
    num_classes = int(bank_labels.max()) + 1
    results: dict[str, float] = {}
    for k in ks:
        votes = {
            "majority": majority_vote(neighbour_labels[:, :k], num_classes),
            "weighted": weighted_vote(similarities[:, :k], neighbour_labels[:, :k], num_classes, temperature),
        }
        for vote, predictions in votes.items():
            results[f"knn{k}_{vote}"] = 100 * int((predictions == truth).sum()) / len(truth)
    return results


def _chunk_rows(dim: int, k: int, memory: int) -> tuple[int, int]:
    """Rows of queries and of the bank for which all temporaries of one chunk fit into `memory` bytes.

    At most 24 bytes live at once per similarity (values, masks and keys of ties, what the allocator wastes), 12 per feature
    value (as given, in float32, normalised) and 64 per neighbour of a query (merge).
    """
    query_rows = max(1, min(256, memory // (4 * (12 * dim + 64 * k))))
    bank_rows = max(1, (memory - query_rows * (12 * dim + 64 * k)) // (24 * query_rows + 12 * dim))
    return query_rows, bank_rows


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


def _top(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row [Q, M] and their columns, by column; of equal values the lower columns are taken."""
    values, columns = similarities.topk(min(k + 1, similarities.shape[1]), dim=1)
    last, columns = values[:, k - 1 : k], columns[:, :k]
    tied = (values[:, k:] == last).any(dim=1).nonzero()[:, 0]
    if len(tied):  # topk takes any of the values that equal the k-th; take the first of them
        rows, last = similarities[tied], last[tied]
        positions = torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype)
        keys = torch.where(rows == last, -positions, -torch.inf).masked_fill_(rows > last, 1.0)
        columns[tied] = keys.topk(k, dim=1, sorted=False).indices
    columns = columns.sort(dim=1).values
    return similarities.gather(1, columns), columns


def _vote(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    predictions = torch.empty(len(labels), dtype=torch.int64, device=labels.device)
    rows = max(1, 64 * MIB // (4 * num_classes))  # scores of all queries at once would be gigabytes for ImageNet-21k
    for first in range(0, len(labels), rows):
        label = labels[first : first + rows]
        scores = weights.new_zeros(len(label), num_classes).scatter_add_(1, label, weights[first : first + rows])
        # Looked up per neighbour, nearest first; argmax returns the first of equal scores.
        winner = scores.gather(1, label).argmax(dim=1, keepdim=True)
        predictions[first : first + rows] = label.gather(1, winner)[:, 0]
    return predictions
