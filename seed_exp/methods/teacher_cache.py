"""The teacher's embeddings on disk: one run computes them, and runs of other students read them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from seed_exp.base.files import write_json

log = logging.getLogger("seed_exp")


class TeacherCache:
    """Embeddings of one teacher for every image, view and epoch, on disk.

    Views are a function of (seed, epoch, image), and so are their embeddings. The file `key.json`
    holds everything else that the embeddings depend on. Each epoch is a sparse file with a
    fixed-size row per image: a checksum, then the embeddings of all views as float32. Rows are
    written in any order.

    A row counts only if its checksum fits. So a damaged file (a writer killed, a power cut, a full
    disk, two runs on several machines that write at once) can cost rows but cannot give wrong ones:
    missing rows are computed again. The checksum covers key and epoch too, so a row under another
    key or another epoch counts as missing.

    Processes need not know of each other: each may read all rows and write those it computed.

    Args:
        folder: Folder of the cache; made if absent.
        key: Everything that the embeddings depend on besides epoch and image, as plain JSON.
        num_images: Images in an epoch.
        num_views: Views of an image, per resolution.
        embedding_dim: Width D of an embedding.

    Raises:
        ValueError: the folder holds a cache with another key (the message lists the differences),
            or other files.
    """

    def __init__(
        self,
        folder: Path,
        key: dict[str, Any],
        *,
        num_images: int,
        num_views: Mapping[str, int],
        embedding_dim: int,
    ) -> None:
        self.folder = folder
        self.num_images, self.num_views, self.embedding_dim = (
            num_images,
            dict(num_views),
            embedding_dim,
        )
        self._row = np.dtype(
            [
                ("checksum", "<u4"),
                *((name, "<f4", (num, embedding_dim)) for name, num in sorted(num_views.items())),
            ]
        )
        layout = {
            "num_images": num_images,
            "num_views": self.num_views,
            "embedding_dim": embedding_dim,
        }
        self._key = json.dumps(_claim(folder, json.loads(json.dumps(key | layout))), sort_keys=True)
        self._writable = True
        self._output: tuple[int, BinaryIO] | None = None

    @property
    def bytes_per_epoch(self) -> int:
        """Size of a full epoch in bytes."""
        return self.num_images * self._row.itemsize

    def read(self, epoch: int, indices: Tensor) -> dict[str, Tensor] | None:
        """Returns the embeddings of images `indices` [N] in `epoch`, or None if any is missing.

        They are float32 [V, N, D] per resolution, on the CPU.
        """
        size, start = self._row.itemsize, self._checksum_start(epoch)
        offsets = [index * size for index in indices.tolist()]
        data = bytearray()
        try:
            with self._path(epoch).open("rb", buffering=0) as file:
                # The advice lets the disk fetch all rows at once, not in turn. macOS has none.
                if hasattr(os, "posix_fadvise"):
                    for offset in offsets:
                        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
                # pread, not a memory map: a map would read 128 kB around each row, and would end
                # the process when the disk fails.
                for offset in offsets:
                    row = os.pread(file.fileno(), size, offset)
                    if zlib.crc32(memoryview(row)[4:], start) != int.from_bytes(row[:4], "little"):
                        return None
                    data += row
        except OSError:
            return None
        rows = np.frombuffer(data, self._row)
        return {name: torch.from_numpy(rows[name].swapaxes(0, 1).copy()) for name in self.num_views}

    def write(self, epoch: int, indices: Tensor, embeddings: Mapping[str, Tensor]) -> None:
        """Writes the embeddings [V, N, D] per resolution of images `indices` [N] in `epoch`.

        An image with an embedding that is not finite is left out. If writing fails, a warning is
        logged and nothing more is written: a full disk must not end a training.
        """
        if not self._writable:
            return
        rows = np.empty(len(indices), self._row)
        finite = np.ones(len(indices), np.bool_)
        for name, num in self.num_views.items():
            assert embeddings[name].shape == (num, len(indices), self.embedding_dim)
            rows[name] = embeddings[name].transpose(0, 1).cpu().numpy()
            finite &= np.isfinite(rows[name]).all((1, 2))
        raw: NDArray[np.uint8] = rows.view(np.uint8).reshape(len(rows), -1)
        start = self._checksum_start(epoch)
        rows["checksum"] = [zlib.crc32(row[4:], start) for row in raw]
        try:
            file = self._open_output(epoch)
            for index, row, is_finite in zip(indices.tolist(), raw, finite, strict=True):
                if is_finite:
                    os.pwrite(file.fileno(), row, index * row.nbytes)
        except OSError as error:
            self._writable = False
            log.warning(
                "cannot write to the teacher cache %s (%s): going on without adding to it",
                self.folder,
                error,
            )

    def describe(self, num_epochs: int) -> str:
        """A line with the size for `num_epochs` epochs, the bytes present and the disk's room.

        Raises:
            ValueError: the cache is empty and the disk has no room for all of it. A cache that was
                begun earlier is used whatever the room.
        """
        needed = num_epochs * self.bytes_per_epoch
        # Bytes that the disk has allocated to the sparse files, in whole blocks.
        held = sum(
            min(_allocated(self._path(epoch)), self.bytes_per_epoch) for epoch in range(num_epochs)
        )
        free = shutil.disk_usage(self.folder).free
        size = (
            f"({sum(self.num_views.values())} views x {self.embedding_dim} floats + checksum) x 4 "
            f"bytes x {self.num_images:,} images x {num_epochs} epochs = {_size(needed)}"
        )
        if held == 0 and needed > free:
            raise ValueError(
                f"teacher_cache={self.folder} would need {size}, but its disk has {_size(free)} "
                "free; choose a larger disk, or train without teacher_cache"
            )
        enough = "" if needed - held <= free else ", not enough for the rest"
        return (
            f"teacher cache {self.folder}: {size}; {_size(held)} are there, the disk has "
            f"{_size(free)} free{enough}"
        )

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:04d}.bin"

    def _checksum_start(self, epoch: int) -> int:
        return zlib.crc32(f"{self._key} {epoch}".encode())

    def _open_output(self, epoch: int) -> BinaryIO:
        """Returns the file of `epoch`, open for writing.

        It stays open until another epoch is written, because closing a file on NFS waits for the
        server.
        """
        if self._output is None or self._output[0] != epoch:
            if self._output is not None:
                self._output[1].close()
            descriptor = os.open(self._path(epoch), os.O_WRONLY | os.O_CREAT, 0o666)
            self._output = epoch, os.fdopen(descriptor, "wb", buffering=0)
        return self._output[1]


def _claim(folder: Path, key: dict[str, Any]) -> Any:
    """Writes `key` into a new folder, or checks it against an existing cache.

    Returns:
        The key as it stands in the file.

    Raises:
        ValueError: the folder holds a cache with another key, or other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "key.json"
    # Another process may be writing the key now, under a temporary name.
    names = {path.name for path in folder.iterdir() if not path.name.startswith(f".{file.name}.")}
    if file.name not in names:
        if names:
            raise ValueError(
                f"teacher_cache={folder} holds other files ({', '.join(sorted(names)[:3])}, ...) "
                f"and no {file.name}; choose a new or empty folder"
            )
        write_json(file, key)
    found = json.loads(file.read_text())
    differences = list(_differences(found, key))
    if differences:
        raise ValueError(
            f"teacher_cache={folder} holds embeddings made with other options: "
            f"{'; '.join(differences)}. Give those options, or choose another folder"
        )
    return found


def _differences(found: Any, given: Any, name: str = "") -> Iterator[str]:
    absent = "absent"
    if isinstance(found, dict) and isinstance(given, dict):
        for key in sorted(found.keys() | given.keys()):
            yield from _differences(
                found.get(key, absent), given.get(key, absent), f"{name}.{key}" if name else key
            )
    elif found != given:
        yield f"{name} was {found}, now {given}"


def _allocated(path: Path) -> int:
    """Bytes that a file, which may be sparse or absent, takes on disk."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _size(num_bytes: int) -> str:
    text: str = tqdm.format_sizeof(num_bytes, "B")
    return text
