"""From a source's images to normalised views: the host half runs in worker processes, the device half where the model is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.config.schema import ViewsConfig
from seed_exp.views.crops import (
    NUM_CROP_DRAWS,
    crop_resize,
    random_resized_crop_boxes,
    resize_center_crop,
)
from seed_exp.views.draws import uniforms
from seed_exp.views.photometric import (
    NUM_PHOTOMETRIC_DRAWS,
    Column,
    draw_parameters,
    normalize,
    photometric,
)


class HostBatch(NamedTuple):
    """What the host half makes of N images."""

    views: dict[str, Tensor]
    """Per resolution (`global`, `local`): uint8 [N, V, 3, S, S], V views of that size per image; channels last in memory."""
    draws: dict[str, Tensor]
    """Per resolution: parameters of the device half, float32 [N, V, P], columns as in photometric.Column."""
    labels: Tensor
    """int64 [N]; -1 = unlabelled."""
    indices: Tensor
    """int64 [N], in the source; on the host also when the rest is on a GPU: only what reads files asks for them."""
    epoch: int
    """That the random numbers were drawn for."""

    @classmethod
    def empty(
        cls, num: int, views: Mapping[str, tuple[int, int]], draws: Mapping[str, int]
    ) -> HostBatch:
        """Room for `num` images with these (V, S) and, where there are draws, this P per resolution; any contents."""
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

    def map(self, function: Callable[[Tensor], Tensor]) -> HostBatch:
        """The batch with `function` applied to each of its tensors."""
        views, draws = (
            {name: function(tensor) for name, tensor in tensors.items()} for tensors in self[:2]
        )
        return HostBatch(views, draws, function(self.labels), function(self.indices), self.epoch)


class Views(Protocol):
    """What training needs of views; picklable."""

    def empty(self, num: int) -> HostBatch:
        """Room for what `host` makes of `num` images; the contents are arbitrary."""
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
        """What networks see, per resolution float32 [V, N, 3, S, S]."""
        ...


class TrainViews:
    """Random views; every draw is a pure function of (seed, epoch, sample index). Picklable.

    The v-th view of a resolution is the same however many views are made.
    """

    def __init__(self, config: ViewsConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def empty(self, num: int) -> HostBatch:
        """Room for what `host` makes of `num` images; the contents are arbitrary."""
        views = {
            name: (crop.num, crop.size) for name, crop in self.config.crops.items() if crop.num > 0
        }
        return HostBatch.empty(num, views, dict.fromkeys(views, len(Column)))

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],
        epoch: int,
        indices: NDArray[np.int64],
        out: HostBatch,
    ) -> None:
        """Writes crops of images (uint8 [3, H, W], any sizes) and the parameters of what `device` does to them into `out`."""
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
            out.draws[name].copy_(draw_parameters(color_draws, self.config))
        out.labels.copy_(torch.from_numpy(labels))
        out.indices.copy_(torch.from_numpy(indices))

    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """Normalised views, float32 [V, N, 3, S, S] per resolution: out["global"][0] has one view of each image."""
        out = {}
        for name, views in batch.views.items():
            view_major = views.transpose(0, 1)
            parameters = batch.draws[name].transpose(0, 1).flatten(0, 1)
            out[name] = photometric(view_major.flatten(0, 1), parameters, self.config).view(
                view_major.shape
            )
        return out


class StillViews(ABC):
    """One view per image, a square of `size` pixels, without any randomness."""

    size: int

    @abstractmethod
    def place(self, image: Tensor, square: Tensor) -> None:
        """Writes what is to be seen of an image (uint8 [3, H, W]) into uint8 [3, S, S]."""

    @abstractmethod
    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """What networks see: float32 {"global": [1, N, 3, S, S]}."""

    def empty(self, num: int) -> HostBatch:
        """Room for what `host` makes of `num` images; the contents are arbitrary."""
        return HostBatch.empty(num, {"global": (1, self.size)}, {})

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],
        epoch: int,  # noqa: ARG002  (the loader calls every host half alike)
        indices: NDArray[np.int64],
        out: HostBatch,
    ) -> None:
        """Places images (uint8 [3, H, W], any sizes) in `out`, views["global"] [N, 1, 3, S, S]; no draws."""
        for image, square in zip(images, out.views["global"][:, 0], strict=True):
            self.place(image, square)
        out.labels.copy_(torch.from_numpy(labels))
        out.indices.copy_(torch.from_numpy(indices))


class EvalViews(StillViews):
    """Shorter side to `eval_resize`, centre crop of `eval_size`. Picklable."""

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
