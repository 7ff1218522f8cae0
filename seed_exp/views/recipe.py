"""Images to normalised views: a host half in worker processes, a device half beside the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.base.registry import lookup
from seed_exp.config.schema import ViewsConfig
from seed_exp.views.crops import (
    NUM_CROP_DRAWS,
    crop_resize,
    random_resized_crop_boxes,
    resize_center_crop,
)
from seed_exp.views.draws import uniforms
from seed_exp.views.mixup import mixup
from seed_exp.views.operations import VIEW_OPERATIONS
from seed_exp.views.photometric import (
    NUM_PHOTOMETRIC_DRAWS,
    Column,
    draw_parameters,
    normalize,
    photometric,
)

_MIXUP_STREAMS = 1 << 14
"""First of the streams of random numbers for shares of mixed views, one for each resolution."""
_ADDED_STREAMS = 1 << 15
"""First of the streams of random numbers for operations of plug-ins, one for each resolution."""


class HostBatch(NamedTuple):
    """The views of N images as the host half leaves them."""

    views: dict[str, Tensor]
    """V views per image by resolution (global, local): uint8 [N, V, 3, S, S], channels last."""
    draws: dict[str, Tensor]
    """Parameters of the device half by resolution: float32 [N, V, P].

    See photometric.Column; then those of operations of plug-ins and the share of mixup, if any.
    """
    labels: Tensor
    """Labels of the images, int64 [N]; -1 = unlabelled."""
    indices: Tensor
    """Indices of the images in the source, int64 [N]; always on the host, where files are read."""
    epoch: int
    """Epoch that keys the random numbers of the views."""

    @classmethod
    def empty(
        cls, num: int, views: Mapping[str, tuple[int, int]], draws: Mapping[str, int]
    ) -> HostBatch:
        """A batch with room for `num` images; its contents are arbitrary.

        Args:
            num: Number of images N.
            views: Number V and side S in pixels of the views, by resolution.
            draws: Number P of parameters per view, by resolution; empty if nothing is drawn.
        """
        sizes = {name: (num, num_views, size, size, 3) for name, (num_views, size) in views.items()}
        return cls(
            {
                name: torch.empty(size, dtype=torch.uint8).movedim(-1, 2)
                for name, size in sizes.items()
            },
            {name: torch.empty(*sizes[name][:2], width) for name, width in draws.items()},
            torch.empty(num, dtype=torch.int64),
            torch.empty(num, dtype=torch.int64),
            epoch=0,
        )

    def of_size(self, size: int) -> HostBatch:
        """A batch with global views of `size` pixels, in the memory of this one's larger views."""
        views = self.views["global"]
        num, num_views, channels, *_ = views.shape
        row, image = channels * size, channels * size**2
        smaller = views.as_strided(
            (num, num_views, channels, size, size), (num_views * image, image, 1, row, channels)
        )
        return self._replace(views={**self.views, "global": smaller})

    def map(self, function: Callable[[Tensor], Tensor]) -> HostBatch:
        """The batch with `function` applied to each of its tensors."""
        views, draws = (
            {name: function(tensor) for name, tensor in tensors.items()} for tensors in self[:2]
        )
        return HostBatch(views, draws, function(self.labels), function(self.indices), self.epoch)


class Views(Protocol):
    """The views as training uses them; picklable."""

    images_together: int
    """Images of a batch that must not be parted, in the order of the batch."""

    @property
    def global_sizes(self) -> Sequence[int]:
        """Sides in pixels that global views have at some time, ascending."""
        ...

    def size_at(self, time: int) -> int:
        """Side of global views in epoch `time`, or step, where the run is stated in steps."""
        ...

    def empty(self, num: int) -> HostBatch:
        """A batch into which `host` can write `num` images; its contents are arbitrary.

        It has the largest views that there are at some time. One made of it by `of_size` is filled
        with views of that size.
        """
        ...

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],
        epoch: int,
        indices: NDArray[np.int64],
        out: HostBatch,
    ) -> None:
        """Fills `out` from images, uint8 [3, H, W] of any sizes."""
        ...

    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """The networks' inputs by resolution, float32 [V, N, 3, S, S]."""
        ...


