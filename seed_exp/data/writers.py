"""Converts a source to another layout; the image files are copied, or made smaller if asked for."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
from pybase64 import b64encode
from tqdm import tqdm

from seed_exp.base.files import naming, sole_process, sync_folder, write_json
from seed_exp.base.fingerprints import same_images
from seed_exp.config.schema import DataFormat
from seed_exp.data.image_folder import EXTENSIONS, ImageFolderSource
from seed_exp.data.loader import default_num_workers
from seed_exp.data.shards import ShardsSource, member_name
from seed_exp.data.shrinking import shrink
from seed_exp.data.sources import Source, Split
from seed_exp.data.tsv import TsvSource

_MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"GIF8": ".gif",
}
_MAGIC |= {b"II*\0": ".tif", b"MM\0*": ".tif"}
"""First bytes of a file -> extension, for images whose key has no extension."""

_LARGEST_FOLDER = 99_999


class Shrinking(NamedTuple):
    """How images are made smaller: as `shrink`."""

    size: int
    """Pixels of the shorter side."""
    quality: int
    """Quality of the JPEG files, 1 to 100."""


class _Image(NamedTuple):
    key: str
    label: int
    data: bytes


_Read = Callable[[range], Iterator[_Image]]
"""Yields the readable images of a range of indices."""


def convert(
    source: Source,
    split: Split,
    to: DataFormat,
    output: Path,
    *,
    shard_size: int,
    shrinking: Shrinking | None = None,
    on_bad: Callable[[int, str], None] | None,
) -> int:
    """Writes the images of `source` to `output`: as <split>.tsv, or as files or shards in <split>/.

    The result appears under its name when it is complete. If the process is killed, the next call
    continues (files, shards) or starts anew (TSV) and gives the same bytes.

    Args:
        source: The images to write.
        split: Split of the images, for the name of the result.
        to: Target layout.
        output: Folder of the result.
        shard_size: Images per tar file.
        shrinking: Makes the images smaller; None copies their files.
        on_bad: Called with index and error of each image whose file cannot be read; the image is
            left out. None = such an image is an error.

    Returns:
        Number of images in the result.

    Raises:
        ValueError: `output` holds something else; an image cannot be read; a key cannot be the name
            of a file, occurs twice, or would lead out of the folder; or the result lacks some of
            the images.
    """
    final = output / (f"{split}.tsv" if to is DataFormat.tsv else split)
    with naming(final), ExitStack() as until_done:
        if not final.exists():
            output.mkdir(parents=True, exist_ok=True)
            lock = output / f".{split}.convert.lock"
            until_done.enter_context(sole_process(lock, final, "choose another output"))
        return _convert(source, split, to, final, shard_size, shrinking, on_bad)


def _convert(
    source: Source,
    split: Split,
    to: DataFormat,
    final: Path,
    shard_size: int,
    shrinking: Shrinking | None,
    on_bad: Callable[[int, str], None] | None,
) -> int:
    """As `convert`, with the path of the result, to which no other process writes."""
    unfinished = final.with_name(f".{final.name}.partial")
    note = final.with_name(f".{split}.convert.json")
    task: dict[str, Any] = {"source": source.fingerprint(), "to": to.value} | (
        {"shard_size": shard_size} if to is DataFormat.shards else {}
    )
    if shrinking is not None:
        task |= shrinking._asdict()
    noted = json.loads(note.read_text()) if note.exists() else {}
    num_images = noted.pop("images", None)
    if noted and same_images(noted.get("source", ""), task["source"]):
        noted["source"] = task["source"]  # from an earlier version, or of moved images
    if (noted or final.exists()) and noted != task:
        made = f"was made with {noted}" if noted else "was not made by this command"
        raise ValueError(f"{final} {made}, but {task} is asked for; choose another output")
    if not final.exists():
        write_json(note, task)
        with tqdm(total=len(source), desc=f"{split} to {to.value}", unit="img") as progress:
            writers: dict[DataFormat, Callable[[Source, _Read, Path], int]] = {
                DataFormat.tsv: _write_tsv,
                DataFormat.image_folder: _write_folder,
                DataFormat.shards: partial(_write_shards, prefix=split, shard_size=shard_size),
            }
            num_images = writers[to](
                source, partial(_read, source, progress, shrinking, on_bad), unfinished
            )
        write_json(note, task | {"images": num_images})
        unfinished.rename(final)
        sync_folder(final.parent)
    found = len(_OPEN[to](final))
    if found != num_images:
        raise ValueError(
            f"{final} has {found} images, but {num_images} were written; delete it and start again"
        )
    return found


_OPEN: dict[DataFormat, Callable[[Path], Source]] = {
    DataFormat.tsv: TsvSource,
    DataFormat.image_folder: ImageFolderSource,
    DataFormat.shards: lambda folder: ShardsSource(sorted(folder.glob("*.tar"))),
}


def _read(
    source: Source,
    progress: tqdm,
    shrinking: Shrinking | None,
    on_bad: Callable[[int, str], None] | None,
    indices: range,
) -> Iterator[_Image]:
    def made(index: int, key: str, data: bytes) -> _Image:
        if shrinking is not None:
            smaller = shrink(data, key, *shrinking)
            if smaller is not data:
                data, key = smaller, _as_jpeg(key)
        return _Image(key, -1 if source.labels is None else int(source.labels[index]), data)

    # Decoding and encoding let other threads run; sources are read by this one only.
    num_threads = 0 if shrinking is None else max(1, default_num_workers(1))
    left, coming = iter(indices), deque[tuple[int, Callable[[], _Image]]]()
    with ThreadPoolExecutor(max(1, num_threads)) as threads:

        def begin(index: int) -> Callable[[], _Image]:
            try:
                parts = index, source.key(index), source.encoded(index)
            except ValueError as error:
                return partial(_raise, error)
            return threads.submit(made, *parts).result if num_threads else partial(made, *parts)

        while True:
            for index in islice(left, 1 + num_threads - len(coming)):
                coming.append((index, begin(index)))
            if not coming:
                return
            index, image = coming.popleft()
            progress.update()
            try:
                found = image()
            except ValueError as error:
                if on_bad is None:
                    raise
                on_bad(index, str(error))
            else:
                yield found


def _raise(error: Exception) -> NoReturn:
    raise error


def _as_jpeg(key: str) -> str:
    """The key of an image that has become a JPEG file: another known extension is replaced."""
    stem, dot, extension = key.rpartition(".")
    is_other = f".{extension.lower()}" in EXTENSIONS and extension.lower() not in ("jpg", "jpeg")
    return f"{stem}.jpg" if dot and is_other else key


def _write_tsv(source: Source, read: _Read, path: Path) -> int:
    count = 0
    with _synced(path) as file:
        for key, label, data in read(range(len(source))):
            if set("\t\r\n") & set(key) or not key.isprintable():
                raise ValueError(
                    f"image key {key!r} cannot stand in a line of a TSV file; rename the image"
                )
            file.write(b"%s\t%d\t%s\n" % (key.encode(), label, b64encode(data)))
            count += 1
    return count


def _write_folder(source: Source, read: _Read, folder: Path) -> int:
    place, classes = _placement(source)
    names: set[str] = set()
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for image in read(range(len(source))):
        path = folder / _add_unique(_safe(place(_named(image), image.label)), names)
        # After a kill, the file may already be there in whole or in part.
        if not path.exists() or path.read_bytes() != image.data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image.data)
    os.sync()
    return len(names)


def _placement(source: Source) -> tuple[Callable[[str, int], str], list[str]]:
    """(key, label) -> path below the output folder, and folders that must exist even if empty.

    Keys serve as paths if their first folders, sorted, have rising labels. Otherwise the folders
    are named by the labels, one for each label from 0 on.
    """
    if source.labels is None:
        return lambda name, _: _flat(_safe(name)), []
    if source.labels.min() < 0:
        raise ValueError(
            "a folder of classes cannot hold images without a label among others; "
            "convert to tsv or shards"
        )
    pairs = set()
    for index, label in enumerate(source.labels.tolist()):
        folder, slash, _ = source.key(index).partition("/")
        pairs.add((os.fsencode(folder) if slash else b"", label))
    folders, labels = zip(*sorted(pairs), strict=True)
    if b"" not in folders and len(set(folders)) == len(pairs) and (np.diff(labels) > 0).all():
        return lambda name, _: name, []
    if max(labels) > _LARGEST_FOLDER:
        raise ValueError(
            f"labels up to {max(labels)} are too many folders; convert to tsv or shards"
        )
    return lambda name, label: f"{label:05d}/{_flat(_safe(name))}", [
        f"{label:05d}" for label in range(max(labels) + 1)
    ]


def _write_shards(
    source: Source, read: _Read, folder: Path, *, prefix: str, shard_size: int
) -> int:
    folder.mkdir(exist_ok=True)
    count = 0
    for number, first in enumerate(range(0, len(source), shard_size)):
        path = folder / f"{prefix}-{number:06d}.tar"
        if path.exists():  # complete: written before a kill
            count += len(ShardsSource([path]))
            continue
        names: set[str] = set()
        unfinished = path.with_name(f".{path.name}.partial")
        with _synced(unfinished) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for image in read(range(first, min(first + shard_size, len(source)))):
                name = member_name(_safe(_named(image)))
                sample = _add_unique(name.rpartition(".")[0], names)
                _add(archive, name, image.data)
                if image.label != -1:
                    _add(archive, f"{sample}.cls", str(image.label).encode())
        count += len(names)
        unfinished.rename(path)
    return count


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no user and no time: the same images give the same bytes
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A new file that is synced to disk when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _named(image: _Image) -> str:
    """The image's key with an extension, taken from the content if the key has none."""
    if image.key.lower().endswith(EXTENSIONS):
        return image.key
    extension = next(
        (extension for magic, extension in _MAGIC.items() if image.data.startswith(magic)), None
    )
    if extension is None:
        raise ValueError(
            f"image {image.key!r} has neither a known extension ({' '.join(EXTENSIONS)}) "
            "nor a known content"
        )
    return image.key + extension


def _safe(name: str) -> str:
    """`name`, checked to be a path that stays visible inside its folder.

    Raises:
        ValueError: the path would lead out of the folder, or be hidden in it.
    """
    if "\0" in name or any(part in ("", "..") or part.startswith(".") for part in name.split("/")):
        raise ValueError(
            f"image key {name!r} cannot be a path below the output folder; "
            "rename the image, or convert to tsv"
        )
    return name


def _flat(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F")


def _add_unique(name: str, names: set[str]) -> str:
    """`name`, after adding it to `names`.

    Raises:
        ValueError: it was already in `names`.
    """
    if name in names:
        raise ValueError(f"two images would be named {name!r}; rename one, or convert to tsv")
    names.add(name)
    return name
