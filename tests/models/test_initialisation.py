"""Fresh students have the weights, and train with the randomness, of SEED's released code.

The expected numbers are computed here from the rules that the released code follows (torch's
defaults, He et al.'s normal distribution, constants), not by this package.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from seed_exp.config.schema import StudentConfig
from seed_exp.config.schema.networks import RELEASED_NETWORKS
from seed_exp.models.initialisation import RULES
from seed_exp.models.released import RELEASED
from seed_exp.models.students import Student, build_student


class Drawn(NamedTuple):
    """Distribution of a tensor's values."""

    mean: float
    std: float
    largest: float
    """Bound of the absolute value; infinite for a normal distribution."""


def constant(value: float) -> Drawn:
    return Drawn(value, 0.0, abs(value))


def uniform(bound: float) -> Drawn:
    return Drawn(0.0, bound / math.sqrt(3), bound)


def normal(std: float) -> Drawn:
    return Drawn(0.0, std, math.inf)


def he_fan_out(weight: Tensor) -> Drawn:
    """N(0, 2 / (k^2 C_out)): the number of groups is not in it."""
    return normal(math.sqrt(2 / (weight.shape[2] * weight.shape[3] * weight.shape[0])))


def torch_default(weight: Tensor) -> Drawn:
    """U(-b, b), b = 1 / sqrt(fan in): nn.Conv2d and nn.Linear; the bias has the same bound."""
    return uniform(1 / math.sqrt(weight[0].numel()))


def released_rule(network: str, key: str, tensors: dict[str, Tensor]) -> Drawn:
    """Distribution of a student's tensor when the released code has just made the network."""
    tensor = tensors[key]
    weight = tensors.get(key.removesuffix("bias") + "weight", tensor)
    if key.endswith(("running_mean", "num_batches_tracked")):
        return constant(0)
    if key.endswith("running_var"):
        return constant(1)
    if weight.ndim == 1:  # batch norm
        return constant(1 if key.endswith("weight") else 0)
    if network == "mobilenetv3_large":
        if key.startswith("head.0"):  # a fresh nn.Linear before the initialised network's last one
            return torch_default(weight)
        if key.endswith("bias"):
            return constant(0)
        was_linear = ".se." in key or key.startswith(("encoder.conv_head", "head.2"))
        return normal(0.01) if was_linear else he_fan_out(tensor)
    if network.startswith("resnet") and key.startswith("encoder"):
        return he_fan_out(tensor)
    return torch_default(weight)


def deviation(values: Tensor, expected: Drawn) -> str:
    """What a tensor's statistics have that the distribution cannot give; empty if nothing."""
    values = values.double().flatten()
    num = len(values)
    if expected.std == 0:
        return "" if bool((values == expected.mean).all()) else f"not all {expected.mean}"
    faults = []
    # Five standard errors; that of the standard deviation is largest for a normal distribution.
    if abs(values.mean().item() - expected.mean) > 5 * expected.std / math.sqrt(num):
        faults.append(f"mean {values.mean():.3g}")
    std = values.square().mean().sqrt().item()
    if abs(std / expected.std - 1) > 5 / math.sqrt(2 * num):
        faults.append(f"std {std:.3g} instead of {expected.std:.3g}")
    if values.abs().max() > expected.largest:
        faults.append(f"{values.abs().max():.3g} above {expected.largest:.3g}")
    if math.isinf(expected.largest) and num > 1000 and values.abs().max() < 2.5 * expected.std:
        faults.append("no normal distribution")
    if (share := (values == 0).double().mean().item()) > 1e-4:
        faults.append(f"{100 * share:.3g} % zeros")
    return ", ".join(faults)


def faults(network: str, student: Student) -> dict[str, str]:
    tensors = student.state_dict()
    found = {
        key: deviation(tensor, released_rule(network, key, tensors))
        for key, tensor in tensors.items()
    }
    return {key: fault for key, fault in found.items() if fault}


def fresh(network: str, **options: object) -> Student:
    torch.manual_seed(0)
    return build_student(StudentConfig(network, **options), 128)  # type: ignore[arg-type]


@pytest.mark.parametrize("network", RELEASED_NETWORKS)
def test_every_tensor_of_a_fresh_student_is_drawn_as_in_the_released_code(network: str) -> None:
    assert faults(network, fresh(network)) == {}


@pytest.mark.parametrize("network", RELEASED_NETWORKS)
def test_the_comparison_tells_timms_rule_apart(network: str) -> None:
    found = faults(network, fresh(network, init_rule="timm"))
    assert len(found) >= 8
    if network == "mobilenetv3_large":  # its depthwise weights are those that differ most
        depthwise = {key for key in found if key.endswith("conv_dw.weight")}
        assert len(depthwise) == 15


