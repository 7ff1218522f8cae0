"""MoCo-V2: contrastive learning with a momentum encoder, the paper's baseline without a teacher and a way to make teachers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seed_exp.config.schema import MocoConfig
from seed_exp.engine.distributed import all_gather, rank, world_size
from seed_exp.methods.losses import info_nce
from seed_exp.methods.queue import Queue
from seed_exp.methods.spread import effective_rank, embedding_std
from seed_exp.models.students import Student
from seed_exp.views.recipe import HostBatch


class Moco(nn.Module):
    """Each network learns to find its momentum encoder's embedding of the other view among a queue (arXiv:1911.05722).

    Args:
        students: Networks to train, by name; each has its own momentum encoder and queue.
        config: Temperature, momentum, queue size.
        seed: Seed of the queues' initial vectors.
    """

    def __init__(self, students: dict[str, Student], config: MocoConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.trainable: dict[str, nn.Module] = dict(students)
        self.encoders = {name: copy.deepcopy(student).requires_grad_(False) for name, student in students.items()}
        self.queues = {name: Queue(config.queue_size, student.embedding_dim, seed) for name, student in students.items()}
        self.carried: nn.Module = nn.ModuleDict({"encoders": nn.ModuleDict(self.encoders), "queues": nn.ModuleDict(self.queues)})
        self._new: dict[str, list[Tensor]] = {name: [] for name in students}
        self._seen: dict[str, Tensor] = {}

    def prepare(self, views: dict[str, Tensor], batch: HostBatch) -> Tensor:  # noqa: ARG002
        """The two global views [2, N, 3, S, S] of each image, the query's and the key's."""
        return views["global"]

    def loss(self, name: str, network: nn.Module, views: Tensor) -> dict[str, Tensor]:
        """InfoNCE, the mean cosine between a query and its key, and the queries' std."""
        queries = network(views[0])
        keys = self._keys(self.encoders[name], views[1])
        self._new[name].append(keys)
        loss = info_nce(queries, keys, self.queues[name].embeddings, temperature=self.config.temperature)
        self._seen[name] = queries.detach()
        cosine = (queries.detach() * keys).sum(1).mean()
        return {"loss": loss, "positive_cosine": cosine, "embedding_std": embedding_std(queries)}

    def compile_shared(self) -> None:
        """Compiles the momentum encoders."""
        for encoder in self.encoders.values():
            encoder.compile(dynamic=False)

    def rehearsal(self) -> Moco:
        """A copy, to try out a step that leaves no trace."""
        return copy.deepcopy(self)

    def diagnostics(self, views: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """The effective rank of each network's queries."""
        return {f"{name}/embedding_rank": effective_rank(queries) for name, queries in self._seen.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the momentum encoders towards the trained networks (Eq. 2) and enqueues the keys of the global batch."""
        for name, keys in self._new.items():
            if keys:  # otherwise the network did not take part in the step
                encoder, network = self.encoders[name], self.trainable[name]
                torch._foreach_lerp_(list(encoder.parameters()), list(network.parameters()), 1 - self.config.momentum)
                self.queues[name].enqueue(all_gather(torch.cat(keys)))
                keys.clear()
        self._seen.clear()

    @torch.no_grad()
    def _keys(self, encoder: nn.Module, views: Tensor) -> Tensor:
        """Embeddings of views [N, 3, S, S]; each rank embeds images of all ranks where batch statistics would tell them apart.

        Shuffling BN, arXiv:1911.05722, Section 3.3. In one process there is nobody to exchange images with.
        """
        leaks = world_size() > 1 and any(isinstance(module, _BatchNorm) for module in encoder.modules())
        if not leaks:
            keys: Tensor = encoder(views)
            return keys
        # The batch's order is random already, so dealing the images out in turn mixes them as well as a random permutation.
        dealt = all_gather(views)[rank() :: world_size()]
        embeddings = all_gather(encoder(dealt)).view(world_size(), len(views), -1)
        return embeddings.transpose(0, 1).flatten(0, 1)[rank() * len(views) : (rank() + 1) * len(views)]
