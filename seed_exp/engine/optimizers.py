"""Optimisers by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Set
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from seed_exp.base.registry import lookup
from seed_exp.config.schema import OptimizerConfig, ScheduleName
from seed_exp.engine.schedules import peak_lr

log = logging.getLogger("seed_exp")


class Lars(Optimizer):
    """Layer-wise adaptive rate scaling, arXiv:1708.03888, Algorithm 1.

    The local rate is trust_coefficient x |w| / (|g| + weight_decay x |w|), or 1 where that is no
    positive number: v = momentum x v + lr x local rate x (g + weight_decay x w), w = w - v.
    Vectors (biases, normalisation) take part neither in the scaling nor in weight decay.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Groups,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Updates every parameter that has a gradient, in kernels over all of them.

        Nothing waits for a GPU.
        """
        for group in self.param_groups:
            used = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices = [parameter for parameter in used if parameter.ndim > 1]
            parameters = matrices + [parameter for parameter in used if parameter.ndim <= 1]
            if not parameters:
                continue
            gradients: list[Tensor] = [parameter.grad for parameter in parameters]
            if matrices:
                gradients[: len(matrices)] = _scaled(matrices, gradients[: len(matrices)], group)
            buffers = [self._momentum_buffer(parameter) for parameter in parameters]
            updates = list(torch._foreach_mul(buffers, group["momentum"]))
            torch._foreach_add_(updates, gradients, alpha=group["lr"])
            skip = getattr(self, "found_inf", None)  # 1 or 0, on the GPU: see step_unless
            if skip is not None:
                torch._foreach_copy_(
                    buffers,
                    [torch.where(skip > 0, b, u) for b, u in zip(buffers, updates, strict=True)],
                )
                updates = [torch.where(skip > 0, 0.0, update) for update in updates]
            else:
                torch._foreach_copy_(buffers, updates)
            torch._foreach_sub_(parameters, updates)

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _scaled(matrices: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Local rate x (g + weight_decay x w) of each matrix."""
    weight_norms = torch.stack(torch._foreach_norm(matrices))
    denominators = (
        torch.stack(torch._foreach_norm(gradients)) + group["weight_decay"] * weight_norms
    )
    usable = (weight_norms > 0) & (denominators > 0)
    local_rates = torch.where(usable, group["trust_coefficient"] * weight_norms / denominators, 1.0)
    decayed = torch._foreach_add(gradients, matrices, alpha=group["weight_decay"])
    return list(torch._foreach_mul(decayed, local_rates.unbind()))


Groups = list[dict[str, Any]]
"""Parameters that are trained with the same multiple of the learning rate, as torch takes them."""


def _sgd(config: OptimizerConfig, groups: Groups, _spared: Set[nn.Parameter]) -> Optimizer:
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = _is_fused(parameters)
    optimizer = SGD(
        groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
    )
    if fused and config.momentum > 0:
        # A first step that is skipped would leave memory that nobody wrote to as momentum.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _is_fused(parameters: list[nn.Parameter]) -> bool | None:
    """True on a GPU; not on the CPU, where the whole update is less than 1 % of a step."""
    return all(parameter.is_cuda for parameter in parameters) or None


def _lars(config: OptimizerConfig, groups: Groups, _spared: Set[nn.Parameter]) -> Optimizer:
    return Lars(groups, 0.0, config.momentum, config.weight_decay, config.trust_coefficient)


def _adamw(config: OptimizerConfig, groups: Groups, spared: Set[nn.Parameter]) -> Optimizer:
    """AdamW (arXiv:1711.05101), which takes no weight decay of the parameters in `spared`."""
    parts = [
        {**group, "params": parameters, "weight_decay": decay}
        for group in groups
        for parameters, decay in (
            ([one for one in group["params"] if one not in spared], config.weight_decay),
            ([one for one in group["params"] if one in spared], 0.0),
        )
        if parameters
    ]
    fused = _is_fused([parameter for group in groups for parameter in group["params"]])
    beta1, beta2 = config.betas
    return AdamW(parts, lr=0.0, betas=(beta1, beta2), fused=fused)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Groups, Set[nn.Parameter]], Optimizer]] = {
    "sgd": _sgd,
    "lars": _lars,
    "adamw": _adamw,
}
HIGHEST_LRS = {"adamw": 0.01}
"""Learning rates from which on the optimiser's scale was probably mistaken."""


