"""Downloads of large files over HTTP: resumed, checked, under their final name only when whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPMessage, InvalidURL
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from seed_exp.base.files import (
    atomic_write,
    cache_folder,
    no_link,
    open_lock,
    sync_folder,
    write_json,
)
from seed_exp.base.redaction import redact

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30
NUM_TRIES = 5
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def cached(name: str) -> Path:
    """Path in the cache of the file `name`, whether it exists or not.

    Raises:
        ValueError: `name` is not a plain file name, so its path could lead out of the cache.
    """
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(
            f"{name!r} is no name of a file in the cache {cache_folder()}; "
            "expected one without folders"
        )
    return cache_folder() / name


def user_mirrors(name: str) -> list[str]:
    """Addresses of the file `name` on the user's mirrors.

    The environment variable SEED_MIRROR lists the mirrors, separated by blanks.

    Raises:
        ValueError: a mirror's address does not begin with http://, https:// or file:///.
    """
    return [_on_mirror(mirror, name) for mirror in os.environ.get("SEED_MIRROR", "").split()]


def download(
    url: str | None, path: Path, expected_hash: str | None = None, *, first_wait_s: float = 1.0
) -> Path:
    """`path`, after downloading the file of `url` to it; a file that is already there is kept.

    The user's mirrors are asked first, then `url`, until one sends the expected file. The part that
    an interrupted call has fetched is kept beside `path`; the next call continues it, unless the
    file has changed meanwhile. If several processes ask for one path at once, one downloads and the
    others wait. The SHA-256 of the download is noted, see `noted_hash`.

    Args:
        url: Address; its query string, which may carry a signature, is never shown. None = only
            mirrors have the file.
        path: Target path; missing folders are made.
        expected_hash: `algorithm:beginning of the hexadecimal digest`, e.g. md5:59fd9945; None =
            not checked.
        first_wait_s: Pause before the second try in seconds; it doubles with each try that brings
            nothing new.

    Raises:
        ValueError: no server has the file, can be reached or sends the right one, or the disk is
            full; says what to do.
    """
    # Before the lock, because the user may not be allowed to write into a shared cache.
    if path.exists():
        return path
    if url is not None and urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(_advice(path, [f"{_shown(url)} (only http and https are fetched)"]))
    sources = [*user_mirrors(path.name), *([] if url is None else [url])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            partial = _partial(path)
            sha256 = _fetch_from_any(sources, partial, path, expected_hash, first_wait_s)
            partial.replace(path)
            sync_folder(path.parent)
            _origin_of(partial).unlink(missing_ok=True)
            note_hash(path, sha256)
    return path


def progress_of(path: Path) -> tuple[int, int | None] | None:
    """Bytes that an interrupted download to `path` has fetched, and the file's total if known.

    None if there is no interrupted download.
    """
    partial = _partial(path)
    return (partial.stat().st_size, _read_origin(partial).total) if partial.exists() else None


def check_hash(path: Path, expected: str | None) -> str:
    """The SHA-256 of the file, hexadecimal, after comparison with `expected`.

    Args:
        path: The file.
        expected: Like `expected_hash` of `download`.

    Raises:
        ValueError: the file has another hash.
    """
    algorithm, _, beginning = (expected or "sha256:").partition(":")
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in {algorithm, "sha256"}}
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            for digest in digests.values():
                digest.update(chunk)
    if not (found := digests[algorithm].hexdigest()).startswith(beginning):
        raise ValueError(f"{algorithm} {found}, expected {beginning}...: not the published file")
    return digests["sha256"].hexdigest()


def noted_hash(path: Path) -> str | None:
    """The SHA-256 that the file at `path` had when it was first used; None if it was not noted.

    With it, a later change is noticed even if nobody has published a hash. It is in `NAME.sha256`
    beside the file, in the format of `sha256sum -c`.
    """
    note = _note(path)
    return (note.read_text(errors="replace").split() or [""])[0] if note.exists() else None


def note_hash(path: Path, sha256: str) -> None:
    """Notes the SHA-256 of the file at `path`."""
    with atomic_write(_note(path)) as file:
        file.write(f"{sha256}  {path.name}\n".encode())


def unchanged_since_noted(path: Path) -> bool:
    """Whether the file at `path` is still the one whose hash is noted, judged by file times."""
    note = _note(path)
    return note.exists() and path.exists() and path.stat().st_ctime_ns <= note.stat().st_mtime_ns


def refuse_changed(path: Path, sha256: str) -> None:
    """Checks the SHA-256 of the file at `path` against the noted one, if one is noted.

    Raises:
        ValueError: they differ.
    """
    if (noted := noted_hash(path)) not in (None, sha256):
        raise ValueError(
            f"{path} has changed since it was first used (sha256 {sha256}, was {noted}); "
            f"delete it to fetch it again, or delete {_note(path).name} beside it to accept "
            "the new one"
        )


class _UnavailableError(Exception):
    """The server does not have the requested file."""


class _NoRoomError(Exception):
    """The disk is too full for the file, so other servers need not be asked."""


@dataclass(frozen=True)
class _Origin:
    """The origin of a partial file; None = unknown."""

    url: str | None = None
    """Address without secrets."""
    validator: str | None = None
    """ETag or date of the file on the server; it changes with the file."""
    total: int | None = None
    """Size of the whole file in bytes."""


def _fetch_from_any(
    sources: list[str], partial: Path, path: Path, expected_hash: str | None, wait_s: float
) -> str:
    """Fetches the expected file from the first of `sources` that has it; returns its SHA-256."""
    reasons = []
    for url in sources:
        try:
            _fetch_all(url, partial, path.name, wait_s, any_origin=expected_hash is not None)
            return check_hash(partial, expected_hash)
        except _NoRoomError as error:
            raise ValueError(
                f"cannot write {path} ({error}); "
                "make room there or set SEED_CACHE to another folder"
            ) from None
        except _UnavailableError as error:
            reason = str(error)
        except ValueError as error:
            reason = f"{error}, removed"
            partial.unlink()
            _origin_of(partial).unlink(missing_ok=True)
        reasons.append(f"{_shown(url)} ({_one_line(reason)})")
    raise ValueError(_advice(path, reasons))


def _fetch_all(url: str, partial: Path, name: str, wait_s: float, *, any_origin: bool) -> None:
    """Calls `_fetch` until the file is whole; gives up after NUM_TRIES calls without new bytes."""
    most, failures, wait = 0, 0, wait_s
    while True:
        try:
            return _fetch(url, partial, name, any_origin=any_origin)
        except HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                raise _UnavailableError(reason) from None
        except InvalidURL:  # its message contains the address
            raise _UnavailableError("that is no address") from None
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise _NoRoomError(error.strerror) from None
            if (
                isinstance(error, OSError)
                and not isinstance(error, URLError)
                and error.filename is not None
            ):
                raise  # the error is about one of our own files
            # A URLError's reason is another exception.
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            if url.startswith("file:"):
                raise _UnavailableError(reason) from None
        size = partial.stat().st_size if partial.exists() else 0
        if size > most:
            most, failures, wait = size, 0, wait_s
        failures += 1
        if failures == NUM_TRIES:
            raise _UnavailableError(reason)
        time.sleep(wait)
        wait *= 2


def _fetch(url: str, partial: Path, name: str, *, any_origin: bool) -> None:
    """Requests the rest of `partial` once; raises an exception if the connection breaks.

    The whole file is requested if nothing can tell that the rest belongs to the same file: neither
    a hash at the end (`any_origin`) nor the server.
    """
    origin = _read_origin(partial)
    validator = origin.validator if origin.url == _shown(url) else None
    have = partial.stat().st_size if partial.exists() and (any_origin or validator) else 0
    headers = (
        {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {}) if have else {}
    )
    try:
        response = build_opener(_Redirects).open(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code != 416:
            raise
        # The server has no further bytes: our part is the whole file, or of another file.
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return
        partial.unlink()
        raise ConnectionError("the partial file was no beginning of it") from None
    with response:
        resumed = have > 0 and response.status == 206
        first, total = (
            _content_range(response.headers)
            if resumed
            else (0, _number(response.headers.get("Content-Length", "")))
        )
        if resumed and first != have:
            raise ConnectionError(f"the server did not send the part from byte {have}")
        remote = _Origin(_shown(url), _validator(response.headers), total)
        if resumed and not _same_file(origin, remote):
            partial.unlink()
            raise ConnectionError("the file has changed on the server")
        if not resumed:
            have = 0
            partial.unlink(missing_ok=True)
            write_json(_origin_of(partial), asdict(remote))
        _require_room(partial.parent, have, total)
        bar = tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True)
        with open(partial, "ab", opener=no_link) as file, bar:
            # read1 returns what has arrived, so that nothing is lost if the rest does not come.
            while chunk := response.read1(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and partial.stat().st_size < total:
        raise ConnectionError(
            f"the connection closed after {partial.stat().st_size} of {total} bytes"
        )


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in ({"https"} if req.type == "https" else {"http", "https"}):
            raise HTTPError(
                req.full_url, code, f"redirect to {_shown(newurl)} refused", headers, fp
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _same_file(before: _Origin, now: _Origin) -> bool:
    """Whether both describe the same file, as far as they tell."""
    if None not in (before.total, now.total) and before.total != now.total:
        return False
    return (
        before.url != now.url
        or None in (before.validator, now.validator)
        or before.validator == now.validator
    )


def _validator(headers: HTTPMessage) -> str | None:
    etag: str | None = headers.get("ETag")
    if etag is not None and not etag.startswith("W/"):  # weak ones do not promise equal bytes
        return etag
    return headers.get("Last-Modified")


def _content_range(headers: HTTPMessage) -> tuple[int | None, int | None]:
    """First byte of the part and size of the whole: (5, 10) for `Content-Range: bytes 5-9/10`.

    None for a number that the header does not give.
    """
    part, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    return _number(part.partition("-")[0]), _number(total)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _require_room(folder: Path, have: int, total: int | None) -> None:
    free = shutil.disk_usage(folder).free
    if total is not None and total - have > free:
        raise _NoRoomError(
            f"{megabytes(total - have)} are still to be fetched, {megabytes(free)} are free"
        )


def megabytes(num: int) -> str:
    """`94.3 MB` for 94,345,885 bytes."""
    return f"{num / 1e6:,.1f} MB"


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _origin_of(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _read_origin(partial: Path) -> _Origin:
    try:
        content: Any = json.loads(_origin_of(partial).read_text())
        return _Origin(content["url"], content["validator"], content["total"])
    # Anyone may have written to a shared cache; without its origin, the partial file is useless.
    except (OSError, ValueError, LookupError, TypeError):
        return _Origin()


def _on_mirror(mirror: str, name: str) -> str:
    parts = urlsplit(mirror)
    if parts.scheme not in ("http", "https", "file"):
        raise ValueError(
            f"SEED_MIRROR has {_shown(mirror)}; "
            "expected addresses with http://, https:// or file:///"
        )
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


def _advice(path: Path, reasons: list[str]) -> str:
    return (
        f"cannot download {', '.join(reasons)}; "
        f"check the network, or fetch the file elsewhere and put it at {path}"
    )


def _one_line(reason: str) -> str:
    return redact(" ".join(reason.split()))  # the text may come from the server


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return redact(f"{parts.scheme}://{parts.hostname or ''}{parts.path}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
