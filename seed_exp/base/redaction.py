"""Text that is written or shown, without secrets: keys, tokens, passwords, signed addresses."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import TracebackType
from typing import Any, TextIO, cast
from urllib.parse import quote

HIDDEN = "***"
_SHORTEST_SECRET = 8  # a shorter value may stand in any text by chance
_SECRET_NAME = r"(?:_KEY|_TOKEN|_SECRET|PASSWORD)"

_ACCESS = (
    r"x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|"
    r"awsaccesskeyid|signature|key-pair-id|sig|"
    r"(?:access_|refresh_|id_|auth_)?token|api_?key|client_secret|password"
)
"""Parameters that give access to an address: S3, Google Cloud, CloudFront, Azure, OAuth."""
_SAS = r"se|sp|sv"
"""Parameters that belong to an Azure signature; without one they may mean anything."""
_SIGNING = r"x-(?:amz|goog)-[\w-]+|expires|policy|s[eprstv]|spr|sip|srt|sk\w+"
"""Parameters that belong to a signature and change with it: dates, scopes, algorithms."""

# A path that was an address has one of its two slashes; C:/ is none.
_USER_INFO = r"(?:(?<=://)|(?<=\w\w:/)(?!/))[^\s/?#\"'<>]*"
_QUERY = re.compile(r"[?#&][^\s\"'<>]+")
# Separators and equals signs are also found as HTML, JSON and an address inside an address escape
# them; the value of a parameter in an inner address ends earlier.
_PARAMETER = (
    r"(?P<before>&amp;|[?#&]|\\u0026|%(?:25)*(?:26|3F))(?P<name>{})"
    r"(?P<equals>=|(?P<inner>%(?:25)*3D))"
)
_VALUE = r"(?(inner)(?:(?!%(?:25)*26|\\u0026)[^&#])*|(?:(?!\\u0026)[^&#])*)"

_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_TOKEN = re.compile(r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{20,}|wandb_v\d_\w{20,})")
_BEHIND_NAMES = (
    re.compile(
        rf"(\b[A-Z0-9_]*{_SECRET_NAME}[\"']?\s*[=:]\s*[\"']?)(?:(?<=[\"'])[^\"']+|[^\s\"',;]+)"
    ),
    re.compile(r"(\blogin\s+\S+\s+(?:account\s+\S+\s+)?password\s+)\S+"),  # netrc
    re.compile(r"(\bauthorization[\"']?\s*[=:]\s*[\"']?\w+\s+)[^\s\"',;]+", re.IGNORECASE),
)


def redact(text: str) -> str:
    """`text` with *** in place of secrets; the rest stays readable, even a signed address's expiry.

    Hidden are user and password in addresses; parameters that sign them or give access; keys and
    tokens of Hugging Face and W&B; values behind names such as API_KEY, in a netrc file's
    `password` and in an Authorization header; and, wherever they occur, the values (8 characters or
    more) of environment variables whose names end in _KEY, _TOKEN, _SECRET or PASSWORD. Redacting
    twice gives the same as redacting once.
    """
    for secret in _secrets_in_environment():
        text = text.replace(secret, HIDDEN)
    text = re.sub(f"{_USER_INFO}(?=@)", HIDDEN, text)
    text = _QUERY.sub(lambda query: _hide_access(query[0]), text)
    text = _TOKEN.sub(HIDDEN, text)
    for pattern in _BEHIND_NAMES:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def redact_all(value: Any) -> Any:
    """A copy of nested dicts and lists with all strings redacted; tuples become lists."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_all(inner) for key, inner in value.items()}
    return [redact_all(inner) for inner in value] if isinstance(value, list | tuple) else value


def printable(text: str) -> str:
    r"""`text` for a terminal: without secrets, control characters as in `\x1b`.

    File and class names come from others. Their escape sequences could rewrite the screen, their
    signs of direction could change the order of what is read. Line ends, tabs and the carriage
    returns of progress bars stay.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], redact(text))


class _Printing:
    """A text stream that gives to another what is written, printable, one write at a time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Makes all that is printed until the context ends `printable`, by libraries too."""
    with (
        redirect_stdout(cast("TextIO", _Printing(sys.stdout))),
        redirect_stderr(cast("TextIO", _Printing(sys.stderr))),
    ):
        yield


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A `sys.excepthook`: prints the traceback of an error, `printable`."""
    lines = traceback.format_exception(kind, error, trace)
    sys.stderr.write(printable("".join(lines)))


def unsigned(text: str) -> str:
    """`text` with addresses stripped of user, password and parameters that change on signing.

    Use it to name something by its address, such as a run: the name stays the same with another
    signature, with none, and after `redact`. Unlike `redact` it does not depend on the environment.
    """
    return _QUERY.sub(
        lambda query: _without_signature(query[0]), re.sub(f"{_USER_INFO}@", "", text)
    )


def _hide_access(query: str) -> str:
    names = f"{_ACCESS}|{_SAS}" if _has(query, "sig") else _ACCESS
    pattern = _PARAMETER.format(names) + _VALUE
    return re.sub(pattern, rf"\g<before>\g<name>\g<equals>{HIDDEN}", query, flags=re.IGNORECASE)


def _without_signature(query: str) -> str:
    names = f"{_ACCESS}|{_SIGNING}" if _has(query, "(?:x-amz-|x-goog-)?signature|sig") else _ACCESS
    left = re.sub(_PARAMETER.format(names) + _VALUE, "", query, flags=re.IGNORECASE)
    return left if left[:1] == query[0] else re.sub("^&(?:amp;)?", query[0], left)


def _has(query: str, names: str) -> bool:
    return re.search(_PARAMETER.format(names), query, re.IGNORECASE) is not None


def _secrets_in_environment() -> list[str]:
    """Secret values, longest first because one may contain another.

    A value of several lines gives each line; every secret is listed plain and quoted for addresses.
    """
    values = [
        value
        for name, value in os.environ.items()
        if re.search(f"{_SECRET_NAME}$", name, re.IGNORECASE)
    ]
    lines = {line.strip() for value in values for line in value.splitlines()}
    secrets = {line for line in lines if len(line) >= _SHORTEST_SECRET}
    return sorted(secrets | {quote(secret, safe="") for secret in secrets}, key=len, reverse=True)
