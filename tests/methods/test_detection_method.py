"""The input of detectors: boxes and masks lie on the objects, mirrored or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rectangles import COLOURS, write_coco
from torch import Tensor, nn

from seed_exp.data.detection_sets import load_coco
from seed_exp.data.loader import load_batches
from seed_exp.methods.detection import Detection, Prepared
from seed_exp.views.recipe import HostBatch
from seed_exp.views.uncropped import WholeImages

NUM = 6


class Echo(nn.Module):
    """A detector whose losses are known."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"loss_classifier": torch.tensor(float(len(images))), "loss_mask": torch.tensor(0.5)}


def method(root: Path, flip_prob: float) -> Detection:
    write_coco(root, NUM)
    source = load_coco(root, "train").with_objects()
    return Detection({"a": Echo()}, source, masks=True, flip_prob=flip_prob, seed=3)


def prepared(detection: Detection, epoch: int = 0) -> tuple[Prepared, HostBatch]:
    source = detection._source
    views = WholeImages(int(source.sizes.max()))
    (batch,) = load_batches(source, views, [(epoch, np.arange(NUM)[::-1].copy())], num_workers=0)
    return detection.prepare(views.device(batch), batch), batch


@pytest.mark.parametrize("flip_prob", [0.0, 1.0, 0.5])
def test_boxes_and_masks_hold_the_colour_of_their_class(tmp_path: Path, flip_prob: float) -> None:
    detection = method(tmp_path, flip_prob)
    (images, targets), batch = prepared(detection)
    colours = torch.tensor(list(COLOURS.values())) / 255
    for image, target, index in zip(images, targets, batch.indices.tolist(), strict=True):
        assert tuple(image.shape[1:]) == tuple(detection._source.sizes[index])
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) > 0
        for box, label, mask in zip(
            target["boxes"], target["labels"], target["masks"], strict=True
        ):
            left, top, right, bottom = box.int().tolist()
            distance = (image - colours[label - 1][:, None, None]).abs().amax(0)
            assert (
                distance[top + 2 : bottom - 2, left + 2 : right - 2] < 0.15
            ).all()  # JPEG blurs the edges
            assert mask.sum() == (right - left) * (bottom - top)
            assert mask[top:bottom, left:right].all()


def test_which_images_are_mirrored_is_drawn_anew_in_each_epoch_and_never_changes(
    tmp_path: Path,
) -> None:
    detection = method(tmp_path, 0.5)
    plain = [target["boxes"] for target in prepared(method(tmp_path, 0.0))[0][1]]

    def mirrored(epoch: int) -> list[bool]:
        (_, targets), _ = prepared(detection, epoch)
        return [
            not torch.equal(target["boxes"], box)
            for target, box in zip(targets, plain, strict=True)
        ]

    draws = [mirrored(epoch) for epoch in range(8)]
    assert draws == [mirrored(epoch) for epoch in range(8)]
    assert len({tuple(draw) for draw in draws}) > 1
    assert 12 < sum(map(sum, draws)) < 36  # of 48


def test_a_rehearsal_has_its_own_detectors_and_the_same_images(tmp_path: Path) -> None:
    detection = method(tmp_path, 0.5)
    twin = detection.rehearsal()
    assert twin._source is detection._source
    assert twin.trainable.keys() == detection.trainable.keys()
    assert twin.trainable["a"] is not detection.trainable["a"]


def test_losses_are_summed_and_named(tmp_path: Path) -> None:
    detection = method(tmp_path, 0.5)
    losses = detection.loss("a", detection.trainable["a"], prepared(detection)[0])
    assert {key: value.item() for key, value in losses.items()} == {
        "loss": NUM + 0.5,
        "classifier": NUM,
        "mask": 0.5,
    }
