"""Whatever bytes a tar of images holds: images, or an error that names the file."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzzing import assert_ours, damaged, fuzz
from hypothesis import strategies as st
from PIL import Image

from seed_exp.data.shards import ShardsSource


def _tar() -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 0, 0)).save(picture, "PNG")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(3):
            for name, content in (
                (f"a{number}.png", picture.getvalue()),
                (f"a{number}.cls", b"%d" % number),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()[: 13 * 512]  # without the zeros that fill up its last block of 10 KiB


TAR = _tar()


def read_everything(content: bytes, damage: Callable[[bytes], bytes] | None = None) -> int:
    """The number of images that could be read.

    Raises errors of other kinds than ours, and those that do not name the file.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "any.tar"
        path.write_bytes(content)
        if damage is not None:
            ShardsSource([path])
            (index,) = path.parent.glob("*.npy")
            index.write_bytes(damage(index.read_bytes()))
        try:
            source = ShardsSource([path])
        except ValueError as error:
            assert_ours(error, path.name)
            return 0
        good = 0
        for index in range(min(len(source), 20)):
            source.key(index)
            try:
                source.image(index)
                good += 1
            except ValueError as error:
                assert_ours(error, path.name)
        return good


@fuzz(60, content=damaged(TAR) | st.binary(max_size=60))
def test_a_damaged_tar_is_images_or_our_error(content: bytes) -> None:
    read_everything(content)


@fuzz(60, header=damaged(TAR[:512]))
def test_a_tar_with_another_header_of_the_right_checksum_is_images_or_our_error(
    header: bytes,
) -> None:
    header = header[:512].ljust(512, b"\0")
    blank = header[:148] + b" " * 8 + header[156:]
    read_everything(header[:148] + b"%06o\0 " % sum(blank) + header[156:] + TAR[512:])


@fuzz(80, data=st.data())
def test_a_damaged_index_of_a_tar_is_made_anew_or_our_error(data: st.DataObject) -> None:
    read_everything(TAR, lambda index: data.draw(damaged(index)))


def test_the_whole_tar_is_read() -> None:
    assert read_everything(TAR) == 3
