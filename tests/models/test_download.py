"""Downloads survive broken connections, resume, and check what they got.

They never leave half a file under its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from seed_exp.models import download as module
from seed_exp.models.download import (
    cached,
    download,
    noted_hash,
    progress_of,
    refuse_changed,
    unchanged_since_noted,
)

CONTENT = bytes(range(256)) * 1000
HASH = "md5:" + hashlib.md5(CONTENT).hexdigest()[:8]


@dataclass
class Server:
    """An HTTP server that misbehaves as told."""

    content: bytes = CONTENT
    ranges: bool = True
    break_after: int | None = None
    """Bytes of each answer after which the connection is closed."""
    num_breaks: int = 0
    """Answers that are broken before the first whole one."""
    status: int = 200
    shift: int = 0
    """Bytes by which the sent part begins later than the requested part."""
    length: bool = True
    lengths: str | None = None
    """A false value of Content-Length; None = the true one."""
    reason: str | None = None
    """The text behind the status."""
    failures: int = 10**9
    """Answers with `status` before those without."""
    headers: dict[str, str] = field(default_factory=dict)
    """ETag, Last-Modified."""
    if_range: bool = True
    """Whether If-Range is understood."""
    changed: tuple[bytes, dict[str, str]] | None = None
    """New content and headers from the second answer on."""
    stall_s: float = 0
    """Pause in the middle of a body that is broken."""
    redirect: str | None = None
    """The address that the first request is redirected to."""
    requests: list[str | None] = field(default_factory=list)
    """The Range header of each request."""
    url: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on this machine."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.requests.append(wanted)
            if state.redirect is not None and len(state.requests) == 1:
                self.send_response(302)
                self.send_header("Location", state.redirect)
                self.end_headers()
                return
            if state.status != 200 and state.failures:
                state.failures -= 1
                self.send_error(state.status, state.reason)
                return
            if state.changed is not None and len(state.requests) > 1:
                state.content, state.headers = state.changed
            known = state.headers.values()
            if (
                wanted
                and state.if_range
                and self.headers.get("If-Range", next(iter(known), None)) not in (None, *known)
            ):
                wanted = None
            start = (
                int(wanted.removeprefix("bytes=").removesuffix("-"))
                if wanted and state.ranges
                else 0
            )
            start += state.shift if wanted else 0
            if wanted and state.ranges and start >= len(state.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.content)}")
                self.end_headers()
                return
            body = state.content[start:]
            self.send_response(206 if wanted and state.ranges else 200)
            if wanted and state.ranges:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}"
                )
            for name, value in state.headers.items():
                self.send_header(name, value)
            if state.length:
                self.send_header("Content-Length", state.lengths or str(len(body)))
            self.end_headers()
            if state.num_breaks:
                state.num_breaks -= 1
                self.wfile.write(body[: state.break_after])
                time.sleep(state.stall_s)
                return
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state.url = f"http://127.0.0.1:{httpd.server_port}/folder/file.pth?signature=secret"
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEED_MIRROR", raising=False)


def _get(server: Server, folder: Path, expected_hash: str | None = HASH) -> Path:
    return download(server.url, folder / "cache" / "file.pth", expected_hash, first_wait_s=0.001)


def _visible(path: Path) -> list[str]:
    return sorted(other.name for other in path.iterdir() if not other.name.endswith(".lock"))


@pytest.mark.parametrize("length", [True, False])
def test_a_file_is_fetched_once_with_progress(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], length: bool
) -> None:
    server.length = length
    path = _get(server, tmp_path)
    assert path.read_bytes() == CONTENT
    assert "file.pth" in capsys.readouterr().err
    assert _get(server, tmp_path) == path
    assert server.requests == [None]
    assert _visible(path.parent) == ["file.pth", "file.pth.sha256"]


def test_a_broken_download_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.break_after, server.num_breaks = 50_000, 4
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [
        None,
        "bytes=50000-",
        "bytes=100000-",
        "bytes=150000-",
        "bytes=200000-",
    ]


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server: Server, tmp_path: Path) -> None:
    server.break_after, server.num_breaks = 50_000, 1
    partial = tmp_path / "cache" / ".file.pth.partial"
    partial.parent.mkdir()
    partial.write_bytes(CONTENT[:1234])
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=1234-", "bytes=51234-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.break_after, server.num_breaks = False, 50_000, 2
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_connections_that_bring_nothing_new_end_in_one_clear_line(
    server: Server, tmp_path: Path
) -> None:
    server.ranges, server.break_after, server.num_breaks = False, 50_000, 100
    with pytest.raises(
        ValueError, match="the connection closed after 50000 of 256000 bytes"
    ) as raised:
        _get(server, tmp_path)
    assert len(server.requests) == 5
    assert "put it at" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache" / "file.pth").exists()


def test_another_part_than_asked_for_is_not_taken(server: Server, tmp_path: Path) -> None:
    server.break_after, server.num_breaks, server.shift = 50_000, 1, 10
    with pytest.raises(ValueError, match="did not send the part from byte 50000"):
        _get(server, tmp_path)


@pytest.mark.parametrize(
    ("partial", "requests"),
    [(CONTENT, ["bytes=256000-"]), (CONTENT + b"x", ["bytes=256001-", None])],
)
def test_a_partial_file_that_is_whole_or_too_long(
    server: Server, tmp_path: Path, partial: bytes, requests: list[str | None]
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".file.pth.partial").write_bytes(partial)
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == requests


def test_wrong_bytes_are_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(
        ValueError, match=rf"/folder/file\.pth \(md5 \w+, expected {HASH[4:]}\.\.\.: not the p"
    ) as raised:
        _get(server, tmp_path)
    assert "secret" not in str(raised.value)
    assert _visible(tmp_path / "cache") == []
    server.content = CONTENT
    assert _get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "num_requests"), [(403, 1), (404, 1), (500, 5), (429, 5)])
def test_refusals_are_named_and_repeated_only_where_that_can_help(
    server: Server, tmp_path: Path, status: int, num_requests: int
) -> None:
    server.status = status
    with pytest.raises(
        ValueError, match=rf"cannot download http://127\.0\.0\.1/folder/file\.pth \(HTTP {status} "
    ):
        _get(server, tmp_path)
    assert len(server.requests) == num_requests


def test_without_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(
        ValueError,
        match=r"cannot download http://127\.0\.0\.1/x \(.*refused.*\); check the network, or fetch",
    ) as raised:
        download("http://127.0.0.1:9/x?signature=secret", tmp_path / "x", first_wait_s=0.001)
    assert "secret" not in str(raised.value)


def test_of_several_that_ask_at_once_one_downloads(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: _get(server, tmp_path), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert server.requests == [None]


@pytest.mark.parametrize("suffix", ["lock", "partial"])
def test_a_link_that_others_put_into_the_cache_leads_to_no_file_of_ours(
    suffix: str, server: Server, tmp_path: Path
) -> None:
    precious, link = tmp_path / "precious", tmp_path / "cache" / f".file.pth.{suffix}"
    precious.write_bytes(CONTENT[:100])  # for .partial: the beginning, to which the rest is added
    link.parent.mkdir()
    link.symlink_to(precious)
    with pytest.raises((ValueError, OSError), match="symbolic link"):
        _get(server, tmp_path)
    assert precious.read_bytes() == CONTENT[:100]
    link.unlink()
    assert _get(server, tmp_path).read_bytes() == CONTENT


def test_a_file_that_is_there_is_taken_from_a_folder_that_only_others_may_write_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"there")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # as root, permissions would refuse nothing
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert download("http://127.0.0.1:9/x", tmp_path / "x") == tmp_path / "x"


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "data:text/plain,hello", "ftp://127.0.0.1:9/x", "nonsense"]
)
def test_only_the_web_is_asked(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="only http and https are fetched"):
        download(url, tmp_path / "new" / "x")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "url", ["http://user:s3cret@127.0.0.1/x", "http://127.0.0.1:9/a b?signature=s3cret"]
)
def test_an_address_that_is_none_is_refused_at_once_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("tried again"))
    with pytest.raises(
        ValueError, match=r"cannot download http://127\.0\.0\.1/[ab x]+ \(that is no address\)"
    ) as raised:
        download(url, tmp_path / "x")
    assert "s3cret" not in str(raised.value)


def test_what_a_server_says_is_shown_in_one_line_without_secrets(
    server: Server, tmp_path: Path
) -> None:
    server.status, server.reason = 403, "see https://h/?sig=s3cret\r\n and\x0bmore"
    with pytest.raises(ValueError, match=r"HTTP 403 see https://h/\?sig=\*\*\*") as raised:
        _get(server, tmp_path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("lengths", ["many", "-5", "1.5", " "])
def test_a_length_that_is_no_number_is_not_believed(
    server: Server, tmp_path: Path, lengths: str
) -> None:
    server.lengths = lengths
    assert _get(server, tmp_path).read_bytes() == CONTENT


# A file that changes between two parts.

OTHER = CONTENT[::-1]
DATES = (
    {"Last-Modified": "Mon, 02 Jan 2023 00:00:00 GMT"},
    {"Last-Modified": "Tue, 03 Jan 2023 00:00:00 GMT"},
)
TAGS = ({"ETag": '"one"'}, {"ETag": '"two"'})


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize(("before", "after"), [TAGS, DATES])
def test_a_file_that_changes_meanwhile_starts_over(
    server: Server, tmp_path: Path, before: dict[str, str], after: dict[str, str], if_range: bool
) -> None:
    server.break_after, server.num_breaks, server.if_range = 50_000, 1, if_range
    server.headers, server.changed = before, (OTHER, after)
    assert _get(server, tmp_path, None).read_bytes() == OTHER
    assert server.requests == [None, "bytes=50000-"] + ([] if if_range else [None])


def test_a_file_that_is_as_before_goes_on_without_a_published_hash(
    server: Server, tmp_path: Path
) -> None:
    server.break_after, server.num_breaks, server.headers = 50_000, 1, TAGS[0]
    assert _get(server, tmp_path, None).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=50000-"]


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_where_nothing_tells_that_the_rest_is_of_the_same_file_all_is_fetched_again(
    server: Server, tmp_path: Path, headers: dict[str, str]
) -> None:
    server.break_after, server.num_breaks, server.headers, server.changed = (
        50_000,
        1,
        headers,
        (OTHER, headers),
    )
    assert _get(server, tmp_path, None).read_bytes() == OTHER
    assert server.requests == [None, None]


def test_a_file_that_changes_its_length_starts_over(server: Server, tmp_path: Path) -> None:
    server.break_after, server.num_breaks, server.if_range = 50_000, 1, False
    server.headers, server.changed = TAGS[0], (CONTENT[:-9], TAGS[0])
    with pytest.raises(
        ValueError, match="not the published file, removed"
    ):  # at last: all of it is fetched, none kept
        _get(server, tmp_path)
    assert server.requests == [None, "bytes=50000-", None]


def test_what_another_address_has_sent_is_continued_only_if_a_hash_will_tell(
    server: Server, tmp_path: Path
) -> None:
    server.break_after, server.num_breaks, server.headers = 50_000, 5, TAGS[0]
    server.ranges = False
    with pytest.raises(ValueError, match="closed after 50000"):
        _get(server, tmp_path)
    server.url = server.url.replace("/folder/", "/elsewhere/")
    server.ranges, server.headers = True, TAGS[1]
    del server.requests[:]
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=50000-"]


def test_a_broken_record_of_a_partial_file_is_no_reason_to_fail(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".file.pth.partial").write_bytes(OTHER[:1000])
    (tmp_path / "cache" / ".file.pth.partial.json").write_bytes(b"\xff[")
    assert _get(server, tmp_path, None).read_bytes() == CONTENT
    assert server.requests == [None]


# Servers that fail, lie, are slow or send elsewhere.


@pytest.mark.parametrize("status", [503, 429, 408])
def test_a_server_that_is_busy_for_a_while_is_waited_for(
    server: Server, tmp_path: Path, status: int
) -> None:
    server.status, server.failures = status, 3
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 4


def test_a_server_that_falls_silent_is_asked_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    server.break_after, server.num_breaks, server.stall_s = 50_000, 1, 0.6
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=50000-"]


def test_a_length_that_is_too_large_ends_with_the_file_if_the_server_can_say_where_it_ends(
    server: Server, tmp_path: Path
) -> None:
    server.lengths = str(len(CONTENT) + 5)
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, f"bytes={len(CONTENT)}-"]


def test_a_length_that_is_too_small_gives_no_file(server: Server, tmp_path: Path) -> None:
    server.lengths = str(len(CONTENT) - 5)
    with pytest.raises(ValueError, match="not the published file, removed"):
        _get(server, tmp_path)
    assert not (tmp_path / "cache" / "file.pth").exists()


def test_a_redirect_is_followed(server: Server, tmp_path: Path) -> None:
    server.redirect = "/there?sig=s3cret"
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, None]


@pytest.mark.parametrize(
    "target", ["ftp://127.0.0.1/x?sig=s3cret", "file:///etc/passwd", "data:,x"]
)
def test_a_redirect_away_from_the_web_is_refused(
    server: Server, tmp_path: Path, target: str
) -> None:
    server.redirect = target
    with pytest.raises(ValueError, match=r"HTTP 302 ") as raised:
        _get(server, tmp_path)
    assert "s3cret" not in str(raised.value)
    assert len(server.requests) == 1


def test_a_redirect_does_not_leave_https() -> None:
    request = module.Request("https://h/x")
    with pytest.raises(module.HTTPError, match=r"redirect to http://h/y refused"):
        module._Redirects().redirect_request(request, None, 302, "", None, "http://h/y?sig=s3cret")
    assert (
        module._Redirects().redirect_request(request, None, 302, "", {}, "https://h/y").full_url
        == "https://h/y"
    )


# Disks.


def test_a_file_that_has_no_room_is_not_begun(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(
        ValueError,
        match=r"cannot write \S+ \(0\.3 MB are still to be fetched, 0\.1 MB are free\).*SEED_CACHE",
    ):
        _get(server, tmp_path)
    assert len(server.requests) == 1
    assert progress_of(tmp_path / "cache" / "file.pth") is None


def test_a_disk_that_gets_full_is_not_the_servers_fault(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"\(No space left on device\); make room"):
        _get(server, tmp_path)
    assert len(server.requests) == 1


def test_a_cache_that_cannot_be_written_is_named_at_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache" / ".file.pth.partial").mkdir(parents=True)
    with pytest.raises(OSError, match=r"\.file\.pth\.partial"):
        _get(server, tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b"])
def test_no_name_leads_out_of_the_cache(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a file in the cache"):
        cached(name)


# Mirrors.


def test_mirrors_are_asked_first_and_in_order(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file.pth").write_bytes(b"wrong")
    base = server.url.partition("/folder/")[0]
    monkeypatch.setenv(
        "SEED_MIRROR", f"file://{tmp_path}/none file://{tmp_path}/disk/ {base}/mirror?sig=s3cret"
    )
    path = download("http://127.0.0.1:9/never", tmp_path / "cache" / "file.pth", HASH)
    assert path.read_bytes() == CONTENT
    assert server.requests == [None]
    (tmp_path / "disk" / "file.pth").write_bytes(CONTENT)
    assert download(None, tmp_path / "again" / "file.pth", HASH).read_bytes() == CONTENT
    assert server.requests == [None]


def test_if_none_has_it_each_is_named_with_its_reason(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 404
    monkeypatch.setenv("SEED_MIRROR", f"file://{tmp_path}/none {server.url}")
    with pytest.raises(
        ValueError, match=r"file://\S+/none/\S+ \(.*No such.*\), http://\S+ \(HTTP 404.*\), http://"
    ) as raised:
        _get(server, tmp_path)
    assert "secret" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("mirror", ["/mnt/weights", "ftp://h/x", "s3://bucket"])
def test_a_mirror_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: str
) -> None:
    monkeypatch.setenv("SEED_MIRROR", mirror)
    with pytest.raises(
        ValueError, match=rf"SEED_MIRROR has .*{re.escape(mirror)}; expected addresses with http://"
    ):
        download(None, tmp_path / "x")


# The hash that is noted at first use.


def test_what_was_fetched_is_noted_and_a_later_change_is_noticed(
    server: Server, tmp_path: Path
) -> None:
    path = _get(server, tmp_path, None)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert noted_hash(path) == sha256
    assert path.with_name("file.pth.sha256").read_text() == f"{sha256}  file.pth\n"
    assert unchanged_since_noted(path)
    refuse_changed(path, sha256)
    future = path.with_name("file.pth.sha256").stat().st_mtime_ns - 10**9
    os.utime(path.with_name("file.pth.sha256"), ns=(future, future))
    path.write_bytes(OTHER)
    assert not unchanged_since_noted(path)
    with pytest.raises(
        ValueError,
        match=rf"has changed since it was first used \(sha256 ab, was {sha256}\); delete it",
    ):
        refuse_changed(path, "ab")
    path.with_name("file.pth.sha256").unlink()
    refuse_changed(path, "ab")


def test_progress_is_known_without_a_server(server: Server, tmp_path: Path) -> None:
    assert progress_of(tmp_path / "cache" / "file.pth") is None
    server.break_after, server.num_breaks, server.ranges = 50_000, 9, False
    with pytest.raises(ValueError, match="closed after"):
        _get(server, tmp_path)
    assert progress_of(tmp_path / "cache" / "file.pth") == (50_000, 256_000)
