"""Exponential moving averages of networks that are trained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

log = logging.getLogger("seed_exp")

LARGEST_REST = 0.01
"""Share of the initial weights in an average at the end from which on the user is told."""

Network = TypeVar("Network", bound=nn.Module)


class Averages(Generic[Network]):
    """A copy of each network, which follows it: copy = decay x copy + (1 - decay) x network.

    Weights and running statistics are averaged, and counters copied, as in timm's ModelEmaV3
    without warm-up. A copy starts as the network's initial weights, of which it still has the share
    decay^n after n steps. No copy influences any training.

    Args:
        networks: The networks, by name.
        decay: Share of the copy that a step keeps, from 0 to below 1.
        device: Device of the training.
    """

    def __init__(self, networks: Mapping[str, Network], decay: float, device: torch.device) -> None:
        self.decay = decay
        self.networks: dict[str, Network] = {}
        for name, network in networks.items():
            twin: Any = copy.deepcopy(network)  # torch's annotation of `to` lacks the memory format
            twin.requires_grad_(False).eval()
            self.networks[name] = twin.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def update(self, name: str, network: nn.Module, skipped: Tensor) -> None:
        """Follows a network after its step; nothing waits for a GPU.

        Args:
            name: Name of the network.
            network: The network.
            skipped: Whether it was not updated, bool [] on its device; its average then stays.
        """
        averaged, copied = _by_kind(self.networks[name])
        moved, counted = _by_kind(network)
        changes = list(torch._foreach_sub(moved, averaged))
        torch._foreach_mul_(changes, torch.where(skipped, 0.0, 1 - self.decay))
        torch._foreach_add_(averaged, changes)
        if copied:
            torch._foreach_copy_(copied, counted)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: network.state_dict() for name, network in self.networks.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        for name, network in self.networks.items():
            network.load_state_dict(state[name])


def _by_kind(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and persistent buffers: those with fractions, then those that count.

    A tensor that layers share is in it once.
    """
    distinct = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor in distinct.values():
        kinds[not tensor.is_floating_point()].append(tensor)
    return kinds


def warn_of_average(decay: float, num_steps: int) -> None:
    """Logs a warning where much of the initial weights is left after so many steps."""
    left = decay**num_steps
    if left >= LARGEST_REST:
        log.warning(
            "the averages still have %.2g %% of the initial weights when the run ends after %d "
            "steps; a lower ema_decay forgets them, such as %.6g",
            100 * left,
            num_steps,
            (LARGEST_REST / 10) ** (1 / num_steps),
        )
