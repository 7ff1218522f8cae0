"""No secret reaches what is written, the rest does, and what an address names keeps its name."""

from __future__ import annotations

import json
import sys
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seed_exp.base.redaction import (
    HIDDEN,
    print_traceback,
    printable_streams,
    redact,
    redact_all,
    unsigned,
)

SECRET = "s3cret/and+more="
IN_URL = quote(SECRET, safe="")
NAMES = [
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "MY_SECRET",
    "PASSWORD",
    "db_password",
]


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clears the environment, which may hold secrets of the machine that runs the tests."""
    monkeypatch.setattr("os.environ", {})


SIGNED = {  # by who signs: an address with a signature in it, and what is shown of it
    "s3": (
        f"https://b.s3.amazonaws.com/swav.pth?versionId=3&X-Amz-Credential=AK%2F2026&X-Amz-Date=20260101&X-Amz-Expires=60"
        f"&X-Amz-Security-Token={IN_URL}&X-Amz-Signature={IN_URL}",
        "https://b.s3.amazonaws.com/swav.pth?versionId=3&X-Amz-Credential=***&X-Amz-Date=20260101&X-Amz-Expires=60"
        "&X-Amz-Security-Token=***&X-Amz-Signature=***",
    ),
    "old_s3": (
        f"https://b.s3.amazonaws.com/f?AWSAccessKeyId=AK&Signature={IN_URL}&Expires=17",
        "https://b.s3.amazonaws.com/f?AWSAccessKeyId=***&Signature=***&Expires=17",
    ),
    "google": (
        f"https://storage.googleapis.com/b/f?X-Goog-Credential=me&X-Goog-Date=2026&X-Goog-Signature={IN_URL}#top",
        "https://storage.googleapis.com/b/f?X-Goog-Credential=***&X-Goog-Date=2026&X-Goog-Signature=***#top",
    ),
    "azure": (
        f"https://a.blob.core.windows.net/c/f?sv=2020-02-10&se=2030-01-01T00%3A00Z&sr=b&sp=r&sig={IN_URL}&snapshot=5",
        "https://a.blob.core.windows.net/c/f?sv=***&se=***&sr=b&sp=***&sig=***&snapshot=5",
    ),
    "cloudfront": (
        f"https://d.cloudfront.net/f?Expires=17&Signature={IN_URL}&Key-Pair-Id=K",
        "https://d.cloudfront.net/f?Expires=17&Signature=***&Key-Pair-Id=***",
    ),
    "token": (
        f"https://h/f?a=1&token={IN_URL}&access_token={IN_URL}",
        "https://h/f?a=1&token=***&access_token=***",
    ),
    "user": (f"https://me:{IN_URL}@h:8080/f?a=1", "https://***@h:8080/f?a=1"),
    "user_with_at": ("ftp://me:s3cret@more@h/f", "ftp://***@h/f"),
    "token_as_user": (f"https://{IN_URL}@h/f", "https://***@h/f"),
    "fragment": (
        f"https://h/f#access_token={IN_URL}&state=2",
        "https://h/f#access_token=***&state=2",
    ),
    "in_an_address": (
        f"https://h/r?to=https%3A%2F%2Fs%2Ff%3Fa%3D1%26X-Amz-Signature%3D{IN_URL}%26b%3D2&c=3",
        "https://h/r?to=https%3A%2F%2Fs%2Ff%3Fa%3D1%26X-Amz-Signature%3D***%26b%3D2&c=3",
    ),
    "in_json": (
        rf"https://h/f?a=1\u0026sig={IN_URL}\u0026b=2",
        r"https://h/f?a=1\u0026sig=***\u0026b=2",
    ),
    "in_html": (f"https://h/f?a=1&amp;sig={IN_URL}&amp;b=2", "https://h/f?a=1&amp;sig=***&amp;b=2"),
    "other_case": (f"https://h/f?x-amz-signature={IN_URL}", "https://h/f?x-amz-signature=***"),
    "no_host": (f"GET /f?sig={IN_URL} HTTP/1.1", "GET /f?sig=*** HTTP/1.1"),
}


@pytest.mark.parametrize("kind", SIGNED)
@pytest.mark.parametrize(
    "around", ["{}", "cannot download {} (HTTP 403)", 'url="{}"', "<{}>", "'{}'\n"]
)
def test_what_opens_an_address_is_hidden_and_the_rest_of_it_stays(kind: str, around: str) -> None:
    address, shown = SIGNED[kind]
    assert redact(around.format(address)) == around.format(shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"logged in with hf_{'aB3' * 11}.", "logged in with ***."),
        (
            f"machine api.wandb.ai\n  login user\n  password {SECRET}\nnext",
            "machine api.wandb.ai\n  login user\n  password ***\nnext",
        ),
        (
            f"machine h login user account a password {SECRET}",
            "machine h login user account a password ***",
        ),
        (f"WANDB_API_KEY={SECRET} python -m x", "WANDB_API_KEY=*** python -m x"),
        (f"""{{"HF_TOKEN": "{SECRET} and more", "a": 1}}""", """{"HF_TOKEN": "***", "a": 1}"""),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"{{'authorization': 'Basic {SECRET}'}}", "{'authorization': 'Basic ***'}"),
    ],
)
def test_keys_tokens_and_passwords_are_hidden_where_their_form_shows_them(
    text: str, shown: str
) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "commit 0123456789abcdef0123456789abcdef01234567, sha256 0123abcd",
        "https://dl.fbaipublicfiles.com/moco/moco_v1_200ep_pretrain.pth.tar",
        "https://h/f?se=1&sp=2&sv=3&sort=up&page=2#part",
        "https://h/@scope/package?email=a@b.c",
        "the password is wrong; signature = none; what? sigh",
        "runs/distill/resnet18-swav_r50-7a6b5c4d: step 12/24, loss 15.3",
        "objective.queue_size=65536 hf_hub teacher_ssl=moco_v2 KEY=VALUE",
        "student hf_convnext",
    ],
)
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("name", NAMES)
def test_values_of_secret_variables_are_hidden_wherever_they_occur(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert SECRET in redact(f"a{SECRET}b")
    monkeypatch.setattr(
        "os.environ", {name: SECRET, "HOME": "/home/someone", "PASSWORD_FILE": "/etc/passwords"}
    )
    text = f"a{SECRET}b {SECRET} {IN_URL} /home/someone /etc/passwords"
    assert redact(text) == "a***b *** *** /home/someone /etc/passwords"


def test_short_values_are_not_hidden_and_of_two_the_longer_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "os.environ", {"A_KEY": "resnet1", "B_KEY": "12345678", "C_KEY": "12345678-more"}
    )
    assert redact("resnet18 12345678-more 12345678") == "resnet18 *** ***"


def test_each_line_of_a_secret_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"TLS_KEY": "first line\n\nsecond line\n"})
    assert redact("second line of first line\nx") == "*** of ***\nx"


def test_nested_values_are_redacted_in_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"A_TOKEN": SECRET})
    address, shown = SIGNED["s3"]
    options = {"a": [address, {"b": SECRET}], "c": (SECRET, 3), "d": None, "e": 0.5, "f": True}
    assert redact_all(options) == {
        "a": [shown, {"b": HIDDEN}],
        "c": [HIDDEN, 3],
        "d": None,
        "e": 0.5,
        "f": True,
    }
    assert options["a"] == [address, {"b": SECRET}]
    assert json.loads(json.dumps(redact_all(options))) == redact_all(options)


# What a terminal shows.


def test_what_is_printed_controls_no_terminal_and_shows_no_secret(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "cats\x1b[2J\x07\x9b31m\u202egpj\udcff"
    with printable_streams():
        print(f"{name}\tü\r50 %", f"logged in with hf_{'aB3' * 11}")
        sys.stderr.writelines(["a\x1b]0;title\x07\n"])
        assert not sys.stdout.isatty()
    print("\x1b[0m")
    shown = "cats\\x1b[2J\\x07\\x9b31m\\u202egpj\\udcff\tü\r50 % logged in with ***\n\x1b[0m\n"
    assert capsys.readouterr() == (shown, "a\\x1b]0;title\\x07\n")


def test_a_traceback_shows_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("no file https://me:s3cret@h/f \x1b[2J")
    except ValueError as error:
        print_traceback(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("ValueError: no file https://***@h/f \\x1b[2J\n")


# Names by address.


@pytest.mark.parametrize("kind", SIGNED)
def test_an_address_names_the_same_thing_signed_redacted_or_signed_anew(kind: str) -> None:
    address, shown = SIGNED[kind]
    anew = (
        address.replace(IN_URL, "other")
        .replace("2026", "2027")
        .replace("=17", "=18")
        .replace("2030", "2031")
    )
    assert unsigned(anew) == unsigned(address) == unsigned(shown) == unsigned(unsigned(address))
    assert "other" not in unsigned(anew)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("s3", "https://b.s3.amazonaws.com/swav.pth?versionId=3"),
        ("azure", "https://a.blob.core.windows.net/c/f?snapshot=5"),
        ("cloudfront", "https://d.cloudfront.net/f"),
        ("google", "https://storage.googleapis.com/b/f#top"),
        ("token", "https://h/f?a=1"),
        ("user", "https://h:8080/f?a=1"),
        ("in_html", "https://h/f?a=1&amp;b=2"),
    ],
)
def test_what_an_address_names_is_kept(kind: str, expected: str) -> None:
    assert unsigned(SIGNED[kind][0]) == expected


def test_without_a_signature_parameters_of_the_same_names_count() -> None:
    for address in ("https://h/f?se=1&sv=2", "https://h/f?expires=never", "/data/imagenet", "a?b"):
        assert unsigned(address) == address


def test_a_name_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"A_KEY": "imagenet1k"})
    assert unsigned("/data/imagenet1k") == "/data/imagenet1k"


SEPARATORS = [
    "https://",
    "?",
    "&",
    "&amp;",
    "#",
    ";",
    "=",
    "%26",
    "%3D",
    "%25",
    r"\u0026",
    '"',
    "'",
    ":",
    " ",
]
WORDS = [
    "u:p@",
    "sig",
    "se",
    "Signature",
    "X-Amz-Date",
    "token",
    "A_KEY",
    "login",
    "password",
    "Authorization",
    HIDDEN,
    SECRET,
]


@given(
    text=st.lists(st.sampled_from(SEPARATORS + WORDS) | st.text(max_size=3), max_size=12).map(
        "".join
    )
)
def test_redacting_twice_changes_nothing_and_never_fails(text: str) -> None:
    once = redact(text)
    assert redact(once) == once
    assert unsigned(unsigned(text)) == unsigned(text)


@given(
    before=st.text("ab/?&=.", max_size=9),
    secret=st.lists(
        st.sampled_from([*"xyz019-_~.;,/+?", "%26", "%3D", "%2B"]), min_size=1, max_size=20
    ).map("".join),
    name=st.sampled_from(
        ["X-Amz-Signature", "sig", "Signature", "token", "access_token", "X-Amz-Credential"]
    ),
)
def test_no_part_of_a_signature_is_left(before: str, secret: str, name: str) -> None:
    assert (
        redact(f"https://h/{before}?{name}={secret}&after=1")
        == f"https://h/{before}?{name}=***&after=1"
    )
