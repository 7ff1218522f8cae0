"""The command that decodes everything."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seed_exp import verify
from seed_exp.config.compose import compose
from seed_exp.data.integrity import take_inventory
from seed_exp.data.tsv import TsvSource


def png(value: int, height: int = 4, width: int = 5) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int, label: int | str, data: bytes) -> str:
    return f"{number}.png\t{label}\t{base64.b64encode(data).decode()}\n"


BAD = {3: "cut in the middle", 300: b"no image", 301: b"", 302: png(7)[:-40]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """400 images of which 4 are bad and 2 are copies."""
    rows = []
    for number in range(400):
        data = BAD.get(number, png(number % 256, 1 + number // 256, 2 + number // 100))
        rows.append(f"{data}\n" if isinstance(data, str) else row(number, number % 10, data))
    rows[20], rows[350] = row(20, 0, png(19, 1, 2)), row(350, 0, png(19, 1, 2))
    path = tmp_path / "in" / "train.tsv"
    path.parent.mkdir()
    path.write_text("".join(rows))
    return path


def report(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "verify-report.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_bad_images_are_found_and_the_good_ones_measured(path: Path, num_workers: int) -> None:
    source = TsvSource(path, keep_bad=True)
    found = take_inventory(source, num_workers=num_workers)
    assert found.bad.keys() == BAD.keys()
    assert "line 4: expected 3 columns" in found.bad[3]
    assert "(0 bytes): the file is empty" in found.bad[301]
    good = [number for number in range(400) if number not in BAD]
    expected = [
        [1, 2] if number in (20, 350) else [1 + number // 256, 2 + number // 100] for number in good
    ]
    assert found.sizes.tolist() == expected
    assert found.num_copies == 2
    assert found.class_sizes is not None
    assert found.class_sizes.tolist() == np.bincount(source.labels).tolist()  # type: ignore[arg-type]


def test_the_command_lists_bad_images_and_exits_with_status_1(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(
        sys, "argv", ["verify.py", "data=tsv", f"data.root={path}", "data.num_workers=1"]
    )
    with pytest.raises(SystemExit) as ended:
        verify.main()
    assert (
        ended.value.code == "error: 4 of 400 images cannot be read; verify-report.jsonl lists them"
    )  # which is status 1
    entries = report(tmp_path)
    assert [(entry["split"], entry["index"], entry["key"]) for entry in entries] == [
        ("train", index, "" if index == 3 else f"{index}.png") for index in BAD
    ]
    assert all("train.tsv, line " in str(entry["error"]) for entry in entries)
    shown = capsys.readouterr()
    assert "train: 400 images, 396 good, 4 bad\n  height in pixels: 1 to 2, median 1\n" in shown.out
    assert "2 have the same bytes as another one" in shown.out
    assert "10 classes of 39 to 41 images" in shown.out
    assert re.search(r"fingerprint: tsv:train\.tsv:400:[0-9a-f]{16}\+[0-9a-f]{16}\n", shown.out)
    assert re.search(r"hash of all content: [0-9a-f]{64}\n", shown.out)
    assert "img/s" in shown.err


def test_good_images_give_an_empty_report_of_both_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "verify-report.jsonl").write_text("of an earlier day")
    verify.verify(compose("verify", ["data=digits", "data.num_workers=0"]))
    assert report(tmp_path) == []
    assert [
        line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "good" in line
    ] == ["train", "val"]
    verify.verify(compose("verify", ["data=digits", "data.num_workers=0", "split=val"]))
    assert "train" not in capsys.readouterr().out


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_hash_of_all_content_depends_on_bytes_and_labels_but_not_on_names(
    tmp_path: Path, num_workers: int
) -> None:
    def content(*rows: str) -> str:
        path = tmp_path / "x.tsv"
        path.write_text("".join(rows))
        return take_inventory(TsvSource(path), num_workers=num_workers).content

    rows = [row(number, number % 2, png(number)) for number in range(5)]
    found = content(*rows)
    assert content(*(f"other{one}" for one in rows)) == found
    assert content(*rows[:4], row(4, 0, png(5))) != found
    assert content(*rows[:4], row(4, 1, png(4))) != found
    assert content(*rows[::-1]) != found


def test_without_any_good_image_the_search_goes_through_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "a" / f"{number:02d}.png").write_bytes(b"")
    options = ["data=image_folder", f"data.root={tmp_path}/in", "data.num_workers=2"]
    with pytest.raises(ValueError, match="30 of 30 images cannot be read"):
        verify.verify(compose("verify", options))
    assert [entry["key"] for entry in report(tmp_path)] == [
        f"a/{number:02d}.png" for number in range(30)
    ]
