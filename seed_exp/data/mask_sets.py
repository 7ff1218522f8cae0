"""Images with masks, which have a class for each pixel: VOC 2012, ADE20k, and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_exp.config.schema import IGNORED
from seed_exp.data.decode import size_of
from seed_exp.data.fingerprints import middle_of, sample_hash, sizes_of
from seed_exp.data.image_folder import EXTENSIONS
from seed_exp.data.listed_images import ListedImages, listed_in

_GREYS = ("1", "L", "P", "I", "I;16")
_SPREAD = {"L;2": 85, "L;4": 17}
"""Kind of grey PNG file -> factor by which Pillow multiplies its values."""
_ADE_SPLITS = {"train": "training", "val": "validation"}


class MaskedImages(ListedImages):
    """Images with masks, as a source whose images have no labels.

    Args:
        name: Name of the data set and its split.
        files: The image files [n].
        mask_files: PNG file of each image's mask [n], with palette or grey.
        num_classes: Number of classes; None = the masks' values say it.
        zero_is_ignored: Whether a mask's classes are numbered from 1, and 0 is ignored.

    Raises:
        ValueError: there are no images, or one has no mask.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        mask_files: Sequence[Path],
        num_classes: int | None,
        *,
        zero_is_ignored: bool = False,
    ) -> None:
        super().__init__(files)
        self.name, self.mask_files, self.num_classes = name, mask_files, num_classes
        self.zero_is_ignored = zero_is_ignored
        self._mask_sizes = sizes_of(mask_files)
        missing = np.flatnonzero(self._mask_sizes < 0)
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(files)} images have no mask: {files[missing[0]]} "
                f"needs {mask_files[missing[0]]}"
            )
        self._fingerprint: str | None = None

    def mask(self, index: int) -> Tensor:
        """Class of each pixel of image `index`: uint8 [H, W], IGNORED where there is none.

        Raises:
            ValueError: it cannot be read, or is no PNG file with palette or grey.
        """
        path = self.mask_files[index]
        try:
            with Image.open(path, formats=["PNG"]) as image:
                mode = image.mode
                # Pillow spreads greys of few bits over 0 to 255.
                spread = _SPREAD.get(str(image.tile[0][3]), 1)
                values = np.asarray(image).astype(np.int64) if mode in _GREYS else np.empty(0)
                values //= spread
        except Exception as error:  # Pillow's readers raise many kinds
            reason = getattr(error, "strerror", None) or "not a whole PNG file"
            raise ValueError(f"cannot read mask {path}: {reason}") from error
        if mode not in _GREYS:
            raise ValueError(
                f"mask {path} is a colour image ({mode}); a mask is a PNG file with palette or "
                "grey, whose values are the numbers of the classes"
            )
        if values.max(initial=0) > IGNORED:
            raise ValueError(
                f"mask {path} has the value {values.max()}; classes are numbered up to "
                f"{IGNORED - 1}, and {IGNORED} is ignored"
            )
        if self.zero_is_ignored:
            values = np.where(values == IGNORED, IGNORED, (values - 1) % (IGNORED + 1))
        return torch.from_numpy(values.astype(np.uint8))

    def checked_mask(self, index: int, size: tuple[int, int], num_classes: int | None) -> Tensor:
        """As `mask`, for an image of this height and width.

        Raises:
            ValueError: as `mask`, or the mask has another size, or a class that there is not.
        """
        mask, path = self.mask(index), self.mask_files[index]
        if tuple(mask.shape) != size:
            raise ValueError(
                f"mask {path} is {list(mask.shape)} pixels high and wide, its image "
                f"{self.files[index]} is {list(size)}; a mask needs the size of its image"
            )
        wrong = mask[(mask != IGNORED) & (mask >= (num_classes or IGNORED))]
        if len(wrong):
            first = int(self.zero_is_ignored)
            assert num_classes is not None
            raise ValueError(
                f"mask {path} has the value {int(wrong.max()) + first}; the classes are {first} to "
                f"{num_classes - 1 + first}, and {'0' if first else IGNORED} is ignored"
            )
        return mask

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, from its header; ValueError if it has none."""
        return size_of(self.files[index])

    def fingerprint(self) -> str:
        """Name, number of images, hashes of sizes and bytes of masks and of images."""
        if self._fingerprint is None:
            masks = _hash(self.mask_files, self._mask_sizes)
            images = _hash(self.files, sizes_of(self.files))
            self._fingerprint = f"{self.name}:{len(self)}:{masks}+{images}"
        return self._fingerprint


def load_voc_masks(root: Path, split: Literal["train", "val"]) -> MaskedImages:
    """Semantic segmentation of VOC 2012: 21 classes with the background, 0; outlines are ignored.

    Args:
        root: Folder VOC2012, with JPEGImages, SegmentationClass and ImageSets/Segmentation, or the
            VOCdevkit that holds it.
        split: Split to load: 1,464 or 1,449 images.

    Raises:
        ValueError: a file is missing.
    """
    home = root / "VOC2012" if (root / "VOC2012").is_dir() else root
    kind = "VOC2012/ImageSets/Segmentation, or ImageSets/Segmentation"
    names = listed_in(home / "ImageSets" / "Segmentation" / f"{split}.txt", kind, root).split()
    if not names:
        raise ValueError(f"{home}/ImageSets/Segmentation/{split}.txt names no image")
    return MaskedImages(
        f"voc_masks:{split}",
        [home / "JPEGImages" / f"{name}.jpg" for name in names],
        [home / "SegmentationClass" / f"{name}.png" for name in names],
        num_classes=21,
    )


def load_ade20k(root: Path, split: Literal["train", "val"]) -> MaskedImages:
    """ADE20k as the scene parsing challenge of 2016 has it: 150 classes, 0 in a mask is ignored.

    Args:
        root: Folder ADEChallengeData2016, with images/training, images/validation,
            annotations/training and annotations/validation.
        split: Split to load: 20,210 or 2,000 images.

    Raises:
        ValueError: a file is missing.
    """
    part = _ADE_SPLITS[split]
    files, masks = _pairs(root / "images" / part, root / "annotations" / part, root)
    return MaskedImages(f"ade20k:{split}", files, masks, num_classes=150, zero_is_ignored=True)


def load_mask_folder(images: Path, masks: Path, root: Path) -> MaskedImages:
    """The images of a folder, whose masks have the same names in another one, ending in .png.

    Args:
        images: Folder of the images; those of folders in it count too.
        masks: Folder of the masks.
        root: data.root, for errors.

    Raises:
        ValueError: there are no images, or one has no mask.
    """
    return MaskedImages(f"mask_folder:{images.name}", *_pairs(images, masks, root), None)


def _hash(files: Sequence[Path], sizes: NDArray[np.int64]) -> str:
    return sample_hash(len(files), lambda index: middle_of(files[index]), sizes)


def _pairs(images: Path, masks: Path, root: Path) -> tuple[list[Path], list[Path]]:
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(
                f"no folder {folder}; data.root={root} should be the folder that holds "
                f"{images.relative_to(root)} and {masks.relative_to(root)}"
            )
    files = sorted(
        file
        for file in images.rglob("*")
        if file.suffix.lower() in EXTENSIONS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(images).parts)
    )
    if not files:
        raise ValueError(f"no images in {images}")
    return files, [masks / file.relative_to(images).with_suffix(".png") for file in files]
