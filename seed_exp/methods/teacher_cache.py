"""The teacher's embeddings on disk: one run computes them, and runs of other students read them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from seed_exp.base.files import no_link, write_json

log = logging.getLogger("seed_exp")

PENDING = 4
"""Batches of embeddings that may wait to be written."""


class TeacherCache:
    """Embeddings of one teacher for every image, view and epoch, on disk.

    Views are a function of (seed, epoch, image), and so are their embeddings. Everything else that
    the embeddings depend on is the key, which names a sub-folder, so that runs with other keys can
    share the folder. Its file `key.json` shows the key. Each epoch is a sparse file with a
    fixed-size row per image: a checksum, then the embeddings of all views as float32. Rows are
    written in any order.

    A row counts only if its checksum fits. So a damaged file (a writer killed, a power cut, a full
    disk, two runs on several machines that write at once) can cost rows but cannot give wrong ones:
    missing rows are computed again. The checksum covers key and epoch too, so a row under another
    key or another epoch counts as missing.

    If views are mixed in pairs, the checksum also covers the other image of the pair. It is another
    one than usual where one that cannot be read was replaced.

    If global views change their size over time, it covers their size too. An image comes twice in
    an epoch where it takes the place of another one, or is one of a bag, and in a run that counts
    in steps these may be of two sizes.

    Processes need not know of each other: each may read all rows and write those it computed.

    Args:
        root: Folder of caches; made if absent.
        key: Everything that the embeddings depend on besides epoch and image, as plain JSON.
        num_images: Images in an epoch.
        num_views: Views of an image, per resolution.
        embedding_dim: Width D of an embedding.
        in_pairs: Whether an image's views also depend on its neighbour: of the `indices` of the
            methods, numbers 0 and 1 are neighbours, 2 and 3, and so on.
        of_sizes: Whether the size of global views changes over time; how, the key has to say.

    Raises:
        ValueError: as `make_folder`.
    """

    def __init__(
        self,
        root: Path,
        key: dict[str, Any],
        *,
        num_images: int,
        num_views: Mapping[str, int],
        embedding_dim: int,
        in_pairs: bool = False,
        of_sizes: bool = False,
    ) -> None:
        self.in_pairs, self.of_sizes = in_pairs, of_sizes
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
        content = _canonical(json.loads(json.dumps(key | layout)))
        self._key = json.dumps(content, sort_keys=True)
        self.folder = root / hashlib.sha256(self._key.encode()).hexdigest()[:16]
        make_folder(root)
        if not (self.folder / "key.json").exists():
            write_json(self.folder / "key.json", content)
        self._writable = True
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher cache")
        self._pending: deque[Future[None]] = deque()
        self._output: tuple[int, BinaryIO] | None = None

    @property
    def bytes_per_epoch(self) -> int:
        """Size of a full epoch in bytes."""
        return self.num_images * self._row.itemsize

    def read(self, epoch: int, indices: Tensor, side: int = 0) -> dict[str, Tensor] | None:
        """Returns the embeddings of images `indices` [N] in `epoch`, or None if any is missing.

        They are float32 [V, N, D] per resolution, on the CPU. `side` is that of global views in
        pixels, here and below; without `of_sizes` it is not looked at.
        """
        size, starts = self._row.itemsize, self._checksum_starts(epoch, indices, side)
        offsets = [index * size for index in indices.tolist()]
        data = bytearray()
        try:
            with open(self._path(epoch), "rb", buffering=0, opener=_no_detour) as file:
                # The advice lets the disk fetch all rows at once, not in turn. macOS has none.
                if hasattr(os, "posix_fadvise"):
                    for offset in offsets:
                        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
                # pread, not a memory map: a map would read 128 kB around each row, and would end
                # the process when the disk fails.
                for offset, start in zip(offsets, starts, strict=True):
                    row = os.pread(file.fileno(), size, offset)
                    if zlib.crc32(memoryview(row)[4:], start) != int.from_bytes(row[:4], "little"):
                        return None
                    data += row
        except OSError:
            return None
        rows = np.frombuffer(data, self._row)
        return {name: torch.from_numpy(rows[name].swapaxes(0, 1).copy()) for name in self.num_views}

    def write(
        self, epoch: int, indices: Tensor, embeddings: Mapping[str, Tensor], side: int = 0
    ) -> None:
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
        starts = self._checksum_starts(epoch, indices, side)
        rows["checksum"] = [
            zlib.crc32(row[4:], start) for row, start in zip(raw, starts, strict=True)
        ]
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

    def write_soon(
        self, epoch: int, indices: Tensor, embeddings: Mapping[str, Tensor], side: int = 0
    ) -> None:
        """As `write`, in a thread: neither the GPU nor the disk is waited for.

        Only where the disk is slower than the steps, the oldest of PENDING writes is waited for.
        """
        on_host = {
            name: rows.to("cpu", non_blocking=True) for name, rows in embeddings.items()
        }  # page-locked
        is_on_gpu = any(rows.is_cuda for rows in embeddings.values())
        copied = torch.cuda.Event() if is_on_gpu else None  # type: ignore[no-untyped-call]
        if copied is not None:
            copied.record()
        indices = indices.clone()  # the workers will write the next ones into its memory

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            self.write(epoch, indices, on_host, side)

        if len(self._pending) == PENDING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(write))

    def close(self) -> None:
        """Waits until all is written."""
        while self._pending:
            self._pending.popleft().result()

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
        size = _in_words(self.num_images, self.num_views, self.embedding_dim, num_epochs)
        if held == 0:
            refuse_without_room(
                self.folder.parent, self.num_images, self.num_views, self.embedding_dim, num_epochs
            )
        enough = "" if needed - held <= free else ", not enough for the rest"
        return (
            f"teacher cache {self.folder}: {size}; {_size(held)} are there, the disk has "
            f"{_size(free)} free{enough}"
        )

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:04d}.bin"

    def _checksum_starts(self, epoch: int, indices: Tensor, side: int) -> list[int]:
        """Checksum of everything but the embeddings themselves, for each of the images [N]."""
        of_size = f" {side}" if self.of_sizes else ""
        start = zlib.crc32(f"{self._key} {epoch}{of_size}".encode())
        if not self.in_pairs:
            return [start] * len(indices)
        others = indices.view(-1, 2).flip(1).flatten()
        return [zlib.crc32(b"%d" % other, start) for other in others.tolist()]

    def _open_output(self, epoch: int) -> BinaryIO:
        """Returns the file of `epoch`, open for writing.

        It stays open until another epoch is written, because closing a file on NFS waits for the
        server.
        """
        if self._output is None or self._output[0] != epoch:
            if self._output is not None:
                self._output[1].close()
            descriptor = _no_detour(os.fspath(self._path(epoch)), os.O_WRONLY | os.O_CREAT)
            self._output = epoch, os.fdopen(descriptor, "wb", buffering=0)
        return self._output[1]


def _no_detour(name: str, flags: int) -> int:
    """Opener for `open` that follows no link and waits for no pipe (OSError).

    Others may have put either into a shared folder.
    """
    return no_link(name, flags | os.O_NONBLOCK)


def make_folder(root: Path) -> None:
    """Makes the folder of caches if it is absent.

    Raises:
        ValueError: it is a file.
        OSError: it cannot be made.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f"teacher_cache={root} is a file; give a folder, which may be new")
    root.mkdir(parents=True, exist_ok=True)
    if (root / "key.json").exists():
        log.warning(
            "%s/key.json and %s/epoch_*.bin are of an earlier version, which kept one cache per "
            "folder: they are not used, and may be removed",
            root,
            root,
        )


