"""Fine-tuning: the parameters that move, their rates, and exact resumption."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.methods.finetuning import Finetune

STUDENTS = tiny.students(["a", "b"])


def method(lrs: tuple[float, ...] = (0.5, 2.0), factor: float = 4.0) -> Finetune:
    return Finetune(STUDENTS, lrs, factor, num_classes=3, seed=2)


def classifier_of(network: nn.Module) -> Tensor:
    """Weights [C, num_features] that multiply the features."""
    return network.scale * network.classifier.weight


def test_every_student_is_trained_with_every_rate_from_the_same_weights() -> None:
    networks = method()
    assert networks.lrs == {"a/lr0.5": 0.5, "a/lr2": 2.0, "b/lr0.5": 0.5, "b/lr2": 2.0}
    assert networks.trainable.keys() == networks.lrs.keys()
    for name, network in networks.trainable.items():
        tiny.assert_same(network.encoder.state_dict(), STUDENTS[name[0]].encoder.state_dict())
        assert torch.equal(network.classifier.weight, networks.trainable["a/lr2"].classifier.weight)
        assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_initial_classifier_does_not_depend_on_its_rate() -> None:
    low, high = (
        Finetune(STUDENTS, [1.0], factor, 500, seed=2).trainable["a/lr1"] for factor in (1.0, 250.0)
    )
    assert torch.allclose(classifier_of(low), classifier_of(high))
    assert classifier_of(low).std().item() == pytest.approx(0.01, rel=0.05)


def test_the_classifier_is_trained_at_a_multiple_of_the_encoders_rate() -> None:
    network = method(factor=25.0).trainable["a/lr0.5"].double().train()
    encoder, classifier = copy.deepcopy(network.encoder), nn.Linear(6, 3).double()
    with torch.no_grad():
        classifier.weight.copy_(classifier_of(network))
        classifier.bias.zero_()
    ours = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    groups = [{"params": encoder.parameters()}, {"params": classifier.parameters(), "lr": 2.5}]
    theirs = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    torch.manual_seed(0)
    for _ in range(4):
        images, labels = torch.randn(8, 3, 10, 10, dtype=torch.float64), torch.randint(0, 3, (8,))
        for optimizer, logits in ((ours, network(images)), (theirs, classifier(encoder(images)))):
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
    assert torch.allclose(classifier_of(network), classifier.weight)
    assert torch.allclose(network.scale * network.classifier.bias, classifier.bias)
    for mine, reference in zip(network.encoder.parameters(), encoder.parameters(), strict=True):
        assert torch.allclose(mine, reference)


def test_classifiers_compute_in_float32_under_autocast() -> None:
    networks = method()
    network, labels = networks.trainable["a/lr2"].eval(), torch.arange(8) % 3
    images = 10 * torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network.encoder(images)
        logits, loss = network(images), networks.loss("a/lr2", network, (images, labels))["loss"]
    assert features.dtype == torch.bfloat16
    expected = F.linear(
        features.float(), classifier_of(network), network.scale * network.classifier.bias
    )
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss, F.cross_entropy(expected, labels), rtol=1e-6, atol=0)


def test_encoders_are_trained_as_a_whole_and_the_students_stay_as_they_are(tmp_path: Path) -> None:
    before = {name: copy.deepcopy(student.state_dict()) for name, student in STUDENTS.items()}
    networks = method()
    tiny.train(networks, tmp_path, tiny.fit_config(steps=5), lrs=networks.lrs)
    for name, network in networks.trainable.items():
        start = STUDENTS[name[0]].encoder.state_dict()
        moved = [
            key
            for key, tensor in network.encoder.state_dict().items()
            if not torch.equal(tensor, start[key])
        ]
        assert moved == list(start), name  # running statistics of batch norm among them
    assert not torch.equal(
        networks.trainable["a/lr0.5"].classifier.weight,
        networks.trainable["a/lr2"].classifier.weight,
    )
    tiny.assert_same({name: student.state_dict() for name, student in STUDENTS.items()}, before)


def test_it_goes_on_bit_for_bit_where_it_was(tmp_path: Path) -> None:
    whole = method()
    tiny.train(whole, tmp_path / "whole", lrs=whole.lrs)
    cut = method()
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(cut, tmp_path / "cut", source=tiny.Images(fail_after=61), lrs=cut.lrs)
    again = method()
    tiny.train(again, tmp_path / "cut", lrs=again.lrs)
    tiny.assert_same(
        tiny.last_checkpoint(tmp_path / "cut"), tiny.last_checkpoint(tmp_path / "whole")
    )
