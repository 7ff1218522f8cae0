"""Decodes image files to tensors."""

from __future__ import annotations

import functools
import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
"""Formats that Pillow may read here; for some others it starts programs (EPS: Ghostscript)."""

_MAX_SCANNED = 4_000_000_000
"""Pixels of a JPEG times its scans: some seconds of decoding. 12 scans of 333 million pixels."""

_STRIP = 1 << 22
"""Pixels that are converted at once."""

_START_OF_SCAN = b"\xff\xda"
_EXIF = b"Exif\0\0"
_TRANSPOSED = (5, 6, 7, 8)
_FLIPPED = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}
"""EXIF orientation -> dimensions of [3, H, W] to flip after the transposition."""


class _TooManyScansError(Exception):
    """No ValueError, which would hand the file to Pillow."""


def decode(data: bytes, key: str) -> Tensor:
    """The image in `data`, upright (EXIF orientation applied), without its alpha channel.

    simplejpeg decodes JPEGs: the same pixels as Pillow's in two thirds of the time. Pillow decodes
    the rest, and decides about JPEGs that are damaged or so large that they can only be an attack
    or an accident.

    Args:
        data: A whole image file in one of _FORMATS; the first frame of an animation is taken.
        key: Name of the image, for errors.

    Returns:
        RGB pixels, uint8 [3, H, W], channels last in memory.

    Raises:
        ValueError: the file is empty, truncated, broken, too large or not an image; the message
            names `key`.
    """
    try:
        with suppress(ValueError):
            height, width, *_ = decode_jpeg_header(data)
            _refuse_many_scans(data, height * width)
            if height * width <= (Image.MAX_IMAGE_PIXELS or height * width):
                # Without EXIF data we save Pillow's reading of the header, 0.08 ms.
                has_exif = _EXIF in data[: data.find(_START_OF_SCAN)]
                return _upright(
                    torch.from_numpy(decode_jpeg(data)).permute(2, 0, 1),
                    _orientation(data) if has_exif else 1,
                )
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return pixels_of(image)
    # Pillow's readers let errors of their parsers escape: SyntaxError, struct.error, IndexError ...
    except Exception as error:
        reason = _reason(data, error)
        raise ValueError(f"cannot decode image {key!r} ({len(data)} bytes): {reason}") from error


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file as `decode` returns it, from its header.

    Raises:
        ValueError: the file is absent or not an image.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _TRANSPOSED
            return (width, height) if turned else (height, width)
    except Exception as error:  # as in decode
        reason = getattr(error, "strerror", None) or _reason(b"?", error)
        raise ValueError(f"cannot read image {path}: {reason}") from error


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):  # it names an object in memory
        return "an unknown format, or channels that are neither grey nor RGB"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def pixels_of(image: Image.Image) -> Tensor:
    """RGB pixels of a Pillow image, upright as its EXIF orientation says, uint8 [3, H, W].

    Errors as `to_tensor`.
    """
    return _upright(to_tensor(image), image.getexif().get(ExifTags.Base.Orientation, 1))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB pixels of a Pillow image of any integer mode, uint8 [3, H, W].

    16-bit greys lose their lower 8 bits.

    Raises:
        ValueError: the pixels are floating-point numbers, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError(
            "floating-point pixels have no known range; convert the image to 8 or 16 bits"
        )
    width, height = image.size
    num_rows = max(1, _STRIP // width)
    # Strip by strip: a conversion of a whole image would hold it three times.
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, num_rows):
        bottom = min(height, top + num_rows)
        strip = image if num_rows >= height else image.crop((0, top, width, bottom))
        pixels[top:bottom] = np.asarray(_rgb(strip))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # convert() would clip 16-bit values at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # via RGBA: else Pillow warns about transparent palette colours
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.cache
def _formats() -> list[str]:
    """The entries of _FORMATS that this build of Pillow and its plugins support."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [name for name in _FORMATS if name in Image.OPEN]


def readable(format_: str) -> bool:
    """Whether files of a format such as "AVIF" can be read in this installation."""
    return format_ in _formats()


def _refuse_many_scans(data: bytes, num_pixels: int) -> None:
    """Refuses JPEGs that take minutes: a progressive one may go over all its pixels at will."""
    num_scans = data.count(_START_OF_SCAN)
    if num_scans * num_pixels > _MAX_SCANNED:
        raise _TooManyScansError(
            f"{num_scans} scans of {num_pixels:,} pixels; at most {_MAX_SCANNED:,} pixels are "
            "decoded in all scans together: save it again with fewer scans"
        )


def encode_png(pixels: Tensor) -> bytes:
    """The pixels, uint8 [3, H, W], as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _orientation(data: bytes) -> int:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Pixels [3, H, W] turned upright; EXIF orientation 1 and undefined values change nothing."""
    if orientation in _TRANSPOSED:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(_FLIPPED[orientation]) if orientation in _FLIPPED else pixels