@pytest.mark.parametrize("network", RELEASED_NETWORKS)
def test_timms_rule_draws_timms_weights(network: str) -> None:
    names = {
        "mobilenetv3_large": "mobilenetv3_large_100",
        "efficientnet_b0": "tf_efficientnet_b0",
        "efficientnet_b1": "tf_efficientnet_b1",
    }
    ours = fresh(network, init_rule="timm").encoder.state_dict()
    torch.manual_seed(0)
    reference = timm.create_model(names.get(network, network), num_classes=0).state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in reference.items())


def test_the_rules_are_of_the_networks_that_seed_released() -> None:
    assert set(RULES) == set(RELEASED) == set(RELEASED_NETWORKS)


@pytest.mark.parametrize(
    ("network", "expected"), [*((one, "released") for one in RELEASED_NETWORKS), ("timm", "timm")]
)
def test_released_networks_have_the_released_rule_others_timms(network: str, expected: str) -> None:
    assert StudentConfig(network, name="resnet26").init_rule == expected


def test_the_same_network_of_timm_keeps_timms_weights() -> None:
    torch.manual_seed(0)
    student = build_student(StudentConfig("timm", "resnet18"), 128)
    assert any(fault.startswith("not all 1") for fault in faults("resnet18", student).values())


def test_a_rule_that_the_network_lacks_or_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"networks that SEED released .* not of network=timm"):
        StudentConfig("timm", "resnet18", init_rule="released")
    with pytest.raises(ValueError, match="must be null or one of timm, released, got torch"):
        StudentConfig("resnet18", init_rule="torch")


# --- randomness in training mode ----------------------------------------------------------------

DROPOUT = {"mobilenetv3_large": 0.2, "efficientnet_b0": 0.2, "efficientnet_b1": 0.2}
"""Network -> probability of dropout between feature and head; 0 for the others."""
STOCHASTIC_DEPTH = {"efficientnet_b0": 0.2, "efficientnet_b1": 0.2}
"""Network -> d: block i of n is left out with probability d i / n, where it has a shortcut."""


@pytest.mark.parametrize("network", RELEASED_NETWORKS)
def test_dropout_sets_the_released_share_of_the_feature_to_zero(network: str) -> None:
    rate = DROPOUT.get(network, 0.0)
    student = fresh(network)
    for module in student.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0  # apart from dropout
    # Batch statistics of their own would move the zeros of ReLU, so only dropout is switched on.
    student.eval()
    images = torch.randn(16, 3, 64, 64)
    kept = student.features(images)
    student.encoder.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    dropped = student.features(images)
    share = (dropped[kept != 0] == 0).float().mean().item()
    assert share == pytest.approx(rate, abs=0.01)
    remaining = dropped != 0
    torch.testing.assert_close(dropped[remaining], kept[remaining] / (1 - rate))


@pytest.mark.parametrize("network", RELEASED_NETWORKS)
def test_stochastic_depth_rises_linearly_over_the_blocks(network: str) -> None:
    rate = STOCHASTIC_DEPTH.get(network, 0.0)
    encoder = fresh(network).encoder
    found = {name: m.drop_prob for name, m in encoder.named_modules() if isinstance(m, DropPath)}
    if rate == 0:
        assert found == {}
        return
    blocks = [
        f"blocks.{i}.{j}" for i, stage in enumerate(encoder.blocks) for j in range(len(stage))
    ]  # type: ignore[arg-type]
    expected = {
        f"{block}.drop_path": rate * number / len(blocks)
        for number, block in enumerate(blocks)
        if number > 0
    }
    with_shortcut = {
        name
        for name in expected
        if getattr(encoder.get_submodule(name.removesuffix(".drop_path")), "has_skip", False)
    }
    assert with_shortcut <= found.keys()
    for name in with_shortcut:
        assert found[name] == pytest.approx(expected[name])


def test_timms_rule_trains_mobilenet_without_dropout() -> None:
    encoder = fresh("mobilenetv3_large", init_rule="timm").encoder.train()
    images = torch.randn(4, 3, 64, 64)
    assert torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize(("network", "momentum"), [("resnet18", 0.1), ("mobilenetv3_large", 0.1)])
def test_batch_norm_has_the_released_momentum(network: str, momentum: float) -> None:
    layers = [m for m in fresh(network).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {layer.momentum for layer in layers} == {momentum}
