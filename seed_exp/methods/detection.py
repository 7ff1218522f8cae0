"""Training of detectors on images with annotated objects."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from seed_exp.data.detection_sets import DetectionSet
from seed_exp.engine.method import Method
from seed_exp.views.draws import uniforms
from seed_exp.views.recipe import HostBatch

Prepared = tuple[list[Tensor], list[dict[str, Tensor]]]


class Detection(Method):
    """Several detectors that learn the same images, mirrored at random; each detector resizes them.

    Args:
        detectors: Detectors by name, as `models.detectors` makes them.
        source: Set of the images that the batches' indices refer to.
        masks: Whether the detectors are also trained on the objects' masks.
        flip_prob: Probability that an image is mirrored left to right.
        seed: Seed that decides, with epoch and image index, which images are mirrored.
    """

    fixed_shapes = False

    def __init__(
        self,
        detectors: Mapping[str, nn.Module],
        source: DetectionSet,
        *,
        masks: bool,
        flip_prob: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.trainable = dict(detectors)
        self._source, self._masks, self._flip_prob, self._seed = source, masks, flip_prob, seed

    def prepare(self, views: dict[str, Tensor], batch: HostBatch) -> Prepared:
        """Returns the images [3, H, W] and each image's objects, on the device.

        An image's objects are boxes [n, 4] in pixels (left, top, right, bottom), labels [n] and,
        if wanted, masks [n, H, W].
        """
        indices = batch.indices.numpy()
        mirrored = uniforms(self._seed, batch.epoch, indices, 0, 1)[:, 0] < self._flip_prob
        images, targets = [], []
        for square, index, flip in zip(
            views["global"][0], indices.tolist(), mirrored.tolist(), strict=True
        ):
            height, width = self._source.sizes[index].tolist()
            image, objects = square[:, :height, :width], self._source.objects[index]
            boxes = torch.from_numpy(objects.boxes).to(image.device)
            target = {"boxes": boxes, "labels": torch.from_numpy(objects.classes).to(image.device)}
            if self._masks:
                target["masks"] = self._source.masks(index).to(image.device)
            if flip:
                image = image.flip(-1)
                target["boxes"] = torch.stack(
                    [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1
                )
                if self._masks:
                    target["masks"] = target["masks"].flip(-1)
            images.append(image)
            targets.append(target)
        return images, targets

    def loss(self, name: str, network: nn.Module, prepared: Prepared) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns the sum of the detector's losses, and each loss by name."""
        images, targets = prepared
        losses: dict[str, Tensor] = network(images, targets)
        total = torch.stack([value.float() for value in losses.values()]).sum()
        return {
            "loss": total,
            **{key.removeprefix("loss_"): value for key, value in losses.items()},
        }

    def rehearsal(self) -> Detection:
        """Returns a copy with detectors of its own; the images are shared."""
        twin = copy.copy(self)
        twin.trainable = copy.deepcopy(self.trainable)
        return twin
