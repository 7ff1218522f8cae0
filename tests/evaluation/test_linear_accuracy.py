from __future__ import annotations

import pytest
import torch
from torch import nn

from seed_exp.evaluation.accuracy import linear_accuracy


@pytest.mark.parametrize("num_classes", [2, 3, 5, 6, 40])
@pytest.mark.parametrize("num_images", [1, 7, 4096, 5000])
def test_accuracy_is_that_of_a_loop(num_classes: int, num_images: int) -> None:
    torch.manual_seed(num_classes)
    classifiers = {
        "a/lr0.1": nn.Linear(6, num_classes),
        "a/lr1": nn.Linear(6, num_classes),
        "b/lr1": nn.Linear(3, num_classes),
    }
    features = {"a": torch.randn(num_images, 6), "b": torch.randn(num_images, 3)}
    labels = torch.randint(num_classes, (num_images,))
    found = linear_accuracy(classifiers, features, labels)
    assert found.keys() == classifiers.keys()
    for name, classifier in classifiers.items():
        top1 = top5 = 0
        rows = classifier(features[name[0]]).tolist()
        for row, label in zip(rows, labels.tolist(), strict=True):
            ranking = sorted(range(num_classes), key=row.__getitem__, reverse=True)
            top1 += ranking[0] == label
            top5 += label in ranking[:5]
        assert found[name]["top1"] == pytest.approx(100 * top1 / num_images, abs=1e-4)
        assert found[name]["top5"] == pytest.approx(100 * top5 / num_images, abs=1e-4)
        if num_classes <= 5:
            assert found[name]["top5"] == 100
