"""The list of images that cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny

from seed_exp.data.bad_samples import BadSamples
from seed_exp.data.loader import load_batches
from seed_exp.data.order import SampleOrder
from seed_exp.views.recipe import TrainViews


def listed(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def test_each_bad_image_is_listed_once_also_over_several_starts(
    tmp_path: Path, logged: list[str]
) -> None:
    source = tiny.Images(100)
    bad = BadSamples(tmp_path, source, 0.1)
    for index in (7, 3, 7):
        bad(index, f"no. {index} is broken")
    again = BadSamples(tmp_path, tiny.Images(100), 0.1)
    assert len(again) == 2
    again(3, "no. 3 is broken")
    again(4, "no. 4 is broken")
    name = source.fingerprint()
    assert listed(tmp_path) == [
        {"source": name, "index": index, "key": str(index), "error": f"no. {index} is broken"}
        for index in (7, 3, 4)
    ]
    assert len(logged) == 3
    assert "takes the place of one that cannot be read: no. 7 is broken" in logged[0]


def test_after_a_few_the_log_refers_to_the_list(tmp_path: Path, logged: list[str]) -> None:
    bad = BadSamples(tmp_path, tiny.Images(100), 1.0)
    for index in range(20):
        bad(index, "broken")
    assert len(logged) == 6
    assert "only listed in" in logged[-1]
    assert len(listed(tmp_path)) == 20


@pytest.mark.parametrize(("max_bad", "num_allowed"), [(0.0, 0), (0.01, 2), (0.0149, 2), (1.0, 200)])
def test_more_bad_images_than_allowed_are_an_error_that_says_what_to_do(
    tmp_path: Path, max_bad: float, num_allowed: int
) -> None:
    bad = BadSamples(tmp_path, tiny.Images(200), max_bad)
    for index in range(num_allowed):
        bad(index, "broken")
    if num_allowed == 200:
        return
    message = (
        rf"{num_allowed + 1} of 200 images cannot be read.*data.max_bad={max_bad:g} "
        r".*bad_samples.jsonl.*seed_exp.verify"
    )
    with pytest.raises(ValueError, match=message):
        bad(199, "broken")
    assert len(listed(tmp_path)) == num_allowed + 1
    with pytest.raises(ValueError, match=message):  # the next start does not get further
        BadSamples(tmp_path, tiny.Images(200), max_bad)(199, "broken")


def test_sources_share_the_file_but_not_the_count(tmp_path: Path) -> None:
    first, second = (
        BadSamples(tmp_path, tiny.Images(10), 1.0),
        BadSamples(tmp_path, tiny.Images(11), 1.0),
    )
    first(3, "broken")
    second(3, "broken")
    assert len(listed(tmp_path)) == 2
    assert (
        len(BadSamples(tmp_path, tiny.Images(10), 1.0))
        == len(BadSamples(tmp_path, tiny.Images(11), 1.0))
        == 1
    )


@pytest.mark.parametrize("keep", [5, 40, -1])
def test_a_line_cut_by_a_kill_costs_only_itself(tmp_path: Path, keep: int) -> None:
    bad = BadSamples(tmp_path, tiny.Images(100), 1.0)
    bad(1, "broken")
    first = bad.file.stat().st_size
    bad(2, "broken")
    with bad.file.open("r+b") as file:
        file.truncate(first + keep if keep > 0 else bad.file.stat().st_size + keep)
    again = BadSamples(tmp_path, tiny.Images(100), 1.0)
    again(2, "broken")
    again(3, "broken")
    assert len(BadSamples(tmp_path, tiny.Images(100), 1.0)) == 3


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"[]\n7\nnull\n", b'{"source": 1}\n', b'{"index": "x"}\n', b"\0\0\0"]
)
def test_a_list_that_is_none_is_added_to(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad_samples.jsonl").write_bytes(content)
    bad = BadSamples(tmp_path, tiny.Images(100), 1.0)
    bad(2, "broken")
    assert len(BadSamples(tmp_path, tiny.Images(100), 1.0)) == 1
    assert bad.file.read_bytes().startswith(content)


def test_processes_that_share_the_folder_count_together(tmp_path: Path) -> None:
    first, second = (BadSamples(tmp_path, tiny.Images(100), 0.02) for _ in range(2))
    first(1, "broken")
    second(1, "broken")
    second(2, "broken")
    assert [entry["index"] for entry in listed(tmp_path)] == [1, 2]
    with pytest.raises(ValueError, match="3 of 100 images"):
        first(3, "broken")


def test_a_signed_address_in_a_key_does_not_get_into_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.Images(100)
    monkeypatch.setattr(source, "key", lambda _: "https://h/cat.jpg?token=opensesame")
    BadSamples(tmp_path, source, 1.0)(1, "https://h/cat.jpg?token=opensesame: broken")
    assert listed(tmp_path)[0]["key"] == "https://h/cat.jpg?token=***"
    assert "opensesame" not in (tmp_path / "bad_samples.jsonl").read_text()


def test_a_full_disk_is_only_a_warning(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    BadSamples(tmp_path, tiny.Images(100), 1.0)(1, "broken")
    assert any("No space left on device" in line for line in logged)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_list_does_not_depend_on_workers_or_on_where_a_run_was_resumed(
    tmp_path: Path, num_workers: int
) -> None:
    class Holes(tiny.Images):
        def image(self, index: int) -> object:
            if index % 9 == 2:
                raise ValueError(f"no. {index} is broken")
            return super().image(index)

    source, views = Holes(40), TrainViews(tiny.views_config(), seed=1)
    order = SampleOrder(40, 8, seed=0)
    seen = []
    for start, end in ((0, 4), (3, 11)):  # killed after step 3, with the checkpoint of step 2
        bad = BadSamples(tmp_path, source, 0.5)
        batches = load_batches(
            source, views, map(order.batch, range(start, end)), num_workers=num_workers, on_bad=bad
        )
        seen.append([batch.indices.clone() for batch in batches])
    assert (seen[0][3] == seen[1][0]).all()
    quiet = BadSamples(tmp_path / "quiet", source, 0.5)
    quiet.file.parent.mkdir()
    for _ in load_batches(source, views, map(order.batch, range(11)), num_workers=0, on_bad=quiet):
        pass
    assert listed(tmp_path) == listed(tmp_path / "quiet")
    assert {entry["index"] for entry in listed(tmp_path)} == set(np.arange(2, 40, 9).tolist())
