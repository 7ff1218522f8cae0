from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from seed_exp.methods.linear_probe import LinearProbe, encoder_of

LABELS = torch.tensor([0, 2, 1, 1, 0])
BATCH = tiny.host_batch(5, LABELS)


def encoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"small": tiny.Encoder(4, bn=True, dropout=0.5), "large": tiny.Encoder(6, bn=True)}


def views() -> dict[str, Tensor]:
    return {"global": torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def test_there_is_a_classifier_for_every_encoder_and_rate() -> None:
    probe = LinearProbe(encoders(), [30, 0.3, 1e-05], num_classes=3, seed=2)
    assert probe.lrs == {
        "small/lr30": 30,
        "small/lr0.3": 0.3,
        "small/lr1e-05": 1e-05,
        "large/lr30": 30,
        "large/lr0.3": 0.3,
        "large/lr1e-05": 1e-05,
    }
    assert probe.trainable.keys() == probe.lrs.keys()
    assert {name: classifier.weight.shape for name, classifier in probe.trainable.items()} == {
        name: (3, 4 if name.startswith("small") else 6) for name in probe.lrs
    }
    assert {encoder_of(name) for name in probe.lrs} == {"small", "large"}
    assert probe.carried.state_dict() == {}


def test_weights_begin_small_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    probe = LinearProbe({"a": tiny.Encoder(100, bn=True)}, [1.0], num_classes=1000, seed=2)
    classifier = probe.trainable["a/lr1"]
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert classifier.weight.mean().abs() < 1e-4
    assert classifier.bias.count_nonzero() == 0


def test_weights_begin_the_same_for_every_rate_and_depend_on_the_seed_only() -> None:
    one, two = (
        LinearProbe(encoders(), [1.0, 3.0], 3, seed=2),
        LinearProbe(encoders(), [3.0], 3, seed=2),
    )
    other = LinearProbe(encoders(), [3.0], 3, seed=4)
    weight = two.trainable["small/lr3"].weight
    assert torch.equal(one.trainable["small/lr1"].weight, weight)
    assert torch.equal(one.trainable["small/lr3"].weight, weight)
    assert not torch.equal(other.trainable["small/lr3"].weight, weight)


def test_classifiers_compute_in_float32_under_autocast() -> None:
    probe = LinearProbe(encoders(), [1.0], num_classes=3, seed=2)
    prepared = probe.prepare(views(), BATCH)
    expected = probe.loss("large/lr1", probe.trainable["large/lr1"], prepared)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            probe.loss("large/lr1", probe.trainable["large/lr1"], prepared)["loss"], expected
        )


def test_the_loss_is_cross_entropy_on_the_first_global_view() -> None:
    probe = LinearProbe(encoders(), [1.0], num_classes=3, seed=2)
    prepared = probe.prepare(views(), BATCH)
    for name, classifier in probe.trainable.items():
        out = probe.loss(name, classifier, prepared)
        encoder = probe.encoders[encoder_of(name)]
        logits = [classifier(encoder(image[None]))[0].tolist() for image in views()["global"][0]]
        shares = torch.tensor(logits).double().softmax(1)
        expected = -sum(shares[row, label].log().item() for row, label in enumerate(LABELS)) / 5
        assert out["loss"].item() == pytest.approx(expected, abs=1e-5)
        right = sum(
            max(range(3), key=row.__getitem__) == label
            for row, label in zip(logits, LABELS.tolist(), strict=True)
        )
        assert out["train_top1"].item() == pytest.approx(20 * right)


def test_encoders_are_frozen_and_their_statistics_stay(tmp_path: Path) -> None:
    own = encoders()
    before = copy.deepcopy({name: encoder.state_dict() for name, encoder in own.items()})
    probe = LinearProbe(own, [1.0, 10.0], num_classes=3, seed=2)
    probe.train()
    tiny.train(probe, tmp_path, lrs=probe.lrs)
    tiny.assert_same(before, {name: encoder.state_dict() for name, encoder in own.items()})
    for encoder in own.values():
        assert not any(module.training for module in encoder.modules())
        assert all(
            parameter.grad is None and not parameter.requires_grad
            for parameter in encoder.parameters()
        )


def test_each_encoder_runs_once_per_batch_for_all_its_classifiers() -> None:
    own = encoders()
    calls: list[str] = []
    for name, encoder in own.items():
        encoder.register_forward_hook(lambda *_, name=name: calls.append(name))
    probe = LinearProbe(own, [1.0, 3.0, 10.0], num_classes=3, seed=2)
    prepared = probe.prepare(views(), BATCH)
    for name, classifier in probe.trainable.items():
        probe.loss(name, classifier, prepared)["loss"].backward()
    assert calls == ["small", "large"]
    assert probe.diagnostics(prepared) == {}


def test_training_runs_each_encoder_once_per_batch_whatever_the_number_of_rates(
    tmp_path: Path,
) -> None:
    calls: list[str] = []
    probe = LinearProbe(encoders(), [1.0, 3.0, 10.0], num_classes=3, seed=2)
    for name, encoder in probe.encoders.items():
        encoder.register_forward_hook(lambda *_, name=name: calls.append(name))
    config = tiny.fit_config()
    tiny.train(probe, tmp_path, config, lrs=probe.lrs)
    assert calls == ["small", "large"] * config.steps


def test_classifiers_side_by_side_learn_what_each_learns_alone(tmp_path: Path) -> None:
    together = tiny.probe((1.0, 3.0))
    tiny.train(together, tmp_path / "together", lrs=together.lrs)
    alone = tiny.probe((3.0,))
    tiny.train(alone, tmp_path / "alone", lrs=alone.lrs)
    tiny.assert_same(tiny.weights(alone)["a/lr3"], tiny.weights(together)["a/lr3"])
