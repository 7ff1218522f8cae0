"""Contrast with a momentum encoder, as in MoCo; DisCo adds it to distillation."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from seed_exp.base.network_names import keys_of
from seed_exp.config.schema import Precision
from seed_exp.engine.distributed import all_gather, exchange, rank, world_size
from seed_exp.methods.grouped import forward_in_groups, has_batch_norm, number_of_groups
from seed_exp.methods.losses import info_nce
from seed_exp.methods.queue import Queue
from seed_exp.models.students import Student
from seed_exp.models.teacher_precision import callers_dtype, computing_in, torch_format


class MomentumContrast(nn.Module):
    """A momentum encoder and a queue of its keys for each network (arXiv:1911.05722).

    Networks share nothing with each other.

    Args:
        students: Networks that are trained, by name.
        temperature: Temperature > 0 of InfoNCE.
        momentum: Share of the momentum encoder's old weights that each step keeps, from 0 to 1.
        queue_size: Number of keys kept as negatives.
        bn_group_size: Images of a group that is normalised by its own statistics; None = those of a
            process are one group.
        seed: Seed of the queues' initial vectors.
    """

    def __init__(
        self,
        students: Mapping[str, Student],
        *,
        temperature: float,
        momentum: float,
        queue_size: int,
        bn_group_size: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.bn_group_size = bn_group_size
        self.encoders = nn.ModuleDict(
            {
                name: copy.deepcopy(student).requires_grad_(False).train()
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
        self.formats: dict[str, torch.dtype] = {}
        """Momentum encoders that do not compute in the caller's format."""

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

        If the encoder has batch norm, the images of all ranks are dealt out to the groups in which
        it normalises them, so that batch statistics do not give away which key belongs to a query:
        shuffling BN, arXiv:1911.05722, Section 3.3. The groups depend on the global batch and the
        size of a group alone, not on the number of ranks.
        """
        device = views.device.type
        with computing_in(self.formats.get(name, callers_dtype(device)), device):
            return self._keys(self.encoders[name], views)

    def _keys(self, encoder: nn.Module, views: Tensor) -> Tensor:
        num, ranks = len(views), world_size()
        num_groups = ranks * number_of_groups(num, self.bn_group_size)
        if num_groups == 1 or not has_batch_norm(encoder):
            keys: Tensor = encoder(views)
            return keys
        images = dealt_out(views, num_groups)
        gathered = all_gather(forward_in_groups(encoder, images, self.bn_group_size))
        dealt = _places(ranks * num, num_groups, views.device)
        own = slice(rank() * num, (rank() + 1) * num)
        return torch.empty_like(gathered).index_copy_(0, dealt, gathered)[own]

    def compute_in(self, formats: Mapping[str, Precision]) -> None:
        """Gives momentum encoders formats of their own, as `Method.compute_in` does."""
        self.formats = {
            name: torch_format(formats[keys_of(name)])
            for name in self.encoders
            if keys_of(name) in formats
        }

    def compile_encoders(self) -> None:
        """Compiles the momentum encoders."""
        for encoder in self.encoders.values():
            encoder.compile(dynamic=False)

    def _queue(self, name: str) -> Queue:
        queue = self.queues[name]
        assert isinstance(queue, Queue)
        return queue


@torch.no_grad()
def dealt_out(images: Tensor, num_groups: int) -> Tensor:
    """This rank's share [N, ...] of all ranks' images, dealt out in turn to groups of equal size.

    The order of the batch is random already, so dealing the images out in turn mixes them as well
    as a random permutation. Each rank gets only the images that it needs.

    Args:
        images: Images of this rank [N, ...].
        num_groups: Groups of all ranks together, which follow one another.
    """
    num, ranks = len(images), world_size()
    own = slice(rank() * num, (rank() + 1) * num)
    dealt = _places(ranks * num, num_groups, images.device)
    if ranks == 1:
        return images[dealt]
    # On the device: the images in the order in which they are sent, and then are wanted.
    sent = torch.argsort(torch.argsort(dealt)[own])
    wanted = torch.argsort(torch.argsort(dealt[own] // num, stable=True))
    # On the host: how many there are. To ask the device would wait for it.
    on_host = _places(ranks * num, num_groups, torch.device("cpu"))
    to, of = (
        torch.bincount(places[own] // num, minlength=ranks).tolist()
        for places in (torch.argsort(on_host), on_host)
    )
    return exchange(images[sent], to, of)[wanted]


def _places(num: int, num_groups: int, device: torch.device) -> Tensor:
    """Numbers [num] of the images, those of the first group first."""
    return torch.argsort(torch.arange(num, device=device) % num_groups, stable=True)
