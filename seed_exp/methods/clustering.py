"""Clusters of the teacher's embeddings: what the student predicts, in SEED's ablation, in place of similarities.

They are found in the queue, which no student has a part in and which is the same on every rank; so all students of a fleet share
them. Everything here is a product of matrices, whose result is the same in every run, and goes through the queue in chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.schema import ClusteringConfig, KMeansConfig, OnlineClusteringConfig
from seed_exp.engine.distributed import broadcast_buffers
from seed_exp.methods.streaming import chunk_length

LLOYD_ITERATIONS = 5
"""Of k-means, each time that it runs; it goes on from the centroids that it left."""
SINKHORN_ITERATIONS = 3
"""As SwAV, arXiv:2006.09882."""


@torch.no_grad()
def k_means(points: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Lloyd's iterations of k-means for directions: a point belongs to the most similar centroid, which becomes its points' mean.

    A centroid without points moves to the point that is least similar to its own, a second one to the next of these.

    Args:
        points: [K, D], unit length.
        centroids: To begin with [C, D], unit length, at most K.
        iterations: How many.

    Returns:
        [C, D], float32, unit length.
    """
    ranks = torch.arange(len(centroids), device=points.device)
    for _ in range(iterations):
        sums, counts = torch.zeros_like(centroids), centroids.new_zeros(len(centroids))
        similarities = []
        for chunk in torch.split(points, chunk_length(centroids)):
            similarity, nearest = (chunk @ centroids.T).max(1)
            members = (nearest[:, None] == ranks).to(chunk.dtype)
            sums, counts = sums.addmm(members.T, chunk), counts + members.sum(0)
            similarities.append(similarity)
        empty = counts == 0
        strangers = points[torch.cat(similarities).argsort(stable=True)[: len(centroids)]]
        moved = strangers[(empty.cumsum(0) - 1).clamp_min(0)]
        centroids = torch.where(empty[:, None], moved, F.normalize(sums, dim=1))
    return centroids


@torch.no_grad()
def nearest_centroid(embeddings: Tensor, centroids: Tensor) -> Tensor:
    """The most similar of the centroids [C, D] to each embedding [N, D]: [N, D], float32."""
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = torch.split(embeddings.float(), chunk_length(centroids))
        return centroids[torch.cat([(chunk @ centroids.T).argmax(1) for chunk in rows])]


@torch.no_grad()
def balancing_weights(
    points: Tensor, prototypes: Tensor, epsilon: float, iterations: int
) -> Tensor:
    """What to add to the logits x_i . c / epsilon of assignments, so that points on average use all prototypes equally.

    The algorithm of Sinkhorn and Knopp as in SwAV, arXiv:2006.09882, Section 3.1: the columns of exp(x_i . c / epsilon) are
    scaled to equal sums, then the rows, and so on. Kept are the logarithms of the columns' scales: the rows' follow from them,
    for any point.

    Args:
        points: [K, D], unit length.
        prototypes: [C, D], unit length.
        epsilon: > 0; towards 0 the assignments become hard.
        iterations: How often the columns are scaled, at least 1.

    Returns:
        [C], float32.
    """
    weights: Tensor | None = None
    for _ in range(iterations):
        totals = prototypes.new_full((len(prototypes),), -torch.inf)
        for chunk in torch.split(points, chunk_length(prototypes)):
            logits = chunk @ prototypes.T / epsilon
            if weights is not None:
                logits = logits - (logits + weights).logsumexp(1, keepdim=True)
            totals = torch.logaddexp(totals, logits.logsumexp(0))
        weights = -totals
    assert weights is not None
    return weights


@torch.no_grad()
def mean_prototype(
    embeddings: Tensor, prototypes: Tensor, weights: Tensor, epsilon: float
) -> Tensor:
    """sum_c q_ic c with q_i = softmax_c(x_i . c / epsilon + weights_c), of embeddings x [N, D]: [N, D], float32."""
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = torch.split(embeddings.float(), chunk_length(prototypes))
        return torch.cat(
            [_codes(chunk, prototypes, weights, epsilon) @ prototypes for chunk in rows]
        )


def _codes(points: Tensor, prototypes: Tensor, weights: Tensor, epsilon: float) -> Tensor:
    return (points @ prototypes.T / epsilon + weights).softmax(1)


class Clusters(nn.Module):
    """C directions in the teacher's space, which follow the queue.

    They start as random unit vectors drawn from `seed`, the same in every process.

    Args:
        dim: Width D of an embedding.
        config: Number of clusters and how they move.
        seed: Seed of the first directions.
    """

    prototypes: Tensor
    """[C, D], unit length."""

    def __init__(self, dim: int, config: ClusteringConfig, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "prototypes",
            F.normalize(torch.randn(config.num_clusters, dim, generator=generator), dim=1),
        )

    def target(self, teacher: Tensor) -> Tensor:
        """Mean of the prototypes under the distribution that is to be predicted [N, D], of teacher embeddings [N, D]."""
        raise NotImplementedError

    def after_step(self, queue: Tensor) -> None:
        """Follows the queue [K, D], into which the step's embeddings have just gone."""
        raise NotImplementedError


class KMeansClusters(Clusters):
    """Centroids that k-means finds in the queue every `cluster_every` steps; a target is the nearest one."""

    def __init__(self, dim: int, config: KMeansConfig, seed: int) -> None:
        super().__init__(dim, config, seed)
        self.cluster_every = config.cluster_every
        self.step = 0

    def target(self, teacher: Tensor) -> Tensor:
        return nearest_centroid(teacher, self.prototypes)

    def after_step(self, queue: Tensor) -> None:
        self.step += 1
        if self.step % self.cluster_every == 0:
            self.prototypes.copy_(k_means(queue, self.prototypes, LLOYD_ITERATIONS))
            broadcast_buffers(self)

    def get_extra_state(self) -> int:
        """Steps made, which say when k-means runs next."""
        return self.step

    def set_extra_state(self, state: Any) -> None:
        """Takes the number of steps from a checkpoint."""
        self.step = state


class OnlineClusters(Clusters):
    """Prototypes that move every step towards what is assigned to them; a target is an assignment that uses all equally."""

    weights: Tensor
    """[C], what balances the assignments."""

    def __init__(self, dim: int, config: OnlineClusteringConfig, seed: int) -> None:
        super().__init__(dim, config, seed)
        self.epsilon, self.momentum = config.tau_teacher, config.momentum
        self.register_buffer("weights", torch.zeros(config.num_clusters))

    def target(self, teacher: Tensor) -> Tensor:
        return mean_prototype(teacher, self.prototypes, self.weights, self.epsilon)

    @torch.no_grad()
    def after_step(self, queue: Tensor) -> None:
        sums = torch.zeros_like(self.prototypes)
        for chunk in torch.split(queue, chunk_length(self.prototypes)):
            sums.addmm_(_codes(chunk, self.prototypes, self.weights, self.epsilon).T, chunk)
        moved = torch.lerp(F.normalize(sums, dim=1), self.prototypes, self.momentum)
        self.prototypes.copy_(F.normalize(moved, dim=1))
        self.weights.copy_(
            balancing_weights(queue, self.prototypes, self.epsilon, SINKHORN_ITERATIONS)
        )
        broadcast_buffers(self)
