"""A copy of the code that a sweep runs from: later edits change no queued job."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PARTS = ("seed_exp", "conf", "experiments")
"""Folders that are copied, where they are; in a wheel the last two are inside the first."""

_MAIN = '''\
"""python THIS_FOLDER COMMAND [KEY=VALUE ...]: `python -m seed_exp.COMMAND` with this code.

Python searches the folder of the file that it runs first. With -m it searches the working directory
first, which may hold newer code.
"""

import runpy
import sys

if __name__ == "__main__":
    runpy.run_module(f"seed_exp.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
'''


def snapshot_name(source: Path) -> str:
    """A hash of the code below `source`.

    Args:
        source: The folder that holds seed_exp/, and conf/ and experiments/ unless seed_exp/ does.
    """
    digest = hashlib.sha256(_MAIN.encode())
    for file in sorted(_files(source)):
        content = (source / file).read_bytes()
        digest.update(f"{file.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def take_snapshot(source: Path, folder: Path) -> None:
    """Copies the code below `source` into `folder`, unless the folder exists.

    `python FOLDER distill KEY=VALUE ...` runs the copy.
    """
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    for file in _files(source):
        (partial / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, partial / file)
    (partial / "__main__.py").write_text(_MAIN)
    partial.rename(folder)


def git_state(source: Path) -> dict[str, str | None]:
    """Commit of the working tree at `source`, and SHA-256 of its uncommitted changes.

    Returns:
        {commit, diff}, each None if there is none; files unknown to git count as changes.
    """
    commit = _git(source, "rev-parse", "HEAD")
    if commit is None or not _git(
        source, "ls-files", "--", PARTS[0]
    ):  # an environment may lie in somebody else's repository
        return {"commit": None, "diff": None}
    untracked = (
        _git(source, "ls-files", "-z", "--others", "--exclude-standard", "--", *PARTS) or b""
    ).split(b"\0")
    changes = _git(source, "diff", "HEAD", "--binary", "--", *PARTS) or b""
    files = [(name, source / os.fsdecode(name)) for name in untracked]
    changes += b"".join(name + b"\n" + path.read_bytes() for name, path in files if path.is_file())
    return {
        "commit": commit.decode().strip(),
        "diff": hashlib.sha256(changes).hexdigest() if changes else None,
    }


def _files(source: Path) -> Iterator[Path]:
    for part in PARTS:
        for folder, names, files in os.walk(source / part):
            names[:] = [name for name in names if name != "__pycache__"]
            # Editors mark an open file with a link to nowhere.
            whole = [
                Path(folder, file)
                for file in files
                if not file.endswith(".pyc") and Path(folder, file).is_file()
            ]
            yield from (file.relative_to(source) for file in whole)


def _git(source: Path, *arguments: str) -> bytes | None:
    """Output of git; None if git is not installed or `source` is no repository."""
    try:
        done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
