from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from disks import call, fill
from PIL import Image

from seed_exp.base.files import (
    append_json,
    atomic_write,
    json_lines,
    no_link,
    open_lock,
    temporary_beside,
)


@pytest.mark.parametrize("writer", ["plain", "torch", "text", "picture"])
def test_an_error_of_the_disk_is_shown_as_such_whoever_writes(
    writer: str, small_disk: Path
) -> None:
    content = {"weights": torch.zeros(2_000_000)}
    path = small_disk / "file"

    def write() -> None:
        with atomic_write(path) as file:
            if writer == "torch":
                torch.save(content, file)
            elif writer == "text":
                text = io.TextIOWrapper(file)
                text.write("x" * 5_000_000)
                text.detach()
            elif writer == "picture":
                Image.effect_noise((3000, 3000), 100).save(file, "PNG")
            else:
                file.write(bytes(5_000_000))

    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*/disk/file'"):
        write()
    assert [other.name for other in small_disk.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_disk_that_can_only_be_read_meanwhile_is_named_with_the_file(small_disk: Path) -> None:
    def write() -> None:
        with atomic_write(small_disk / "file") as file:
            file.write(b"x")
            call("mount", "--bind", small_disk, small_disk)
            call("mount", "-o", "remount,bind,ro", small_disk)

    with pytest.raises(OSError, match=r"\[Errno 30\] Read-only file system: '.*/disk/file'"):
        write()
    call("umount", small_disk)


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), atomic_write(tmp_path / "file"):
        raise KeyError("mine")
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_a_full_disk_cuts_off_is_an_error_and_the_next_one_is_whole(
    small_disk: Path,
) -> None:
    path = small_disk / "lines.jsonl"
    append_json(path, {"line": 0})
    ballast = fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        append_json(path, {"line": 1, "long": "x" * 9000})
    ballast.unlink()
    append_json(path, {"line": 2})
    assert [line["line"] for line in json_lines(path.read_text())] == [0, 2]
    assert len(path.read_text().splitlines()) == 3
    assert json.loads(path.read_text().splitlines()[2]) == {"line": 2}


WRITER = """
import sys
from pathlib import Path
from seed_exp.base.files import atomic_write, temporary_beside
with temporary_beside(Path("folder"), Path.mkdir) as folder, atomic_write(Path("file")) as file:
    (folder / "part").touch()
    print(flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_and_nothing_of_a_living_one(
    tmp_path: Path,
) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "file"), temporary_beside(tmp_path / "folder", Path.mkdir):
            pass

    (tmp_path / ".file.mine.tmp").touch()
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        write()
        assert len(list(tmp_path.iterdir())) == 4
        assert list(tmp_path.glob(".folder.*.tmp/part"))
        writer.kill()
    write()
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".file.mine.tmp"}


def test_no_link_is_followed_to_a_file_of_the_user(tmp_path: Path) -> None:
    precious, lock = tmp_path / "precious", tmp_path / ".weights.pth.lock"
    precious.write_text("mine")
    lock.symlink_to(precious)
    with pytest.raises(ValueError, match=r"\.weights\.pth\.lock is a symbolic link; .* remove the"):
        open_lock(lock)
    with pytest.raises(OSError, match="symbolic links"):
        open(lock, "ab", opener=no_link)  # noqa: SIM115
    lock.unlink()
    lock.write_text("held by")
    with open_lock(lock) as file:
        file.write(" me")
    assert (precious.read_text(), lock.read_text()) == ("mine", "held by me")
