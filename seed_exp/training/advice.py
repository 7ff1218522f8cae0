"""Advice before training, on options that do not fit the number of images."""

from __future__ import annotations

import math

from seed_exp.config.schema import DistillConfig, PairwiseConfig, PretrainConfig, QueueInit
from seed_exp.config.schema.queues import WithQueue, auto_queue_size

FEW_IMAGES = 100_000
"""Images below which LightlyTrain's documentation recommends more epochs."""
EPOCHS_OF_FEW = (200, 2000)
"""Epochs that it recommends for fewer images: "small datasets (<100k images): 200-2000"."""
IMAGES_SEEN = EPOCHS_OF_FEW[0] * FEW_IMAGES
"""Images that the shortest of these trainings sees if the set is as large as such a set can be."""


def length_advice(config: DistillConfig | PretrainConfig, num_images: int) -> list[str]:
    """A sentence on a training that is short for a small set, with the recommended steps.

    Recommended are as many steps as see `IMAGES_SEEN` images, and at most the longest of
    `EPOCHS_OF_FEW`: the fewer images, the more epochs. None if the batch size is not known yet.
    """
    if not isinstance(config.batch_size, int) or num_images >= FEW_IMAGES:
        return []
    per_epoch = max(1, num_images // config.batch_size)
    least, most = EPOCHS_OF_FEW
    epochs = min(most, max(least, math.ceil(IMAGES_SEEN / num_images)))
    steps = config.steps or config.epochs * per_epoch
    if steps >= epochs * per_epoch:
        return []
    return [
        f"a short training: {steps:,} steps of {config.batch_size} images are "
        f"{steps / per_epoch:,.4g} epochs of {num_images:,} images; recommended for so few are "
        f"about {epochs * per_epoch:,} steps (epochs={epochs}; sources: --help)"
    ]


def resolution_advice(config: DistillConfig | PretrainConfig) -> list[str]:
    """A sentence on phases of views that do not end at the recipe's own size."""
    views, size = config.views, config.views.crops["global"].size
    if views.resolution is None or size in (last := views.resolution[-1][1:]):
        return []
    return [
        f"views.resolution ends with global views of {' and '.join(map(str, last))} pixels, and "
        f"views.crops.global.size={size} is none of them: teacher.size and later evaluations with "
        f"labels go by {size}, and evaluation views have {views.eval_size}; choose "
        f"views.crops.global.size={last[0]}, or another last phase"
    ]


def large_queue_advice(
    option: str, config: WithQueue, num_images: int, num_bytes: int
) -> list[str]:
    """A sentence on a queue that is larger than the data.

    Args:
        option: The option that gives its size.
        config: The options with it.
        num_images: Training images.
        num_bytes: Bytes of all queues in a checkpoint.
    """
    size = config.queue_length
    if size <= num_images:
        return []
    return [
        f"the queue is larger than the data: its {size:,} embeddings are of {num_images:,} images, "
        f"each of which is in it about {size / num_images:,.1f} times, and each checkpoint has "
        f"{num_bytes / 1e6:,.0f} MB of them; {_automatic(option, config, num_images)} holds each "
        "image at most once"
    ]


def queue_advice(config: DistillConfig, num_images: int, embedding_dim: int) -> list[str]:
    """A sentence for each way in which the queue's size does not fit the run, with the remedy.

    Args:
        config: All options.
        num_images: Training images.
        embedding_dim: Width of an embedding.
    """
    objective, option = config.objective, "objective.queue_size"
    size, num_queues = (
        objective.queue_length,
        sum(crop.num > 0 for crop in config.views.crops.values()),
    )
    num_bytes = size * embedding_dim * 4 * num_queues
    advice = large_queue_advice(option, objective, num_images, num_bytes)
    if isinstance(config.batch_size, int):
        num_steps = config.steps or config.epochs * (num_images // config.batch_size)
        seen = num_steps * config.batch_size
        is_compared = not isinstance(objective, PairwiseConfig)
        if objective.queue_init is QueueInit.random and is_compared and seen < size:
            smaller = _automatic(option, objective, num_images) if advice else f"a smaller {option}"
            advice.append(
                f"the queue is never filled: the run puts {seen:,} embeddings into it, the other "
                f"{size - seen:,} stay random vectors, which no image resembles; "
                f"choose {smaller}, or objective.queue_init=teacher"
            )
    return advice


def _automatic(option: str, config: WithQueue, num_images: int) -> str:
    return f"{option}={auto_queue_size(num_images, config.published_queue_size)} (that is auto)"
