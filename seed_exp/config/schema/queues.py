"""The size of a queue, which may follow the number of images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, TypeVar, cast

Q = TypeVar("Q", bound="WithQueue")


class WithQueue:
    """Base of options with a queue, whose size may follow the number of images."""

    queue_size: Any
    """Embeddings kept, or auto: as `auto_queue_size` says.

    OmegaConf 2.3 does not take int | str in options that a config group brings.
    """
    published_queue_size: ClassVar[int] = 65536
    """Size that auto takes where there are at least as many images."""

    @property
    def queue_length(self) -> int:
        """`queue_size` as a number; auto without images, as in a bench, is the published one."""
        return self.published_queue_size if self.queue_size == "auto" else int(self.queue_size)

    def sized_for(self: Q, num_images: int) -> Q:
        """The options with the number that auto stands for.

        Raises:
            ValueError: another option does not go with that number.
        """
        if self.queue_size != "auto":
            return self
        size = auto_queue_size(num_images, self.published_queue_size)
        sized: Q = replace(cast("Any", self), queue_size=size)  # those that inherit are dataclasses
        return sized

    def require_queue_size(self, owner: str) -> None:
        """Checks the size; `owner` is the group of options that has it."""
        size = self.queue_size
        is_number = isinstance(size, int) and not isinstance(size, bool)
        if size != "auto" and not (is_number and size > 0):
            raise ValueError(
                f"{owner}.queue_size must be a positive number of embeddings, or auto, got {size}"
            )


def auto_queue_size(num_images: int, largest: int) -> int:
    """`largest` with at least as many images, else the largest power of two in half of them.

    So no image is in the queue twice. LightlyTrain sizes its queue in the same way: from a quarter
    to a half of the images.
    """
    return largest if num_images >= largest else 2 ** max(0, (num_images // 2).bit_length() - 1)
