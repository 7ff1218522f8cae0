from __future__ import annotations

import copy
import math

import pytest
import timm
import tiny
import torch
from torch import Tensor, nn

from seed_exp.config.schema import OptimizerConfig
from seed_exp.engine.optimizers import Lars, build_optimizer, set_lr
from seed_exp.models.students import Student


def config(name: str, **options: float) -> OptimizerConfig:
    return OptimizerConfig(
        name,
        **{"lr": 1.0, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02, **options},
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)
    ).double()


def gradients(module: nn.Module, step: int) -> None:
    torch.manual_seed(100 + step)
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(
            torch.randn(parameter.shape, dtype=parameter.dtype)
        )


def adamw_algorithm_2(
    w: list[float], gs: list[list[float]], rates: list[float], decay: float
) -> list[float]:
    """arXiv:1711.05101, Algorithm 2, a parameter's numbers one by one."""
    beta1, beta2, epsilon = 0.8, 0.95, 1e-8
    out = []
    for start, *numbers in zip(w, *gs, strict=True):
        value, m, v = start, 0.0, 0.0
        for t, (g, rate) in enumerate(zip(numbers, rates, strict=True), 1):
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
            value -= rate * (m_hat / (math.sqrt(v_hat) + epsilon) + decay * value)
        out.append(value)
    return out


RATES = [0.0, 0.5, 2.0, 1.0, 0.1]


