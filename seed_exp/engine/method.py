"""The interface between the engine and what it trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from seed_exp.base.network_names import trained
from seed_exp.config.schema import Precision
from seed_exp.views.recipe import HostBatch


class Method(nn.Module):
    """What is trained: a fleet of networks that share a batch and whatever is computed of it once.

    The modules that it registers are what they share; the networks are in a dict, hence not among
    them. `prepare` and `loss` are each method's own; the rest is as a method needs it whose
    networks share nothing.
    """

    trainable: dict[str, nn.Module]
    """The networks, by name; each has its own loss, gradient and optimiser."""
    carried: nn.Module
    """What else goes from step to step (queues, momentum encoders) and hence into checkpoints."""

    fixed_shapes: ClassVar[bool] = True
    """Whether the networks see tensors of the same few shapes in every step."""

    rows_per_image: int = 1
    """Rows of a batch for each image of a step, see `rows`."""

    lr_factors: Mapping[str, float]
    """Factor of a network's learning rate for each named part that has a rate of its own."""

    formats: Mapping[str, Precision]
    """Trained networks that do not compute in the format of the option `precision`."""

    def __init__(self) -> None:
        super().__init__()
        self.lr_factors, self.formats = {}, {}
        self.carried = nn.ModuleDict()

    def rows(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:  # noqa: ARG002
        """Images whose views a step takes, row by row; those of an image are next to each other.

        Args:
            epoch: Epoch of the step.
            indices: Numbers of the step's images [N].

        Returns:
            [N x rows_per_image].
        """
        return indices

    def prepare(self, views: dict[str, Tensor], batch: HostBatch) -> Any:
        """What all networks share of (a part of) a batch; views [V, N, 3, S, S] per resolution."""
        raise NotImplementedError

    def loss(self, name: str, network: nn.Module, prepared: Any) -> dict[str, Tensor]:
        """One network's scalars: "loss", which is minimised, and others, which are logged."""
        raise NotImplementedError

    def compile_shared(self) -> None:
        """Compiles what `prepare` runs."""

    def compute_in(self, formats: Mapping[str, Precision]) -> None:
        """Gives networks formats of their own.

        Args:
            formats: Formats by the networks' names in base.network_names; others keep that of the
                option `precision`.
        """
        self.formats = {
            name: formats[trained(name)] for name in self.trainable if trained(name) in formats
        }

    def rehearsal(self) -> Method:
        """A copy, to try out a step that leaves no trace."""
        return copy.deepcopy(self)

    def diagnostics(self, prepared: Any) -> dict[str, Tensor]:  # noqa: ARG002
        """Scalars worth knowing now and then."""
        return {}

    def advice(
        self,
        shown: Mapping[str, float],  # noqa: ARG002
        *,
        num_seen: int,  # noqa: ARG002
        num_images: int,  # noqa: ARG002
    ) -> str | None:
        """A sentence for the user about the numbers of a log line; None if there is nothing to say.

        Args:
            shown: The numbers, the same on every rank.
            num_seen: Images of all steps so far.
            num_images: Images in the source.
        """
        return None

    def found(self) -> dict[str, float]:
        """Numbers that no option says and the training goes by, for the networks' files."""
        return {}

    def after_step(self) -> None:
        """Called when the optimisers have made their step.

        Networks without a loss since the last call did not take part.
        """
