"""Encoded image files to tensors."""

from __future__ import annotations

import functools
import io
from contextlib import suppress

import numpy as np
import torch
from PIL import ExifTags, Image
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may read here; left to itself it also tries formats for which it starts other programs (EPS: Ghostscript)."""

_START_OF_SCAN = b"\xff\xda"
_EXIF = b"Exif\0\0"
_TRANSPOSED = (5, 6, 7, 8)
_FLIPPED = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}
"""Dimensions of [3, H, W] to be flipped, after the transposition, by EXIF orientation."""


def decode(data: bytes, key: str) -> Tensor:
    """The image in `data`, upright (EXIF orientation applied), without its alpha channel.

    JPEGs are decoded by simplejpeg: the same pixels as Pillow's in two thirds of the time. Pillow decodes the rest, and decides
    about JPEGs that are damaged or so large that they can only be an attack or an accident.

    Args:
        data: A whole image file of one of _FORMATS; of an animation the first frame is taken.
        key: Name of the image, for errors.

    Returns:
        RGB pixels, uint8 [3, H, W], channels last in memory.

    Raises:
        ValueError: the file is empty, truncated, broken, too large or no image; the message names `key`.
    """
    try:
        with suppress(ValueError):
            height, width, *_ = decode_jpeg_header(data)
            if height * width <= (Image.MAX_IMAGE_PIXELS or height * width):
                # Pillow's reading of the header costs 0.08 ms.
                has_exif = _EXIF in data[: data.find(_START_OF_SCAN)]
                return _upright(
                    torch.from_numpy(decode_jpeg(data)).permute(2, 0, 1),
                    _orientation(data) if has_exif else 1,
                )
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return _upright(to_tensor(image), image.getexif().get(ExifTags.Base.Orientation, 1))
    # Pillow's readers let whatever their parsing meets escape: SyntaxError, struct.error, IndexError, zlib.error ...
    except Exception as error:
        reason = (
            "the file is empty"
            if not data
            else str(error).splitlines()[0]
            if str(error)
            else type(error).__name__
        )
        raise ValueError(f"cannot decode image {key!r} ({len(data)} bytes): {reason}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """RGB pixels of a Pillow image of any integer mode, uint8 [3, H, W]; 16-bit greys lose their lower 8 bits.

    Raises:
        ValueError: floating-point pixels, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError(
            "floating-point pixels have no known range; convert the image to 8 or 16 bits"
        )
    if image.mode.startswith("I"):  # convert() would clip 16-bit values at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if (
        image.mode == "P"
    ):  # by way of RGBA, because Pillow warns about transparent palette colours otherwise
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@functools.cache
def _formats() -> list[str]:
    """Of _FORMATS what this Pillow was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def encode_png(pixels: Tensor) -> bytes:
    """A PNG file of pixels, uint8 [3, H, W]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _orientation(data: bytes) -> int:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turns [3, H, W] as its EXIF orientation says, 1 (and what is not defined) = not at all."""
    if orientation in _TRANSPOSED:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(_FLIPPED[orientation]) if orientation in _FLIPPED else pixels
