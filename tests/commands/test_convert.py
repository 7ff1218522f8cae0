"""Images from one layout to another."""

from __future__ import annotations

import base64
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from disks import fill
from PIL import Image

from seed_exp import convert
from seed_exp.config.compose import compose
from seed_exp.config.errors import is_for_user
from seed_exp.config.schema import DataConfig, DataFormat
from seed_exp.data import writers
from seed_exp.data.digits import DigitsSource
from seed_exp.data.sources import Source, load_source
from seed_exp.data.tsv import TsvSource


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def run(data: str, root: Path, to: str, output: Path, *more: str) -> Source:
    """Calls the command; returns what can then be read."""
    convert.convert(
        compose(
            "convert",
            [f"data={data}", f"data.root='{root}'", f"to={to}", f"output='{output}'", *more],
        )
    )
    return load_source(
        DataConfig(source=to, root=str(output)), "val" if "split=val" in more else "train"
    )


def content(folder: Path) -> dict[str, bytes]:
    """All visible files, less indices."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if not path.name.endswith(".index.npy")
    }


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


NAMES = ["b/2.png", "a/x/y/1.PNG", "a/0.v2.JPEG", "a/100%.jpg", "c d/é 1.webp", "a/%2E.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value, name in enumerate(NAMES):
        write(tmp_path / "folder" / "train" / name, png(value))
    return tmp_path / "folder"


def photo(width: int, height: int, format_: str, **how: object) -> bytes:
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, format_, **how)
    return buffer.getvalue()


def test_larger_images_become_jpegs_of_the_size_and_others_stay_as_they_are(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    files = {
        "a/wide.png": photo(120, 60, "PNG"),
        "a/turned.jpeg": photo(120, 60, "JPEG", exif=turned),
        "b/small.png": photo(33, 32, "PNG"),
        "b/thin.jpg": photo(400, 20, "JPEG"),
    }
    for name, data in files.items():
        write(tmp_path / "folder" / "train" / name, data)
    source = run("image_folder", tmp_path / "folder", "image_folder", tmp_path / "out", "size=32")
    found = content(tmp_path / "out" / "train")
    assert sorted(found) == ["a/turned.jpeg", "a/wide.jpg", "b/small.png", "b/thin.jpg"]
    for name in ("b/small.png", "b/thin.jpg"):
        assert found[name] == files[name]
    sizes = [tuple(source.image(number).shape[1:]) for number in range(4)]
    assert sizes == [(64, 32), (32, 64), (32, 33), (20, 400)]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 1]
    # Against Pillow's own reduction of the very pixels, but for the rounding of the JPEG.
    with Image.open(tmp_path / "folder/train/a/wide.png") as whole:
        expected = np.asarray(whole.resize((64, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(source.image(1).permute(1, 2, 0).numpy() - expected).mean() < 3
    better = run(
        "image_folder", tmp_path / "folder", "tsv", tmp_path / "b", "size=32", "quality=100"
    )
    assert len(better.encoded(1)) > len(source.encoded(1))
    with pytest.raises(ValueError, match=r"was made with .*'size': 32.* choose another output"):
        run("image_folder", tmp_path / "folder", "image_folder", tmp_path / "out", "size=48")
    with pytest.raises(ValueError, match="size must be at least 8, got 4"):
        run("image_folder", tmp_path / "folder", "tsv", tmp_path / "c", "size=4")


def test_images_that_cannot_be_made_smaller_are_listed_or_an_error(tmp_path: Path) -> None:
    for number in range(6):
        data = photo(64, 64, "PNG") if number % 3 else b"\xff\xd8\xffbroken"
        write(tmp_path / "folder" / "train" / f"a/{number}.png", data)
    with pytest.raises(ValueError, match=r"cannot decode image 'a/0\.png'"):
        run("image_folder", tmp_path / "folder", "shards", tmp_path / "out", "size=32")
    skip = ["size=32", "data.on_error=skip", "data.max_bad=0.5"]
    left = run("image_folder", tmp_path / "folder", "shards", tmp_path / "out", *skip)
    assert [left.key(number) for number in range(len(left))] == [
        f"a/{number}.jpg" for number in (1, 2, 4, 5)
    ]


def test_folder_to_tsv_to_shards_to_folder_gives_the_same_files(
    folder: Path, tmp_path: Path
) -> None:
    tsv, shards, back = (tmp_path / name for name in ("tsv", "shards", "back"))
    sources = [
        load_source(DataConfig(source="image_folder", root=str(folder)), "train"),
        run("image_folder", folder, "tsv", tsv),
        run("tsv", tsv, "shards", shards, "shard_size=4"),
        run("shards", shards, "image_folder", back),
    ]
    assert content(back) == content(folder)
    assert [path.name for path in sorted((shards / "train").glob("*.tar"))] == [
        "train-000000.tar",
        "train-000001.tar",
    ]
    for source in sources:
        assert [source.key(index) for index in range(6)] == [
            sources[0].key(index) for index in range(6)
        ]
        assert source.labels is not None
        assert source.labels.tolist() == [0, 0, 0, 0, 1, 2]
    assert not list(tmp_path.rglob("*.partial"))


def test_real_photographs_keep_their_bytes_and_labels(shared: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "photos.tsv", (shared / "data" / "imagenet_samples.tsv").read_bytes())
    first = TsvSource(path)
    run(
        "tsv", path, "image_folder", tmp_path / "folder", "split=train"
    )  # keys without class folders: labels are their names
    folder = run(
        "image_folder", tmp_path / "folder", "shards", tmp_path / "shards", "shard_size=20"
    )
    assert folder.labels is not None
    assert first.labels is not None
    assert sorted(folder.labels.tolist()) == sorted(first.labels.tolist())
    wanted = {(int(label), first.encoded(index)) for index, label in enumerate(first.labels)}
    assert {
        (int(label), folder.encoded(index)) for index, label in enumerate(folder.labels)
    } == wanted


@pytest.mark.parametrize("to", ["tsv", "image_folder", "shards"])
def test_both_splits_of_a_set_without_files_become_png(
    tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        run("digits", tmp_path, to, tmp_path / "out", f"split={split}", "shard_size=1000")
        source = load_source(DataConfig(source=to, root=str(tmp_path / "out")), split)
        digits = DigitsSource(split)
        assert (
            f"{len(digits)} images: data={to} data.root={tmp_path}/out" in capsys.readouterr().out
        )
        assert source.labels is not None
        order = (
            np.argsort(digits.labels, kind="stable")
            if to == "image_folder"
            else np.arange(len(digits))
        )
        assert source.labels.tolist() == digits.labels[order].tolist()
        for index in (0, 7, len(digits) - 1):
            assert torch.equal(source.image(index), digits.image(int(order[index])))


@pytest.mark.parametrize("to", ["tsv", "image_folder", "shards"])
def test_unlabelled_images_stay_unlabelled(tmp_path: Path, to: str) -> None:
    for number in range(3):
        write(tmp_path / "flat" / f"{number}.png", png(number))
    source = run("image_folder", tmp_path / "flat", to, tmp_path / "out")
    assert source.labels is None
    assert [source.encoded(index) for index in range(3)] == [png(number) for number in range(3)]


# Kills.


class Dying:
    """Images whose process is killed when it asks for number `at`."""

    def __init__(self, at: int | None) -> None:
        self.labels = np.arange(40) % 7
        self.at = at

    def __len__(self) -> int:
        return 40

    def encoded(self, index: int) -> bytes:
        if index == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return png(index)

    def key(self, index: int) -> str:
        return f"number {index}"

    def fingerprint(self) -> str:
        return "dying"


def make(output: Path, to: DataFormat, at: int | None = None) -> int:
    output.mkdir(exist_ok=True)
    return writers.convert(Dying(at), "val", to, output, shard_size=10, on_bad=None)  # type: ignore[arg-type]


def dies(target: Callable[[], object]) -> None:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("to", DataFormat)
def test_killed_and_called_again_it_gives_the_same_bytes(tmp_path: Path, to: DataFormat) -> None:
    make(tmp_path / "quiet", to)
    expected = content(tmp_path / "quiet")
    killed = tmp_path / "killed"
    for at in (0, 9, 10, 23, 39):
        dies(lambda at=at: make(killed, to, at))
        assert (
            content(killed).keys() - {name for name in content(killed) if ".partial" in name}
            == set()
        )  # nothing half
    assert make(killed, to) == 40
    assert content(killed) == expected
    assert not list(killed.glob(".*partial"))


def test_a_second_process_is_refused_and_the_first_one_finishes(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()

    class Waiting(Dying):
        def encoded(self, index: int) -> bytes:
            if index == 20:
                theirs.send("here")
                theirs.recv()
            return png(index)

    def write() -> None:
        writers.convert(
            Waiting(None),  # type: ignore[arg-type]
            "val",
            DataFormat.shards,
            tmp_path,
            shard_size=10,
            on_bad=None,
        )

    first = multiprocessing.get_context("fork").Process(target=write)
    first.start()
    ours.recv()
    with pytest.raises(ValueError, match=rf"val is in use by process {first.pid} on .*; wait for"):
        make(tmp_path, DataFormat.shards)
    ours.send("go on")
    first.join(60)
    assert first.exitcode == 0
    assert make(tmp_path, DataFormat.shards) == 40


@pytest.mark.parametrize("to", DataFormat)
def test_a_full_disk_is_named_and_with_room_the_same_command_goes_on(
    small_disk: Path, tmp_path: Path, to: DataFormat
) -> None:
    make(tmp_path / "quiet", to)
    ballast = fill(small_disk, leave=1 << 14)
    with pytest.raises(OSError, match=r"No space left on device: '.*disk/\.?val") as raised:
        make(small_disk, to)
    assert is_for_user(raised.value)
    ballast.unlink()
    assert make(small_disk, to) == 40
    assert content(small_disk) == content(tmp_path / "quiet")


@pytest.mark.parametrize("to", DataFormat)
def test_a_kill_before_or_after_any_renaming_does_no_harm(
    tmp_path: Path, to: DataFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "quiet", to)
    rename = Path.rename
    for when in range(2 * (5 if to is DataFormat.shards else 1)):
        killed, renamings = tmp_path / f"killed{when}", iter(range(100))

        def die(path: Path, target: Path, when: int = when, renamings: object = renamings) -> Path:
            number = next(renamings)  # type: ignore[call-overload]
            if number != when // 2:
                return rename(path, target)
            if when % 2:
                rename(path, target)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", die)
            dies(lambda killed=killed: make(killed, to))
        assert make(killed, to) == 40
        assert content(killed) == content(tmp_path / "quiet")


def test_a_file_cut_by_a_kill_is_written_again(tmp_path: Path) -> None:
    make(tmp_path / "quiet", DataFormat.image_folder)
    dies(lambda: make(tmp_path / "killed", DataFormat.image_folder, 30))
    victims = sorted((tmp_path / "killed" / ".val.partial").rglob("*.png"))
    os.truncate(victims[3], 10)
    os.truncate(victims[4], 0)
    make(tmp_path / "killed", DataFormat.image_folder)
    assert content(tmp_path / "killed") == content(tmp_path / "quiet")


def test_what_is_finished_is_not_made_again(tmp_path: Path) -> None:
    make(tmp_path, DataFormat.shards)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "val").glob("*.tar")}
    assert make(tmp_path, DataFormat.shards, at=0) == 40  # would be killed if it read
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "val").glob("*.tar")} == before


# Refusals.


def test_an_output_with_something_else_in_it_is_refused(folder: Path, tmp_path: Path) -> None:
    run("image_folder", folder, "tsv", tmp_path / "out")
    with pytest.raises(
        ValueError,
        match=r"was made with .*'to': 'tsv'.*but .*'to': 'shards'.* is asked for; choose",
    ):
        run("image_folder", folder, "shards", tmp_path / "out")
    with pytest.raises(ValueError, match="choose another output"):
        run("digits", folder, "tsv", tmp_path / "out")
    with pytest.raises(ValueError, match="was not made by this command"):
        run("digits", folder, "image_folder", folder)
    assert content(folder).keys() == {f"train/{name}" for name in NAMES}


@pytest.mark.parametrize("to", ["image_folder", "shards"])
@pytest.mark.parametrize(
    "key",
    [
        "../../escaped.png",
        "/tmp/escaped.png",
        "a/../../b.png",
        "a//b.png",
        ".hidden/a.png",
        "./a.png",
        "",
        "a/.png",
    ],
)
def test_keys_that_would_leave_the_output_are_refused(tmp_path: Path, key: str, to: str) -> None:
    path = write(
        tmp_path / "in" / "x.tsv", f"{key}\t0\t{base64.b64encode(png(1)).decode()}\n".encode()
    )
    with pytest.raises(ValueError, match="cannot be a path below the output folder"):
        run("tsv", path, to, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("*.png"))
    assert not (tmp_path / "deep" / "out" / "train").exists()


@pytest.mark.parametrize("to", ["image_folder", "shards"])
def test_two_images_of_one_name_are_refused(tmp_path: Path, to: str) -> None:
    line = f"a/0.png\t0\t{base64.b64encode(png(1)).decode()}\n".encode()
    with pytest.raises(ValueError, match="two images would be named"):
        run("tsv", write(tmp_path / "x.tsv", line * 2), to, tmp_path / "out")
    assert len(run("tsv", tmp_path / "x.tsv", "tsv", tmp_path / "tsv")) == 2


@pytest.mark.parametrize("name", ["tab\there.png", "line\nfeed.png", os.fsdecode(b"\xff.png")])
def test_a_key_that_no_line_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "in" / "a" / name, png(0))
    with pytest.raises(ValueError, match="cannot stand in a line of a TSV file"):
        run("image_folder", tmp_path / "in", "tsv", tmp_path / "out")


def test_partly_labelled_images_are_no_folder_of_classes(tmp_path: Path) -> None:
    image = base64.b64encode(png(1)).decode()
    path = write(tmp_path / "x.tsv", f"a\t0\t{image}\nb\t-1\t{image}\n".encode())
    with pytest.raises(ValueError, match="cannot hold images without a label among others"):
        run("tsv", path, "image_folder", tmp_path / "out")
    source = run("tsv", path, "shards", tmp_path / "out2")
    assert source.labels is not None
    assert (source.labels.tolist(), source.key(0)) == ([0, -1], "a.png")


def test_images_that_cannot_be_read_are_left_out_and_listed_or_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = base64.b64encode(png(1)).decode()
    rows = [f"{number}.png\t{number}\t{image}" for number in range(6)]
    rows[2], rows[4] = "cut", "4.png\t4\tAA*A"
    path = write(tmp_path / "x.tsv", "\n".join(rows).encode())
    source = run("tsv", path, "shards", tmp_path / "out", "data.max_bad=0.5", "shard_size=2")
    assert "4 images, 2 that cannot be read left out" in capsys.readouterr().out
    assert [source.key(index) for index in range(4)] == ["0.png", "1.png", "3.png", "5.png"]
    assert (tmp_path / "out" / "bad_samples.jsonl").read_text().count("\n") == 2
    with pytest.raises(ValueError, match=r"1 of 6 images cannot be read.*x.tsv, line 3"):
        run("tsv", path, "tsv", tmp_path / "out2")
    with pytest.raises(ValueError, match=r"x.tsv, line 3: expected 3 columns"):
        run("tsv", path, "tsv", tmp_path / "out3", "data.on_error=raise")


def test_a_result_that_lacks_images_is_found(tmp_path: Path) -> None:
    make(tmp_path, DataFormat.shards)
    (tmp_path / "val" / "val-000001.tar").unlink()
    with pytest.raises(ValueError, match="has 30 images, but 40 were written"):
        make(tmp_path, DataFormat.shards)


def test_the_command_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["convert.py", "data=digits", "output=x"])
    with pytest.raises(SystemExit, match="error: missing option to: add to=VALUE"):
        convert.main()