def norm(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def lars_algorithm_1(
    w: list[float],
    gs: list[list[float]],
    rates: list[float],
    m: float,
    beta: float,
    eta: float,
    is_vector: bool,
) -> list[float]:
    """arXiv:1708.03888, Algorithm 1, a layer's numbers one by one.

    Vectors are left to plain SGD without weight decay.
    """
    v = [0.0] * len(w)
    for g, gamma in zip(gs, rates, strict=True):
        if is_vector:
            local, decay = 1.0, 0.0
        else:
            local, decay = eta * norm(w) / (norm(g) + beta * norm(w)), beta
        v = [m * vi + gamma * local * (gi + decay * wi) for vi, gi, wi in zip(v, g, w, strict=True)]
        w = [wi - vi for wi, vi in zip(w, v, strict=True)]
    return w


def test_lars_equals_its_algorithm_over_several_steps() -> None:
    module = network()
    optimizer = build_optimizer(config("lars"), module)
    start = [parameter.detach().flatten().tolist() for parameter in module.parameters()]
    history: list[list[list[float]]] = [[] for _ in start]
    for step, rate in enumerate(RATES):
        gradients(module, step)
        for parameter, values in zip(module.parameters(), history, strict=True):
            values.append(parameter.grad.flatten().tolist())
        set_lr(optimizer, rate)
        optimizer.step()
    for parameter, begin, values in zip(module.parameters(), start, history, strict=True):
        expected = lars_algorithm_1(
            begin, values, RATES, 0.9, 0.01, 0.02, is_vector=parameter.ndim == 1
        )
        torch.testing.assert_close(
            parameter.detach().flatten(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-12,
            atol=0,
        )


def test_adamw_equals_its_algorithm_and_decays_neither_biases_nor_batch_norm() -> None:
    module = network()
    options = tiny.replaced(config("adamw", weight_decay=0.3), betas=[0.8, 0.95])
    optimizer = build_optimizer(options, module, {"3": 20.0})
    named = dict(module.named_parameters())
    start = {name: parameter.detach().flatten().tolist() for name, parameter in named.items()}
    history: dict[str, list[list[float]]] = {name: [] for name in named}
    for step, rate in enumerate(RATES):
        gradients(module, step)
        for name, parameter in named.items():
            history[name].append(parameter.grad.flatten().tolist())
        set_lr(optimizer, rate)
        optimizer.step()
    for name, parameter in named.items():
        rates = [rate * (20.0 if name.startswith("3.") else 1.0) for rate in RATES]
        decay = 0.3 if name in ("0.weight", "3.weight") else 0.0
        expected = adamw_algorithm_2(start[name], history[name], rates, decay)
        torch.testing.assert_close(
            parameter.detach().flatten(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-10,
            atol=0,
        )


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("vit_tiny_patch16_224", {"cls_token", "pos_embed"}),
        ("swin_tiny_patch4_window7_224", {"relative_position_bias_table"}),
        ("xcit_nano_12_p16_224", {"cls_token", "pos_embed.token_projection.weight", "temperature"}),
        ("resnet18", set()),
    ],
)
def test_adamw_spares_vectors_and_what_networks_of_timm_name(name: str, spared: set[str]) -> None:
    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0)
        student = Student(encoder, None, 8)
    optimizer = build_optimizer(config("adamw"), student)
    decayed, undecayed = (
        {id(parameter) for parameter in group["params"]} for group in optimizer.param_groups
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    named = dict(student.named_parameters())
    assert {id(parameter) for parameter in named.values()} == decayed | undecayed
    for key, parameter in named.items():
        is_spared = parameter.ndim <= 1 or any(key.endswith(one) for one in spared)
        assert (id(parameter) in undecayed) is is_spared, key


def test_a_skipped_step_leaves_adamw_as_it_was_on_a_gpu_too() -> None:
    module = network()
    optimizer = build_optimizer(config("adamw"), module)
    for group in optimizer.param_groups:
        group["fused"] = True  # the kernel of a GPU, here on the CPU
    set_lr(optimizer, 0.1)
    states = []
    for step, skip in enumerate([1.0, 0.0, 1.0]):
        gradients(module, step)
        if skip:
            module[0].weight.grad.fill_(torch.nan)
        optimizer.found_inf = torch.tensor(skip)  # as `step_unless` has it
        optimizer.step()
        states.append(copy.deepcopy((module.state_dict(), optimizer.state_dict()["state"])))
    tiny.assert_same(states[0][0], network().state_dict())
    tiny.assert_same(*(states[number][0] for number in (1, 2)))
    tiny.assert_same(*(states[number][1] for number in (1, 2)))
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_sgd_is_that_of_torch() -> None:
    ours, reference = network(), network()
    optimizer = build_optimizer(config("sgd"), ours)
    expected = torch.optim.SGD(reference.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
    for step, rate in enumerate(RATES):
        for module in (ours, reference):
            gradients(module, step)
        set_lr(optimizer, rate)
        expected.param_groups[0]["lr"] = rate
        optimizer.step()
        expected.step()
    for one, two in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("gradient", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_zero_weights_and_gradients_give_finite_steps(
    name: str, weight: float, gradient: float, weight_decay: float
) -> None:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(weight)
            parameter.grad = torch.full_like(parameter, gradient)
    optimizer = build_optimizer(config(name, weight_decay=weight_decay), module)
    set_lr(optimizer, 0.1)
    for _ in range(2):
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    moves = gradient > 0 or weight * weight_decay > 0
    assert bool((module.weight != weight).any()) is moves


def test_lars_leaves_what_has_no_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    used.grad = torch.ones(2, 2)
    Lars([used, unused], 0.1, 0.9, 0.01, 0.001).step()
    assert torch.equal(unused, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_frozen_parameters_are_left_out_and_nothing_moves_before_set_lr(name: str) -> None:
    module = network()
    module[0].requires_grad_(False)
    optimizer = build_optimizer(config(name), module)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    before = [parameter.detach().clone() for parameter in module.parameters()]
    gradients(module, 0)
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_state_goes_on_in_another_optimizer(name: str) -> None:
    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[Tensor]:
        for step in numbers:
            gradients(module, step)
            set_lr(optimizer, 0.5)
            optimizer.step()
        return [parameter.detach() for parameter in module.parameters()]

    straight, resumed = network(), network()
    expected = steps(straight, build_optimizer(config(name), straight), range(4))
    first = build_optimizer(config(name), resumed)
    steps(resumed, first, range(2))
    second = build_optimizer(config(name), resumed)
    second.load_state_dict(first.state_dict())
    for one, two in zip(steps(resumed, second, range(2, 4)), expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_part_with_a_factor_moves_as_if_it_were_alone_with_that_rate(name: str) -> None:
    ours, reference = network(), network()
    optimizer = build_optimizer(config(name), ours, {"0": 0.5, "3": 20.0})
    alone = [
        (build_optimizer(config(name), reference[part]), factor)
        for part, factor in ((0, 0.5), (1, 1.0), (3, 20.0))
    ]
    for step, rate in enumerate(RATES):
        for module in (ours, reference):
            gradients(module, step)
        set_lr(optimizer, rate)
        optimizer.step()
        for one, factor in alone:
            set_lr(one, factor * rate)
            one.step()
    for one, two in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_without_factors_is_taken_and_one_with_other_groups_refused() -> None:
    optimizer = build_optimizer(config("sgd"), network())
    state = optimizer.state_dict()
    del state["param_groups"][0]["lr_factor"]  # as versions without factors wrote it
    optimizer.load_state_dict(state)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    with pytest.raises(ValueError, match=r"has 1 groups of parameters, this version trains 2: go"):
        build_optimizer(config("sgd"), network(), {"3": 20.0}).load_state_dict(state)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("saved", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("loaded", [torch.contiguous_format, torch.channels_last])
def test_state_goes_on_in_another_memory_format(
    name: str, fused: bool, saved: torch.memory_format, loaded: torch.memory_format
) -> None:
    def trained(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> nn.Module:
        for group in optimizer.param_groups:
            group["fused"] = fused
        gradients(module, step)
        set_lr(optimizer, 0.5)
        optimizer.step()
        return module

    first = network().to(memory_format=saved)
    before = build_optimizer(config(name), first)
    trained(first, before, 0)
    second = network().to(memory_format=loaded)
    second.load_state_dict(first.state_dict())
    after = build_optimizer(config(name), second)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for one, two in zip(
        trained(second, after, 1).parameters(), trained(first, before, 1).parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-14, atol=0)


def test_whether_one_kernel_updates_all_is_the_devices_matter_not_the_checkpoints() -> None:
    before = build_optimizer(config("sgd"), network())
    state = before.state_dict()
    state["param_groups"][0]["fused"] = (
        True  # as a GPU wrote it; here it would be a kernel of its own
    )
    after = build_optimizer(config("sgd"), network())
    after.load_state_dict(state)
    assert after.param_groups[0]["fused"] is None


def test_lars_gives_the_same_in_any_memory_format() -> None:
    modules = [network(), network().to(memory_format=torch.channels_last)]
    for module in modules:
        optimizer = build_optimizer(config("lars"), module)
        set_lr(optimizer, 0.5)
        for step in range(2):
            gradients(module, step)
            optimizer.step()
    for one, two in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_on_a_gpu_one_kernel_updates_all_as_on_the_cpu(name: str) -> None:
    module, reference = network().cuda(), network()
    optimizer, expected = (
        build_optimizer(config(name), module),
        build_optimizer(config(name), reference),
    )
    assert optimizer.defaults["fused"]
    assert not expected.defaults["fused"]
    for step in range(2):
        gradients(reference, step)
        for one, two in zip(module.parameters(), reference.parameters(), strict=True):
            one.grad = two.grad.cuda()
        for each in (optimizer, expected):
            set_lr(each, 0.5)
            each.step()
    for one, two in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=1e-12, atol=1e-15)


def test_an_unknown_optimizer_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'lar'; did you mean 'lars'"):
        build_optimizer(config("lar"), network())
