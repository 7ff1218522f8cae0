"""Images of a source with their masks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.data.mask_sets import MaskedImages
from seed_exp.data.sources import Source, Subset


class ImagesAndMasks:
    """A source whose images have their mask as a fourth channel.

    Args:
        images: Images of a data set with masks, all or some.

    Raises:
        ValueError: they have no masks.
    """

    labels: NDArray[np.int64] | None = None

    def __init__(self, images: Source) -> None:
        self.images = images
        whole: Source = images
        indices = np.arange(len(images))
        while isinstance(whole, Subset):
            indices = whole.indices[indices]
            whole = whole.source
        if not isinstance(whole, MaskedImages):
            raise ValueError(f"{images.fingerprint()} has images without masks")
        self._whole, self._indices = whole, indices
        self.num_classes = whole.num_classes
        """Number of classes, which masks are checked against; None = not known yet."""

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """Pixels and mask of image `index`, uint8 [4, H, W].

        Raises:
            ValueError: one of them cannot be read, or as `MaskedImages.checked_mask`.
        """
        pixels = self.images.image(index)
        height, width = pixels.shape[1:]
        return torch.cat([pixels, self.mask(index, (height, width))[None]])

    def mask(self, index: int, size: tuple[int, int]) -> Tensor:
        """Checked mask of image `index`, which has this height and width: uint8 [H, W]."""
        return self._whole.checked_mask(int(self._indices[index]), size, self.num_classes)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, from its header; ValueError if it has none."""
        return self._whole.size(int(self._indices[index]))

    def encoded(self, index: int) -> bytes:
        """The file of image `index`."""
        return self.images.encoded(index)

    def key(self, index: int) -> str:
        """Name of the image in the whole source."""
        return self.images.key(index)

    def fingerprint(self) -> str:
        """That of the images, which depends on the masks too."""
        return self.images.fingerprint()
