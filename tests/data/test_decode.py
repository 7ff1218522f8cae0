"""Image files to tensors."""

from __future__ import annotations

import base64
import io
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from seed_exp.data import decode as decode_module
from seed_exp.data.decode import decode, encode_png, to_tensor


def photo(height: int = 37, width: int = 53) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([rows * 6, columns * 4, (rows + columns) * 2], -1).astype(np.uint8)
    )


def encode(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def reference(data: bytes) -> np.ndarray:
    return np.asarray(
        ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    ).transpose(2, 0, 1)


def test_photographs_have_pillows_pixels(shared: Path) -> None:
    lines = (shared / "data" / "imagenet_samples.tsv").read_text().splitlines()
    for line in lines[::6]:
        data = base64.b64decode(line.split("\t")[2])
        assert np.array_equal(decode(data, "x").numpy(), reference(data))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_colour_space_become_rgb(mode: str) -> None:
    data = encode(photo().convert(mode), "JPEG", quality=95)
    image = decode(data, "x")
    assert image.dtype == torch.uint8
    assert image.shape == (3, 37, 53)
    assert np.abs(image.numpy().astype(int) - reference(data)).max() <= (1 if mode == "CMYK" else 0)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format_: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    image = decode(encode(photo(), format_, exif=exif.tobytes(), quality=95), "x")
    upright = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        6: lambda a: np.rot90(a, -1),
    }
    upright |= {
        5: lambda a: a.transpose(1, 0, 2),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
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
    assert np.array_equal(
        decode(encode(transparent, "PNG"), "x").numpy(), np.asarray(photo()).transpose(2, 0, 1)
    )


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    image = decode(encode(Image.fromarray(grey), "PNG"), "x")
    assert np.array_equal(image.numpy(), np.repeat((grey >> 8).astype(np.uint8)[None], 3, 0))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        to_tensor(Image.fromarray(np.ones((4, 4), np.float32)))


def tiff(pixels: np.ndarray, photometric: int) -> bytes:
    """A TIFF of integers [H, W, C] in one strip; further channels have no meaning."""
    height, width, channels = pixels.shape
    data = pixels.tobytes()
    tags = {256: [width], 257: [height], 258: [pixels.itemsize * 8] * channels, 259: [1]}
    tags |= {262: [photometric], 273: [8], 277: [channels], 278: [height], 279: [len(data)]}
    tags |= {338: [0] * (channels - (3 if photometric == 2 else 1)), 339: [1] * channels}
    entries = b""
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            packed, data = struct.pack("<I", 8 + len(data)), data + packed + bytes(-len(packed) % 4)
        entries += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    end = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + end


@pytest.mark.parametrize(
    ("photometric", "channels", "used"),
    [(2, 4, [0, 1, 2]), (2, 5, [0, 1, 2]), (2, 6, [0, 1, 2]), (1, 2, [0, 0, 0])],
)
def test_channels_of_a_tiff_beside_grey_or_rgb_are_left_out(
    photometric: int, channels: int, used: list[int]
) -> None:
    pixels = np.arange(12 * channels, dtype=np.uint8).reshape(3, 4, channels)
    image = decode(tiff(pixels, photometric), "x")
    assert np.array_equal(image.numpy(), pixels[..., used].transpose(2, 0, 1))


@pytest.mark.parametrize(("channels", "kind"), [(3, np.uint8), (5, np.uint8), (2, np.uint16)])
def test_a_tiff_whose_channels_have_no_meaning_is_refused(channels: int, kind: type) -> None:
    pixels = np.ones((3, 4, channels), kind)
    with pytest.raises(ValueError, match="channels that are neither grey nor RGB") as caught:
        decode(tiff(pixels, photometric=1), "x")
    assert "object at" not in str(caught.value)


def test_sixteen_bit_colours_lose_their_lower_half() -> None:
    pixels = np.arange(0, 36 * 1800, 1800, dtype=np.uint16).reshape(3, 4, 3)
    image = decode(tiff(pixels, photometric=2), "x")
    assert np.array_equal(image.numpy(), (pixels >> 8).transpose(2, 0, 1))


JPEG, PNG = encode(photo(), "JPEG"), encode(photo(), "PNG")
BROKEN = {
    "empty": b"",
    "text": b"this is not an image" * 9,
    "zeros": bytes(1000),
    "jpeg header only": JPEG[:4],
    "jpeg cut in half": JPEG[: len(JPEG) // 2],
    "jpeg without its end": JPEG[:-20],
    "png cut in half": PNG[: len(PNG) // 2],
    "png with a wrong byte": PNG[: len(PNG) // 2]
    + bytes([PNG[len(PNG) // 2] ^ 0xFF])
    + PNG[len(PNG) // 2 + 1 :],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_a_one_line_error_that_names_it(kind: str) -> None:
    with pytest.raises(ValueError, match=r"cannot decode image 'kitten\.jpg'") as caught:
        decode(BROKEN[kind], "kitten.jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpegs_are_decoded_by_pillow_with_the_same_result(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(photo().convert(mode), "JPEG", exif=exif.tobytes())
    expected = decode(data, "x")
    monkeypatch.setattr(decode_module, "decode_jpeg", None)  # must not be called
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 - 1)
    assert (decode(data, "x").int() - expected.int()).abs().max() <= (1 if mode == "CMYK" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "payload",
    [b"", b"junk", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 20],
)
def test_broken_exif_leaves_a_jpeg_as_it_is(payload: bytes) -> None:
    data = encode(photo(), "JPEG")
    segment = b"Exif\0\0" + payload
    data = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    assert np.array_equal(
        decode(data, "x").numpy(), np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_a_decompression_bomb_is_refused(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photo(), format_)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"'big'.*decompression bomb"):
        decode(data, "big")


def forged_png(side: int) -> bytes:
    """A small file that says it is a huge image."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return PNG[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + PNG[33:]


def forged_jpeg(side: int) -> bytes:
    start = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:start] + struct.pack(">HH", side, side) + JPEG[start + 4 :]


def forged_bmp(side: int) -> bytes:
    data = encode(photo(), "BMP")
    return data[:18] + struct.pack("<ii", side, side) + data[26:]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB")
@pytest.mark.parametrize("forge", [forged_png, forged_jpeg, forged_bmp])
def test_an_image_of_30000_by_30000_pixels_is_refused_before_they_are_allocated(
    forge: Callable[[int], bytes],
) -> None:
    assert Image.open(io.BytesIO(forge(100))).size == (100, 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError,
        match=r"cannot decode image 'huge' \(\d+ bytes\): .*900000000 pixels.*decompression bomb",
    ):
        decode(forge(30_000), "huge")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # of 2.7 GB


def many_scans(side: int, num: int) -> bytes:
    """A small progressive JPEG that goes over its pixels `num` times."""
    data = encode(photo().convert("L"), "JPEG", progressive=True)
    size, first = data.index(b"\xff\xc2") + 5, data.index(b"\xff\xda")
    start = data[:size] + struct.pack(">HH", side, side) + data[size + 4 : first]
    refinement = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 0, 0, 0x10) + bytes(16)
    first_scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 0, 0, 0x01) + bytes(16)
    return start + first_scan + (num - 1) * refinement + b"\xff\xd9"


def test_a_jpeg_that_would_take_minutes_is_refused_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(ValueError, match=r"'slow' \(\d+ bytes\): 500 scans of 81,000,000 pixels"):
        decode(many_scans(9000, 500), "slow")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 1
    assert decode(many_scans(200, 500), "quick").shape == (3, 200, 200)


TAKES = """
import resource, sys
from seed_exp.data.decode import decode
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
num = decode(data, "x").numel()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / num)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB")
@pytest.mark.parametrize(
    "mode",
    [pytest.param("1", marks=pytest.mark.slow), pytest.param("P", marks=pytest.mark.slow), "I;16"],
)
def test_a_conversion_takes_little_more_than_the_pixels(mode: str, tmp_path: Path) -> None:
    side = 9000
    image = Image.new(mode, (side, side))
    image.save(tmp_path / "x.tif", compression="tiff_deflate")
    command = [sys.executable, "-W", "ignore", "-c", TAKES, str(tmp_path / "x.tif")]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert ratio < 2.1  # times the bytes of the result: Pillow's own copy has 1 or 2 a pixel


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "RGBA", "I;16", "1"])
def test_strips_give_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.arange(64 * 50, dtype=np.uint16).reshape(64, 50) * 16
    image = Image.fromarray(grey) if mode == "I;16" else photo(64, 50).convert(mode)
    expected = to_tensor(image)
    monkeypatch.setattr(decode_module, "_STRIP", 7 * 50)
    assert torch.equal(to_tensor(image), expected)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_may_have_one_pixel(format_: str, mode: str) -> None:
    assert (
        decode(
            encode(Image.new(mode, (1, 1), 255 if mode == "L" else (255, 255, 255)), format_), "x"
        ).tolist()
        == [[[255]]] * 3
    )


def test_formats_for_which_pillow_starts_other_programs_are_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    with pytest.raises(ValueError, match="an unknown format"):
        decode(encode(photo(), "EPS"), "x")


def test_a_written_png_has_the_pixels_it_was_given() -> None:
    pixels = to_tensor(photo())
    assert torch.equal(decode(encode_png(pixels), "x"), pixels)


FILES = [
    JPEG,
    PNG,
    *(encode(photo(), format_) for format_ in ("WEBP", "BMP", "GIF", "TIFF", "PPM")),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILES), st.integers(0, 5000), st.binary(max_size=8), st.integers(0, 5000))
def test_whatever_happened_to_a_file_only_our_own_error_comes_out(
    data: bytes, place: int, put: bytes, length: int
) -> None:
    place %= len(data)
    damaged = (data[:place] + put + data[place + len(put) :])[: length or None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode(damaged, "kitten")
        except ValueError as error:
            message = str(error)
        else:
            message = "cannot decode image 'kitten'"
            assert (image.dtype, image.shape[0]) == (torch.uint8, 3)
    assert message.startswith("cannot decode image 'kitten'")
    assert "\n" not in message