class TrainViews:
    """Random views; every draw is a pure function of (seed, epoch, sample index). Picklable.

    The v-th view of a resolution is the same however many views are made. Views of any size show
    the same part of the image in the same colours; a blur is as wide in pixels.
    """

    def __init__(self, config: ViewsConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.operations = [
            lookup(VIEW_OPERATIONS, name, "view operation") for name in config.operations
        ]
        self.num_added = sum(operation.num_draws for operation in self.operations)
        self.images_together = 2 if config.mixup else 1

    @property
    def global_sizes(self) -> list[int]:
        """Sides in pixels that global views have at some time, ascending."""
        return self.config.global_sizes

    def size_at(self, time: int) -> int:
        """Side of global views in epoch `time`, or step, where the run is stated in steps."""
        return self.config.size_at(time)

    def empty(self, num: int) -> HostBatch:
        """A batch with the largest views, into which `host` can write `num` images."""
        crops = self.config.largest().crops
        views = {name: (crop.num, crop.size) for name, crop in crops.items() if crop.num > 0}
        num_parameters = len(Column) + self.num_added + self.config.mixup
        return HostBatch.empty(num, views, dict.fromkeys(views, num_parameters))

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],
        epoch: int,
        indices: NDArray[np.int64],
        out: HostBatch,
    ) -> None:
        """Fills `out` with crops of images, uint8 [3, H, W], and the parameters of `device`."""
        mixed = int(self.config.mixup)
        heights, widths = (
            np.array([image.shape[side] for image in images], np.int64)[:, None] for side in (1, 2)
        )
        for number, (name, crop) in enumerate(sorted(self.config.crops.items())):
            if crop.num == 0:
                continue
            crop_draws, color_draws = (
                uniforms(self.seed, epoch, indices, stream, crop.num * num).reshape(
                    len(images), crop.num, num
                )
                for stream, num in (
                    (2 * number, NUM_CROP_DRAWS),
                    (2 * number + 1, NUM_PHOTOMETRIC_DRAWS),
                )
            )
            boxes = random_resized_crop_boxes(
                heights, widths, crop_draws, crop.scale, self.config.aspect_ratio
            )
            for image, image_boxes, image_views in zip(
                images, boxes.tolist(), out.views[name], strict=True
            ):
                for box, view in zip(image_boxes, image_views, strict=True):
                    crop_resize(image, box, view)
            parts = [draw_parameters(color_draws, self.config)]
            for first, num in ((_ADDED_STREAMS, self.num_added), (_MIXUP_STREAMS, mixed)):
                if num:
                    added = uniforms(self.seed, epoch, indices, first + number, crop.num * num)
                    shaped = torch.from_numpy(added.astype(np.float32))
                    parts.append(shaped.view(len(images), crop.num, num))
            out.draws[name].copy_(torch.cat(parts, dim=2))
        out.labels.copy_(torch.from_numpy(labels))
        out.indices.copy_(torch.from_numpy(indices))

    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """Normalised views by resolution, float32 [V, N, 3, S, S], mixed if the recipe says so.

        So `device(batch)["global"][0]` holds one view of each image.
        """
        out = {}
        for name, views in batch.views.items():
            view_major = views.transpose(0, 1)
            parameters = batch.draws[name].transpose(0, 1)
            made = photometric(
                view_major.flatten(0, 1), parameters.flatten(0, 1), self.config, self.operations
            ).view(view_major.shape)
            out[name] = mixup(made, parameters[..., -1]) if self.config.mixup else made
        return out


class SquareViews:
    """The part of `Views` that views share which are squares of one size, one per image."""

    size: int
    """Side in pixels."""
    images_together = 1

    @property
    def global_sizes(self) -> list[int]:
        """The only side."""
        return [self.size]

    def size_at(self, time: int) -> int:  # noqa: ARG002  (as those of views with phases)
        """The only side."""
        return self.size


class StillViews(SquareViews, ABC):
    """One view per image, a square with sides of `size` pixels, without any randomness."""

    @abstractmethod
    def place(self, image: Tensor, square: Tensor) -> None:
        """Writes the visible part of `image`, uint8 [3, H, W], into `square`, uint8 [3, S, S]."""

    @abstractmethod
    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """The networks' inputs: float32 {"global": [1, N, 3, S, S]}."""

    def empty(self, num: int) -> HostBatch:
        """A batch into which `host` can write `num` images; its contents are arbitrary."""
        return HostBatch.empty(num, {"global": (1, self.size)}, {})

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],
        epoch: int,  # noqa: ARG002  (the loader calls every host half alike)
        indices: NDArray[np.int64],
        out: HostBatch,
    ) -> None:
        """Places images (uint8 [3, H, W], any sizes) in `out.views["global"]` [N, 1, 3, S, S]."""
        for image, square in zip(images, out.views["global"][:, 0], strict=True):
            self.place(image, square)
        out.labels.copy_(torch.from_numpy(labels))
        out.indices.copy_(torch.from_numpy(indices))

    def inputs(self, images: Sequence[Tensor]) -> Tensor:
        """The networks' inputs, float32 [N, 3, S, S], for images in memory, uint8 [3, H, W]."""
        batch, indices = self.empty(len(images)), np.arange(len(images))
        self.host(images, np.full(len(images), -1), 0, indices, batch)
        return self.device(batch)["global"][0]


class EvalViews(StillViews):
    """Centre crops of `eval_size` pixels, the shorter side resized to `eval_resize`. Picklable."""

    def __init__(self, config: ViewsConfig) -> None:
        self.config, self.size = config, config.eval_size

    def place(self, image: Tensor, square: Tensor) -> None:
        """Writes the centre crop."""
        resize_center_crop(image, self.config.eval_resize, square)

    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """Normalised views, float32 {"global": [1, N, 3, S, S]}."""
        return {
            "global": normalize(batch.views["global"].transpose(0, 1).float() / 255, self.config)
        }
