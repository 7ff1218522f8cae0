"""Clusters of the teacher's embeddings, which the student predicts instead of similarities.

This is an ablation of SEED. The clusters are found in the queue. The queue does not depend on any
student and is the same on every rank, so all students of a fleet share the clusters. All work here
is matrix products over chunks of the queue, whose result is the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.schema import ObjectiveConfig
from seed_exp.engine.distributed import broadcast_buffers
from seed_exp.methods.streaming import chunk_length

LLOYD_ITERATIONS = 5
"""Iterations of k-means each time it runs; it starts from the centroids of its last run."""
SINKHORN_ITERATIONS = 3
"""Iterations of the Sinkhorn-Knopp algorithm, as in SwAV, arXiv:2006.09882."""


@torch.no_grad()
def k_means(points: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Centroids of unit vectors after some of Lloyd's iterations of k-means.

    Each iteration assigns a point to its most similar centroid, and moves a centroid to the mean
    direction of its points. A centroid without points moves to the point that is least similar to
    the centroid it was assigned to; a second one moves to the next such point, and so on.

    Args:
        points: Vectors to cluster [K, D], unit length.
        centroids: Centroids to start from [C, D], unit length; C is at most K.
        iterations: Number of iterations.

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
    """Returns each embedding's [N, D] most similar centroid of [C, D], as [N, D], float32."""
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = torch.split(embeddings.float(), chunk_length(centroids))
        return centroids[torch.cat([(chunk @ centroids.T).argmax(1) for chunk in rows])]


@torch.no_grad()
def balancing_weights(
    points: Tensor, prototypes: Tensor, epsilon: float, iterations: int
) -> Tensor:
    """Offsets of the logits x_i . c / epsilon with which points use all prototypes equally.

    Sinkhorn-Knopp as in SwAV, arXiv:2006.09882, Section 3.1: the columns of exp(x_i . c / epsilon)
    are scaled to equal sums, then the rows, and so on. Only the logarithms of the columns' scales
    are returned, because for any point the scale of its row follows from them.

    Args:
        points: Vectors to assign [K, D], unit length.
        prototypes: Vectors to which they are assigned [C, D], unit length.
        epsilon: Temperature > 0 of the assignments; towards 0 they become hard.
        iterations: Number of times that the columns are scaled, at least 1.

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
    """Mean of the prototypes under each embedding's soft assignment.

    sum_c q_ic c with q_i = softmax_c(x_i . c / epsilon + weights_c).

    Args:
        embeddings: Vectors x to assign [N, D], unit length.
        prototypes: Vectors c to which they are assigned [C, D], unit length.
        weights: Offsets of the logits [C], from `balancing_weights`.
        epsilon: Temperature > 0 of the assignments.

    Returns:
        [N, D], float32, of length up to 1.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = torch.split(embeddings.float(), chunk_length(prototypes))
        return torch.cat(
            [_codes(chunk, prototypes, weights, epsilon) @ prototypes for chunk in rows]
        )


def _codes(points: Tensor, prototypes: Tensor, weights: Tensor, epsilon: float) -> Tensor:
    return (points @ prototypes.T / epsilon + weights).softmax(1)


class Clusters(nn.Module):
    """C unit vectors in the space of the teacher's embeddings, which follow the queue.

    They start as random vectors drawn from `seed`, the same in every process.

    Args:
        dim: Width D of an embedding.
        config: Number of clusters C and the options that say how they move.
        seed: Seed of the initial vectors.

    Raises:
        ValueError: there are more clusters than the queue has entries.
    """

    prototypes: Tensor
    """The vectors [C, D], unit length."""

    def __init__(self, dim: int, config: ObjectiveConfig, seed: int) -> None:
        super().__init__()
        if config.num_clusters > config.queue_size:
            raise ValueError(
                f"objective.num_clusters={config.num_clusters} exceeds objective.queue_size="
                f"{config.queue_size}, in which they are found; lower the first or raise the second"
            )
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "prototypes",
            F.normalize(torch.randn(config.num_clusters, dim, generator=generator), dim=1),
        )

    def target(self, teacher: Tensor) -> Tensor:
        """Mean of the prototypes under the distribution that the student is to predict.

        Args:
            teacher: Teacher embeddings [N, D], unit length.

        Returns:
            [N, D], float32, of length up to 1.
        """
        raise NotImplementedError

    def after_step(self, queue: Tensor) -> None:
        """Moves the prototypes after the step's embeddings went into the queue [K, D]."""
        raise NotImplementedError


class KMeansClusters(Clusters):
    """Centroids that k-means finds in the queue every `config.cluster_every` steps.

    The target of an embedding is its nearest centroid.
    """

    def __init__(self, dim: int, config: ObjectiveConfig, seed: int) -> None:
        super().__init__(dim, config, seed)
        self.step = 0

    def target(self, teacher: Tensor) -> Tensor:
        return nearest_centroid(teacher, self.prototypes)

    def after_step(self, queue: Tensor) -> None:
        self.step += 1
        if self.step % self.config.cluster_every == 0:
            self.prototypes.copy_(k_means(queue, self.prototypes, LLOYD_ITERATIONS))
            broadcast_buffers(self)

    def get_extra_state(self) -> int:
        """Number of steps made, from which follows when k-means runs next."""
        return self.step

    def set_extra_state(self, state: Any) -> None:
        """Takes the number of steps from a checkpoint."""
        self.step = state


class OnlineClusters(Clusters):
    """Prototypes that move every step towards the embeddings assigned to them.

    The target of an embedding is its soft assignment, balanced so that all prototypes are used
    equally.
    """

    weights: Tensor
    """Offsets [C] of the logits that balance the assignments."""

    def __init__(self, dim: int, config: ObjectiveConfig, seed: int) -> None:
        super().__init__(dim, config, seed)
        self.register_buffer("weights", torch.zeros(config.num_clusters))

    def target(self, teacher: Tensor) -> Tensor:
        return mean_prototype(teacher, self.prototypes, self.weights, self.config.tau_teacher)

    @torch.no_grad()
    def after_step(self, queue: Tensor) -> None:
        epsilon = self.config.tau_teacher
        sums = torch.zeros_like(self.prototypes)
        for chunk in torch.split(queue, chunk_length(self.prototypes)):
            sums.addmm_(_codes(chunk, self.prototypes, self.weights, epsilon).T, chunk)
        moved = torch.lerp(F.normalize(sums, dim=1), self.prototypes, self.config.momentum)
        self.prototypes.copy_(F.normalize(moved, dim=1))
        self.weights.copy_(balancing_weights(queue, self.prototypes, epsilon, SINKHORN_ITERATIONS))
        broadcast_buffers(self)
