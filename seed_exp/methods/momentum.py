"""Contrast with a momentum encoder: what MoCo is, and what DisCo adds to distillation."""

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
    """Each network's momentum encoder and the queue of its keys (arXiv:1911.05722); no network shares anything with another.

    Args:
        students: Networks that are trained, by name.
        temperature: Of InfoNCE.
        momentum: Share of the momentum encoder that each step keeps.
        queue_size: Keys kept as negatives.
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
        """InfoNCE of a network's queries [N, D] and the keys of other views [N, 3, S, S] of their images; these keys [N, D]."""
        keys = self.keys(name, views)
        self._new[name].append(keys)
        return info_nce(
            queries, keys, self._queue(name).embeddings, temperature=self.temperature
        ), keys

    @torch.no_grad()
    def after_step(self, networks: Mapping[str, nn.Module]) -> None:
        """Moves the momentum encoders towards the trained networks (Eq. 2) and enqueues the keys of the global batch."""
        for name, keys in self._new.items():
            if keys:  # otherwise the network did not take part in the step
                encoder, network = self.encoders[name], networks[name]
                torch._foreach_lerp_(
                    list(encoder.parameters()), list(network.parameters()), 1 - self.momentum
                )
                self._queue(name).enqueue(all_gather(torch.cat(keys)))
                keys.clear()

    @torch.no_grad()
    def keys(self, name: str, views: Tensor) -> Tensor:
        """Embeddings of views [N, 3, S, S]; each rank embeds images of all ranks where batch statistics would tell them apart.

        Shuffling BN, arXiv:1911.05722, Section 3.3. In one process there is nobody to exchange images with.
        """
        encoder = self.encoders[name]
        leaks = world_size() > 1 and any(
            isinstance(module, _BatchNorm) for module in encoder.modules()
        )
        if not leaks:
            keys: Tensor = encoder(views)
            return keys
        # The batch's order is random already, so dealing the images out in turn mixes them as well as a random permutation.
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
