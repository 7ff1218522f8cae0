"""Contrast with a momentum encoder, as in MoCo; DisCo adds it to distillation."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seed_exp.engine.distributed import all_gather, rank, world_size
from seed_exp.methods.losses import info_nce
from seed_exp.methods.queue import Queue
from seed_exp.models.students import Student


class MomentumContrast(nn.Module):
    """A momentum encoder and a queue of its keys for each network (arXiv:1911.05722).

    Networks share nothing with each other.

    Args:
        students: Networks that are trained, by name.
        temperature: Temperature > 0 of InfoNCE.
        momentum: Share of the momentum encoder's old weights that each step keeps, from 0 to 1.
        queue_size: Number of keys kept as negatives.
        seed: Seed of the queues' initial vectors.
    """

    def __init__(
        self,
        students: Mapping[str, Student],
        *,
        temperature: float,
        momentum: float,
        queue_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.encoders = nn.ModuleDict(
            {
                name: copy.deepcopy(student).requires_grad_(False)
                for name, student in students.items()
            }
        )
        self.queues = nn.ModuleDict(
            {
                name: Queue(queue_size, student.embedding_dim, seed)
                for name, student in students.items()
            }
        )
        self._new: dict[str, list[Tensor]] = {name: [] for name in students}

    def loss(self, name: str, queries: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Returns InfoNCE in nats and the keys [N, D].

        Args:
            name: Name of the network.
            queries: The network's embeddings [N, D], unit length.
            views: Other views of the same images [N, 3, S, S], of which the keys are made.
        """
        keys = self.keys(name, views)
        self._new[name].append(keys)
        return info_nce(
            queries, keys, self._queue(name).embeddings, temperature=self.temperature
        ), keys

    @torch.no_grad()
    def after_step(self, networks: Mapping[str, nn.Module]) -> None:
        """Moves the momentum encoders towards the trained networks and enqueues the step's keys.

        arXiv:1911.05722, Eq. 2. The keys of the global batch are enqueued, those of all ranks.
        """
        for name, keys in self._new.items():
            if keys:  # otherwise the network took no part in the step
                encoder, network = self.encoders[name], networks[name]
                torch._foreach_lerp_(
                    list(encoder.parameters()), list(network.parameters()), 1 - self.momentum
                )
                self._queue(name).enqueue(all_gather(torch.cat(keys)))
                keys.clear()

    @torch.no_grad()
    def keys(self, name: str, views: Tensor) -> Tensor:
        """Returns the momentum encoder's embeddings [N, D] of views [N, 3, S, S].

        If the encoder has batch norm, each rank embeds images of all ranks, so that batch
        statistics do not give away which key belongs to a query: shuffling BN, arXiv:1911.05722,
        Section 3.3. A single process has no other rank to exchange images with.
        """
        encoder = self.encoders[name]
        leaks = world_size() > 1 and any(
            isinstance(module, _BatchNorm) for module in encoder.modules()
        )
        if not leaks:
            keys: Tensor = encoder(views)
            return keys
        # The order of the batch is random already, so dealing the images out in turn mixes them as
        # well as a random permutation.
        dealt = all_gather(views)[rank() :: world_size()]
        embeddings = all_gather(encoder(dealt)).view(world_size(), len(views), -1)
        return embeddings.transpose(0, 1).flatten(0, 1)[
            rank() * len(views) : (rank() + 1) * len(views)
        ]

    def compile_encoders(self) -> None:
        """Compiles the momentum encoders."""
        for encoder in self.encoders.values():
            encoder.compile(dynamic=False)

    def _queue(self, name: str) -> Queue:
        queue = self.queues[name]
        assert isinstance(queue, Queue)
        return queue
