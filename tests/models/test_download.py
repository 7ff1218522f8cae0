"""Downloads survive broken connections, resume, check what they got, and never leave half a file under its name."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from seed_exp.models.download import download

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
    """Bytes by which the part that is sent lies behind the part that was asked for."""
    length: bool = True
    lengths: str | None = None
    """What Content-Length says instead of the truth."""
    reason: str | None = None
    """What stands behind the status."""
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
            if state.status != 200:
                self.send_error(state.status, state.reason)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            start += state.shift if wanted else 0
            if wanted and state.ranges and start >= len(state.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.content)}")
                self.end_headers()
                return
            body = state.content[start:]
            self.send_response(206 if wanted and state.ranges else 200)
            if wanted and state.ranges:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            if state.length:
                self.send_header("Content-Length", state.lengths or str(len(body)))
            self.end_headers()
            if state.num_breaks:
                state.num_breaks -= 1
                body = body[: state.break_after]
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


def _get(server: Server, folder: Path, expected_hash: str | None = HASH) -> Path:
    return download(server.url, folder / "cache" / "file.pth", expected_hash, first_wait_s=0.001)


def _visible(path: Path) -> list[str]:
    return [other.name for other in path.iterdir() if not other.name.endswith(".lock")]


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
    assert _visible(path.parent) == ["file.pth"]


def test_a_broken_download_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.break_after, server.num_breaks = 50_000, 4
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=50000-", "bytes=100000-", "bytes=150000-", "bytes=200000-"]


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


def test_connections_that_bring_nothing_new_end_in_one_clear_line(server: Server, tmp_path: Path) -> None:
    server.ranges, server.break_after, server.num_breaks = False, 50_000, 100
    with pytest.raises(ValueError, match="the connection closed after 50000 of 256000 bytes") as raised:
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


@pytest.mark.parametrize(("partial", "requests"), [(CONTENT, ["bytes=256000-"]), (CONTENT + b"x", ["bytes=256001-", None])])
def test_a_partial_file_that_is_whole_or_too_long(
    server: Server, tmp_path: Path, partial: bytes, requests: list[str | None]
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".file.pth.partial").write_bytes(partial)
    assert _get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == requests


def test_wrong_bytes_are_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(ValueError, match=rf"/folder/file\.pth has md5 \w+, expected {HASH[4:]}\.\.\.") as raised:
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
    with pytest.raises(ValueError, match=rf"cannot download http://127\.0\.0\.1/folder/file\.pth \(HTTP {status} "):
        _get(server, tmp_path)
    assert len(server.requests) == num_requests


def test_without_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(
        ValueError, match=r"cannot download http://127\.0\.0\.1/x \(.*refused.*\); check the network, or fetch"
    ) as raised:
        download("http://127.0.0.1:9/x?signature=secret", tmp_path / "x", first_wait_s=0.001)
    assert "secret" not in str(raised.value)


def test_of_several_that_ask_at_once_one_downloads(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: _get(server, tmp_path), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert server.requests == [None]


def test_a_file_that_is_there_is_taken_from_a_folder_that_only_others_may_write_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"there")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # as root, permissions would refuse nothing
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert download("http://127.0.0.1:9/x", tmp_path / "x") == tmp_path / "x"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "data:text/plain,hello", "ftp://127.0.0.1:9/x", "nonsense"])
def test_only_the_web_is_asked(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="only http and https are fetched"):
        download(url, tmp_path / "new" / "x")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("url", ["http://user:s3cret@127.0.0.1/x", "http://127.0.0.1:9/a b?signature=s3cret"])
def test_an_address_that_is_none_is_refused_at_once_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("tried again"))
    with pytest.raises(ValueError, match=r"cannot download http://127\.0\.0\.1/[ab x]+ \(that is no address\)") as raised:
        download(url, tmp_path / "x")
    assert "s3cret" not in str(raised.value)


def test_what_a_server_says_is_shown_in_one_line_without_secrets(server: Server, tmp_path: Path) -> None:
    server.status, server.reason = 403, "see https://h/?sig=s3cret\r\n and\x0bmore"
    with pytest.raises(ValueError, match=r"HTTP 403 see https://h/\?sig=\*\*\*") as raised:
        _get(server, tmp_path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("lengths", ["many", "-5", "1.5", " "])
def test_a_length_that_is_no_number_is_not_believed(server: Server, tmp_path: Path, lengths: str) -> None:
    server.lengths = lengths
    assert _get(server, tmp_path).read_bytes() == CONTENT
