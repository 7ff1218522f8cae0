"""Whatever bytes an image file holds: pixels, or an error that names the image."""

from __future__ import annotations

import io
from typing import Any

import torch
from fuzzing import assert_ours, damaged, fuzz
from hypothesis import strategies as st
from PIL import Image

from seed_exp.data.decode import decode

EXIF = Image.Exif()
EXIF[274] = 6
FORMATS = [
    ("JPEG", "RGB", {"quality": 60}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "L", {"exif": EXIF}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "I;16", {}),
    ("WEBP", "RGB", {"quality": 50}),
    ("GIF", "P", {}),
    ("TIFF", "F", {"compression": "tiff_deflate"}),
    ("BMP", "1", {}),
    ("JPEG2000", "RGB", {}),
    ("PPM", "RGB", {}),
]
"""Format, mode, options of the encoder."""


def encoded(kind: str, mode: str, options: dict[str, Any]) -> bytes:
    """An image of 24 x 16 pixels."""
    picture = Image.effect_noise((24, 16), 80).convert("I").convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


IMAGES = [encoded(*entry) for entry in FORMATS]


def check(data: bytes) -> bool:
    """Whether `data` is an image; an error of another kind than ours is raised."""
    try:
        pixels = decode(data, "some/image.jpg")
    except ValueError as error:
        assert_ours(error, "some/image.jpg")
        return False
    assert pixels.dtype == torch.uint8
    assert pixels.ndim == 3
    assert pixels.shape[0] == 3
    assert pixels.numel() > 0
    assert 0 <= int(pixels.sum()) <= 255 * pixels.numel()  # every pixel can be read
    return True


@fuzz(250, data=st.data())
def test_a_damaged_image_is_pixels_or_our_error(data: st.DataObject) -> None:
    check(data.draw(damaged(data.draw(st.sampled_from(IMAGES)))))


@fuzz(
    60,
    header=st.sampled_from([image[:length] for image in IMAGES for length in (2, 12, 40)]),
    rest=st.binary(max_size=100),
)
def test_any_bytes_behind_a_valid_beginning_are_our_error(header: bytes, rest: bytes) -> None:
    check(header + rest)


def test_whole_images_are_read() -> None:
    assert [check(image) for image in IMAGES] == [mode != "F" for _, mode, _ in FORMATS]