def refuse_without_room(
    root: Path, num_images: int, num_views: Mapping[str, int], embedding_dim: int, num_epochs: int
) -> None:
    """Checks that a new cache in `root` fits on its disk.

    Raises:
        ValueError: it does not.
    """
    free = shutil.disk_usage(root).free
    row = 4 * (1 + embedding_dim * sum(num_views.values()))
    if num_epochs * num_images * row > free:
        raise ValueError(
            f"teacher_cache={root} would need "
            f"{_in_words(num_images, num_views, embedding_dim, num_epochs)}, but its disk has "
            f"{_size(free)} free; remove sub-folders that are not needed any more (key.json says "
            "of what each is), choose a larger disk, or train without teacher_cache"
        )


def _in_words(
    num_images: int, num_views: Mapping[str, int], embedding_dim: int, num_epochs: int
) -> str:
    """The size of a cache, with its calculation."""
    views = sum(num_views.values())
    needed = num_epochs * num_images * 4 * (1 + embedding_dim * views)
    return (
        f"({views} views x {embedding_dim} floats + checksum) x 4 "
        f"bytes x {num_images:,} images x {num_epochs} epochs = {_size(needed)}"
    )


def _canonical(value: Any) -> Any:
    """Plain JSON in which equal numbers are written alike: 1.0 is 1."""
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _allocated(path: Path) -> int:
    """Bytes that a file, which may be sparse or absent, takes on disk."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _size(num_bytes: int) -> str:
    text: str = tqdm.format_sizeof(num_bytes, "B")
    return text
