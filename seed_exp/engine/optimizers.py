"""Optimisers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from seed_exp.config.schema import OptimizerConfig
from seed_exp.registry import lookup


class Lars(Optimizer):
    """Layer-wise adaptive rate scaling, arXiv:1708.03888, Algorithm 1.

    With the local rate trust_coefficient x |w| / (|g| + weight_decay x |w|), or 1 where that is no positive number:
    v = momentum x v + lr x local rate x (g + weight_decay x w), w = w - v.
    Vectors (biases, normalisation) take part neither in the scaling nor in weight decay.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float, trust_coefficient: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if parameter.ndim > 1:
                    weight_norm = parameter.norm()
                    denominator = gradient.norm() + group["weight_decay"] * weight_norm
                    local_rate = group["trust_coefficient"] * weight_norm / denominator
                    usable = (weight_norm > 0) & (denominator > 0)
                    gradient = gradient + group["weight_decay"] * parameter
                    gradient = gradient * torch.where(usable, local_rate, torch.ones_like(local_rate))
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(group["lr"] * gradient)
                parameter.sub_(state["momentum_buffer"])


def _sgd(config: OptimizerConfig, parameters: list[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)


def _lars(config: OptimizerConfig, parameters: list[nn.Parameter]) -> Optimizer:
    return Lars(parameters, 0.0, config.momentum, config.weight_decay, config.trust_coefficient)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, list[nn.Parameter]], Optimizer]] = {"sgd": _sgd, "lars": _lars}


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> Optimizer:
    """An optimiser of the module's trainable parameters with learning rate 0, until `set_lr`."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return lookup(OPTIMIZERS, config.name, "optimizer")(config, parameters)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