def build_optimizer(
    config: OptimizerConfig, module: nn.Module, lr_factors: Mapping[str, float] | None = None
) -> Optimizer:
    """An optimiser of the module's trainable parameters with learning rate 0, until `set_lr`.

    Args:
        config: Its name and options.
        module: What it trains.
        lr_factors: By name of a submodule the multiple of the learning rate that its parameters are
            trained with; all others are trained with the learning rate itself.
    """
    groups = _groups(module, lr_factors or {})
    optimizer = lookup(OPTIMIZERS, config.name, "optimizer")(config, groups, _spared(module))
    optimizer.register_load_state_dict_pre_hook(_refuse_other_groups)
    optimizer.register_load_state_dict_post_hook(_adapt_to_device)
    return optimizer


def _groups(module: nn.Module, lr_factors: Mapping[str, float]) -> Groups:
    """First the parameters that have no factor of their own, then those of each submodule."""
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in ("", *lr_factors)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            owner = next((part for part in lr_factors if name.startswith(f"{part}.")), "")
            parts[owner].append(parameter)
    assert all(parts[part] for part in lr_factors), (lr_factors, "name no trainable parameters")
    return [
        {"params": parameters, "lr_factor": lr_factors.get(part, 1.0)}
        for part, parameters in parts.items()
    ]


def _spared(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that AdamW does not decay: vectors, biases, and those that networks of timm name.

    Vectors are scales and shifts of normalisation, and scales of layers. timm's networks name
    position embeddings and class tokens, or patterns of names, in `no_weight_decay`.
    """
    spared = {
        parameter
        for name, parameter in module.named_parameters()
        if parameter.ndim <= 1 or name.endswith(".bias")
    }
    for part in module.modules():
        patterns: Iterable[str] = getattr(part, "no_weight_decay", tuple)()
        spared |= {
            parameter
            for name, parameter in part.named_parameters()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
    return spared


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameters, each group's times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def step_unless(optimizer: Optimizer, skip: Tensor) -> None:
    """Makes one step, unless `skip` (bool [], on the parameters' device) is true.

    Nothing waits for a GPU.
    """
    if skip.device.type == "cpu":
        if not skip:
            optimizer.step()
    else:
        # Read on the GPU, as a GradScaler's.
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        optimizer.step()


def _refuse_other_groups(optimizer: Optimizer, state: dict[str, Any]) -> None:
    found, expected = len(state["param_groups"]), len(optimizer.param_groups)
    if found != expected:
        raise ValueError(
            f"the checkpoint has {found} groups of parameters, this version trains {expected}: "
            "go on with the version that wrote it, or choose another run_dir"
        )


def _adapt_to_device(optimizer: Optimizer) -> None:
    """Adapts a loaded state to this device, whichever it was written on.

    Moments get the memory format of their parameter, because fused kernels go through both as if
    they had the same. AdamW's number of steps is a scalar of its own.
    """
    for group in optimizer.param_groups:
        group.setdefault("lr_factor", 1.0)  # checkpoints of versions without factors lack it
        if "fused" in group:
            group["fused"] = _is_fused(group["params"])
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            state[key] = (
                value.to(parameter.device)
                if key == "step"
                else torch.empty_like(parameter).copy_(value)
            )


def warn_of_schedule(config: OptimizerConfig, num_epochs: float) -> None:
    """Logs a warning where the schedule does not fit into so many epochs."""
    if config.warmup_epochs >= num_epochs:
        log.warning(
            "the learning rate rises for %g epochs, but the run ends after %.2g: it never reaches "
            "its peak; see optimizer.warmup_epochs",
            config.warmup_epochs,
            num_epochs,
        )
    late = [milestone for milestone in config.milestones if milestone >= num_epochs]
    if config.schedule is ScheduleName.step and late:
        log.warning(
            "optimizer.milestones %s lie beyond the end of the run after %.3g epochs",
            late,
            num_epochs,
        )


def warn_of_rate(config: OptimizerConfig, lr: float, batch_size: int) -> None:
    """Logs a warning where the rate suits another optimiser, at a batch of 256 and at this one."""
    highest = HIGHEST_LRS.get(config.name)
    if highest is not None and min(lr, peak_lr(lr, batch_size)) >= highest:
        log.warning(
            "a learning rate of %g (at a batch of 256) is of SGD's scale: %s moves each weight by "
            "about the learning rate in every step; its usual rates are 1e-4 to 1e-3, see "
            "optimizer.lr",
            lr,
            config.name,
        )
