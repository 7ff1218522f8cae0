"""The loss of pixel classifiers, against a loop over the pixels that count."""

from __future__ import annotations

import math

import pytest
import reference
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from seed_exp.methods.segmentation import SegmentationProbe, pixel_classifier


def probe() -> SegmentationProbe:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.Dropout()
    )
    return SegmentationProbe({"a": encoder}, {"a": pixel_classifier(5, 4)})


def test_the_loss_is_the_mean_over_pixels_with_a_class_and_the_encoder_stays_as_it_is() -> None:
    method = probe().train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    crops = torch.randn(1, 3, 3, 8, 8)
    masks = torch.randint(4, (1, 3, 1, 8, 8), dtype=torch.uint8)
    masks[:, 0] = 255
    masks[:, 1, :, :5] = 255
    prepared = method.prepare({"global": crops, "mask": masks}, tiny.host_batch(3))
    network = method.trainable["a"]
    found = method.loss("a", network, prepared)
    with torch.no_grad():
        logits = F.interpolate(network(method.encoders["a"](crops[0])), (8, 8), mode="bilinear")
    losses = [
        -reference.log_softmax(logits[image, :, row, column].double().tolist())[truth]
        for image, mask in enumerate(masks[0, :, 0].tolist())
        for row, line in enumerate(mask)
        for column, truth in enumerate(line)
        if truth != 255
    ]
    assert len(losses) == 64 + 24
    assert float(found["loss"]) == pytest.approx(math.fsum(losses) / len(losses), abs=1e-5)
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


def test_a_batch_without_any_class_changes_nothing_and_is_no_failure() -> None:
    method = probe()
    views = {
        "global": torch.randn(1, 2, 3, 8, 8),
        "mask": torch.full((1, 2, 1, 8, 8), 255, dtype=torch.uint8),
    }
    network = method.trainable["a"]
    scalars = method.loss("a", network, method.prepare(views, tiny.host_batch(2)))
    scalars["loss"].backward()
    assert (float(scalars["loss"]), float(scalars["train_pixel_accuracy"])) == (0, 0)
    assert all(not parameter.grad.any() for parameter in network.parameters())
