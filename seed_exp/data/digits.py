"""The embedded data: real handwritten digits that come with scikit-learn, no download."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from seed_exp.data.decode import encode_png

NUM_TRAIN = 1437


class DigitsSource:
    """1797 handwritten digits, 8x8 pixels of 17 grey levels, enlarged to 32x32 RGB (bilinear).

    The images are in the order in which 13 people wrote them, so the split is not shuffled: `train`
    is the first 1437, `val` the last 360, mostly by people who wrote none of the training images.
    https://archive.ics.uci.edu/dataset/80
    """

    def __init__(self, split: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        part = slice(NUM_TRAIN) if split == "train" else slice(NUM_TRAIN, None)
        self._split = split
        self._first = part.start or 0
        self.labels = labels[part].astype(np.int64)
        small = torch.from_numpy(pixels[part]).reshape(-1, 1, 8, 8) * (255 / 16)
        self._images = F.interpolate(small, size=32, mode="bilinear").round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, 32, 32]."""
        return self._images[index].repeat(3, 1, 1)

    def encoded(self, index: int) -> bytes:
        """Image `index` as a PNG file."""
        return encode_png(self.image(index))

    def key(self, index: int) -> str:
        """Number of the image in scikit-learn's set."""
        return f"digit-{self._first + index:04d}"

    def fingerprint(self) -> str:
        """Split, number of images, and a hash of pixels and labels."""
        digest = hashlib.sha256(self._images.numpy().tobytes() + self.labels.tobytes()).hexdigest()
        return f"digits:{self._split}:{len(self)}:{digest[:16]}"
