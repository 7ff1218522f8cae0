"""Disks that are full, or can only be read."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path


def fill(disk: Path, leave: int = 0) -> Path:
    """Fills the disk up to `leave` bytes; returns the file that does, to be removed for room."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        file.truncate(max(0, file.tell() - leave))
    return ballast


class FailingDisk:
    """A file system of its own, in which the kernel can be made to find an error.

    It then lets nobody write any more, not even to files that are open.

    Args:
        folder: Where it is; made.
        image: File that holds it.
        num_mib: Its size in MiB.

    Raises:
        OSError: it cannot be mounted here.
    """

    def __init__(self, folder: Path, image: Path, num_mib: int) -> None:
        self.folder, self._image = folder, image
        folder.mkdir(exist_ok=True)
        with image.open("wb") as file:
            file.truncate(num_mib << 20)
        # Without room for root only: root has to find it full, too.
        call("mkfs.ext4", "-q", "-m", "0", image)
        self._mount()

    def fail(self) -> None:
        """Makes the kernel find an error."""
        device = self.folder.stat().st_dev
        name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("1")

    def repair(self) -> None:
        """Mends it; OSError if a file is still open."""
        call("umount", self.folder)
        subprocess.run(["e2fsck", "-fp", str(self._image)], capture_output=True)
        self._mount()

    def remove(self) -> None:
        call("umount", "--lazy", self.folder)
        self._image.unlink()

    def _mount(self) -> None:
        call("mount", "-o", "loop,errors=remount-ro", self._image, self.folder)


def call(*command: str | Path) -> None:
    """Runs a command of the system; OSError if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")
