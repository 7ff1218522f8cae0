"""MoCo-V2: contrastive learning with a momentum encoder.

It is the paper's baseline without a teacher, and a way to train teachers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from seed_exp.config.schema import MocoConfig, Precision
from seed_exp.engine.method import Method
from seed_exp.methods.collapse import effective_rank, embedding_std
from seed_exp.methods.grouped import forward_in_groups
from seed_exp.methods.momentum import MomentumContrast
from seed_exp.models.students import Student
from seed_exp.views.recipe import HostBatch


class Moco(Method):
    """Networks that each learn to find their momentum encoder's embedding of another view.

    It is to be found among a queue of such embeddings of other images (MoCo, arXiv:1911.05722).

    Args:
        students: Networks to train, by name; each has its own momentum encoder and queue.
        config: Temperature, momentum, queue size, groups of batch norm.
        seed: Seed of the queues' initial vectors.
    """

    def __init__(self, students: dict[str, Student], config: MocoConfig, seed: int) -> None:
        super().__init__()
        self.trainable = dict(students)
        self.contrast = MomentumContrast(
            students,
            temperature=config.temperature,
            momentum=config.momentum,
            queue_size=config.queue_length,
            bn_group_size=config.bn_group_size,
            seed=seed,
        )
        self.carried = self.contrast
        self._seen: dict[str, Tensor] = {}

    def prepare(self, views: dict[str, Tensor], batch: HostBatch) -> Tensor:  # noqa: ARG002
        """Returns two global views [2, N, 3, S, S] of each image, the query's and the key's."""
        return views["global"]

    def loss(self, name: str, network: nn.Module, views: Tensor) -> dict[str, Tensor]:
        """Returns InfoNCE, the mean cosine of a query and its key, and the std of the queries."""
        queries = forward_in_groups(network, views[0], self.contrast.bn_group_size)
        loss, keys = self.contrast.loss(name, queries, views[1])
        self._seen[name] = queries.detach()
        cosine = (queries.detach() * keys).sum(1).mean()
        return {"loss": loss, "positive_cosine": cosine, "embedding_std": embedding_std(queries)}

    def compile_shared(self) -> None:
        """Compiles the momentum encoders."""
        self.contrast.compile_encoders()

    def compute_in(self, formats: Mapping[str, Precision]) -> None:
        """Gives networks formats of their own, momentum encoders included."""
        super().compute_in(formats)
        self.contrast.compute_in(formats)

    def diagnostics(self, views: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns the effective rank of each network's queries."""
        return {
            f"{name}/embedding_rank": effective_rank(queries)
            for name, queries in self._seen.items()
        }

    def after_step(self) -> None:
        """Moves the momentum encoders and enqueues the keys of the global batch."""
        self.contrast.after_step(self.trainable)
        self._seen.clear()
