"""Image files to tensors."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from seed_exp.data.decode import decode, to_tensor


def photo(height: int = 37, width: int = 53) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 6, columns * 4, (rows + columns) * 2], -1).astype(np.uint8))


def encode(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def reference(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).transpose(2, 0, 1)


def test_photographs_have_pillows_pixels(shared: Path) -> None:
    lines = (shared / "data" / "imagenet_samples.tsv").read_text().splitlines()
    for line in lines[::6]:
        data = base64.b64decode(line.split("\t")[2])
        difference = np.abs(decode(data, "x").numpy().astype(int) - reference(data).astype(int))
        assert difference.max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_colour_space_become_rgb(mode: str) -> None:
    data = encode(photo().convert(mode), "JPEG", quality=95)
    image = decode(data, "x")
    assert image.dtype == torch.uint8
    assert image.shape == (3, 37, 53)
    assert np.abs(image.numpy().astype(int) - reference(data).astype(int)).max() <= 2


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format_: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    image = decode(encode(photo(), format_, exif=exif.tobytes(), quality=95), "x")
    upright = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 6: lambda a: np.rot90(a, -1)}
    upright |= {5: lambda a: a.transpose(1, 0, 2), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}
    expected = upright[orientation](np.asarray(photo())).transpose(2, 0, 1)
    assert image.shape == expected.shape
    assert np.abs(image.numpy().astype(int) - expected.astype(int)).mean() < 6


@pytest.mark.parametrize("format_", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_lossless_formats_keep_grey_pixels(format_: str) -> None:
    grey = photo().convert("L")
    options = {"lossless": True} if format_ == "WEBP" else {}
    image = decode(encode(grey, format_, **options), "x")
    assert np.array_equal(image.numpy(), np.repeat(np.asarray(grey)[None], 3, 0))


def test_palettes_and_transparency_give_their_colours_without_a_warning() -> None:
    palette = photo().quantize(16)
    data = encode(palette, "PNG", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode(data, "x")
    assert np.array_equal(image.numpy(), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    transparent = photo()
    transparent.putalpha(7)
    assert np.array_equal(decode(encode(transparent, "PNG"), "x").numpy(), np.asarray(photo()).transpose(2, 0, 1))


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    image = decode(encode(Image.fromarray(grey), "PNG"), "x")
    assert np.array_equal(image.numpy(), np.repeat((grey >> 8).astype(np.uint8)[None], 3, 0))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        to_tensor(Image.fromarray(np.ones((4, 4), np.float32)))


JPEG, PNG = encode(photo(), "JPEG"), encode(photo(), "PNG")
BROKEN = {
    "empty": b"",
    "text": b"this is not an image" * 9,
    "zeros": bytes(1000),
    "jpeg header only": JPEG[:4],
    "jpeg cut in half": JPEG[: len(JPEG) // 2],
    "jpeg without its end": JPEG[:-20],
    "png cut in half": PNG[: len(PNG) // 2],
    "png with a wrong byte": PNG[: len(PNG) // 2] + bytes([PNG[len(PNG) // 2] ^ 0xFF]) + PNG[len(PNG) // 2 + 1 :],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_a_one_line_error_that_names_it(kind: str) -> None:
    with pytest.raises(ValueError, match=r"cannot decode image 'kitten\.jpg'") as caught:
        decode(BROKEN[kind], "kitten.jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_also_where_torchvision_cannot(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(photo().convert(mode), "JPEG", exif=exif.tobytes())
    expected = decode(data, "x")
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    assert (decode(data, "x").int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_a_decompression_bomb_is_refused(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photo(), format_)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"'big'.*decompression bomb"):
        decode(data, "big")
