"""Learning rate as a function of how far training is."""

from __future__ import annotations

import math

from seed_exp.config.schema import OptimizerConfig, ScheduleName


def peak_lr(lr: float, batch_size: int) -> float:
    """Peak learning rate by the linear scaling rule (arXiv:1706.02677, Section 2.1).

    Args:
        lr: Peak learning rate at a batch of 256.
        batch_size: Images per optimiser step over all processes.
    """
    return lr * batch_size / 256


def lr_factor(config: OptimizerConfig, epoch: float, num_epochs: float) -> float:
    """Share of the peak learning rate to use, in [0, 1].

    Args:
        config: `warmup_epochs` in which the share rises linearly from 0, and the schedule after
            them: `cosine` falls from 1 to 0 at `num_epochs`, `step` multiplies by `gamma` after
            each of `milestones`, `constant` stays at 1.
        epoch: Epochs done, with fractions (step / steps_per_epoch): the rate changes at every step.
        num_epochs: Epochs in all.
    """
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    if config.schedule is ScheduleName.cosine:
        progress = (epoch - config.warmup_epochs) / max(num_epochs - config.warmup_epochs, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if config.schedule is ScheduleName.step:
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return 1.0
