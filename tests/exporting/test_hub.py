"""Uploads to the Hugging Face hub, seen by a hub of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seed_exp.exporting.folders import atomic_folder
from seed_exp.exporting.hub import check_repository, push

huggingface_hub = pytest.importorskip("huggingface_hub")


def test_a_new_repository_is_private_and_gets_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append((name, options))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push(tmp_path, "me/small", ["model.onnx"]) == "https://huggingface.co/me/small"
    assert calls[0] == ("me/small", {"private": True, "exist_ok": True})
    expected = {"repo_id": "me/small", "folder_path": tmp_path, "delete_patterns": ["model.onnx"]}
    assert calls[1][1] == {**expected, "commit_message": "Export of seed_exp"}


def test_a_refusal_is_one_line_without_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            raise OSError(
                "401 for https://me:hunter22@hub/api\n"
                "Authorization: Bearer hf_abcdefghijklmnopqrstuvwxyz012345"
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(
        ValueError,
        match=r"is written, but cannot be pushed to me/small: OSError: 401 for https://\*\*\*@hub",
    ) as error:
        push(tmp_path, "me/small", [])
    assert "hf_" not in str(error.value)
    assert str(error.value).endswith(f"to try it again: hf upload me/small {tmp_path}")
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__


@pytest.mark.parametrize(
    "name",
    [
        "small",
        "../me/small",
        "me/../small",
        "me/small/x",
        "me/",
        "/me/small",
        "me/sm all",
        "",
        "me/.git",
        "https://x/y",
    ],
)
def test_a_name_that_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected OWNER/NAME"):
        check_repository(name)


def test_repositories_have_letters_digits_dots_dashes_and_underscores() -> None:
    check_repository("some-one/resnet18_seed.v2")


def test_a_folder_is_whole_or_absent_and_replaces_nothing(tmp_path: Path) -> None:
    def broken() -> None:
        with atomic_folder(tmp_path / "a" / "b") as folder:
            (folder / "x").write_text("x")
            raise ValueError("unplugged")

    with pytest.raises(ValueError, match="unplugged"):
        broken()
    assert list((tmp_path / "a").iterdir()) == []
    for _ in range(2):
        (tmp_path / "a" / "b").mkdir(exist_ok=True)
        with atomic_folder(tmp_path / "a" / "b") as folder:
            (folder / "x").write_text("x")
        assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "x"]
        (tmp_path / "a" / "b" / "x").unlink()
    (tmp_path / "a" / "b" / "x").write_text("mine")
    with (
        pytest.raises(ValueError, match="exists already; delete it, or choose another output"),
        atomic_folder(tmp_path / "a" / "b"),
    ):
        pass
    assert (tmp_path / "a" / "b" / "x").read_text() == "mine"
