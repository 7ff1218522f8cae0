"""Large files over HTTP: resumed where they broke, checked, and under their name only when whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, InvalidURL
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from seed_exp.files import sync_folder
from seed_exp.redaction import redact

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30
NUM_TRIES = 5


def cache_folder() -> Path:
    """Where downloads and what is computed once are kept: the environment variable SEED_CACHE, otherwise ~/.cache/seed_exp."""
    return Path(os.environ.get("SEED_CACHE") or Path.home() / ".cache" / "seed_exp")


def download(url: str, path: Path, expected_hash: str | None = None, *, first_wait_s: float = 1.0) -> Path:
    """Makes sure that the file of `url` is at `path`, and returns `path`. A file that is already there is taken as it is.

    What an interrupted call has fetched is kept beside `path` and continued by the next. Of several processes that ask for
    one path at once, one downloads and the others wait.

    Args:
        url: Address; a query string in it, which may carry a signature, is never shown.
        path: Where the file shall lie; folders are made.
        expected_hash: `algorithm:beginning of the hexadecimal digest`, e.g. md5:59fd9945; None = not checked.
        first_wait_s: Pause before the second try in seconds; it doubles with each try that brings nothing new.

    Raises:
        ValueError: the server refuses, cannot be reached, or sends another file; says what to do.
    """
    if path.exists():  # asked before a lock is needed: the cache may be one that only others may write into
        return path
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(_advice(url, path, "only http and https are fetched"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            partial = path.with_name(f".{path.name}.partial")
            _fetch_all(url, partial, path, first_wait_s)
            if expected_hash is not None:
                _check_hash(url, partial, expected_hash)
            partial.replace(path)
            sync_folder(path.parent)
    return path


def _fetch_all(url: str, partial: Path, path: Path, wait_s: float) -> None:
    """Calls `_fetch` until the file is whole, giving up after NUM_TRIES calls in a row that brought nothing new."""
    most, failures, wait = 0, 0, wait_s
    while True:
        try:
            return _fetch(url, partial, path.name)
        except HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                raise ValueError(_advice(url, path, reason)) from None
        except InvalidURL:  # its message has the address in it
            raise ValueError(_advice(url, path, "that is no address")) from None
        except (OSError, HTTPException) as error:
            # The reason of a URLError is an exception of its own.
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        size = partial.stat().st_size if partial.exists() else 0
        if size > most:
            most, failures, wait = size, 0, wait_s
        failures += 1
        if failures == NUM_TRIES:
            raise ValueError(_advice(url, path, reason))
        time.sleep(wait)
        wait *= 2


def _fetch(url: str, partial: Path, name: str) -> None:
    """One request for what `partial` still lacks; an exception where the connection breaks."""
    have = partial.stat().st_size if partial.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code != 416:
            raise
        # Nothing lies behind what we have: it is whole, or it is not a beginning of this file.
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return
        partial.unlink()
        raise ConnectionError("the partial file was no beginning of it") from None
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ConnectionError(f"the server did not send the part from byte {have}")
        have = have if resumed else 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        bar = tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True)
        with partial.open("ab" if resumed else "wb") as file, bar:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and partial.stat().st_size < total:
        raise ConnectionError(f"the connection closed after {partial.stat().st_size} of {total} bytes")


def _check_hash(url: str, partial: Path, expected: str) -> None:
    algorithm, beginning = expected.split(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with partial.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if not digest.hexdigest().startswith(beginning):
        partial.unlink()
        raise ValueError(
            f"{_shown(url)} has {algorithm} {digest.hexdigest()}, expected {beginning}...: not the published file; "
            "what was fetched is removed, try again"
        )


def _advice(url: str, path: Path, reason: str) -> str:
    reason = redact(" ".join(reason.split()))  # it may be the server's
    return f"cannot download {_shown(url)} ({reason}); check the network, or fetch the file elsewhere and put it at {path}"


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
