"""Data sets of Hugging Face and parquet files, made here and read without a network."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import forks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hf_sets import CLASSES, made, offline, png, put_into_cache, write_parquet

from seed_exp.base.fingerprints import content_of
from seed_exp.config.compose import compose
from seed_exp.config.schema import DataConfig
from seed_exp.convert import convert
from seed_exp.data.decode import decode
from seed_exp.data.hugging_face import HuggingFaceSource
from seed_exp.data.sources import NoValidationError, Source, load_source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    offline(monkeypatch, tmp_path / "home")
    return tmp_path / "home"


def load(kind: str, split: Any = "train", **options: Any) -> Source:
    words = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items()
    }
    return load_source(DataConfig(kind, **words), split)


def assert_holds(source: Source, values: range) -> None:
    assert [source.encoded(index) for index in range(len(source))] == [png(one) for one in values]
    assert source.labels is not None
    assert source.labels.tolist() == [value % 2 for value in values]
    for index in (0, len(values) - 1):
        assert torch.equal(source.image(index), decode(png(values[index]), "expected"))


def write_hub(root: Path) -> dict[str, Any]:
    return {"root": write_parquet(root)}


def write_saved(root: Path) -> dict[str, Any]:
    splits = {"train": made(range(20)), "validation": made(range(20, 26))}
    datasets.DatasetDict(splits).save_to_disk(root)
    return {"root": root}


def write_cached(root: Path) -> dict[str, Any]:
    put_into_cache(write_parquet(root), "owner", "things")
    return {"name": "owner/things"}


WRITERS = {
    "hub": ("hf", write_hub),
    "saved": ("hf", write_saved),
    "cached": ("hf", write_cached),
    "parquet": ("parquet", write_hub),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_each_layout_gives_the_files_and_labels_of_both_splits(layout: str, tmp_path: Path) -> None:
    kind, write = WRITERS[layout]
    options = write(tmp_path / "set")
    train, val = load(kind, **options), load(kind, "val", **options)
    assert_holds(train, range(20))
    assert_holds(val, range(20, 26))
    assert [train.key(0), train.key(19)] == ["train-0", "train-19"]
    copy = pickle.loads(pickle.dumps(train))
    assert copy.encoded(7) == png(7)
    assert copy.fingerprint() == train.fingerprint() == load(kind, **options).fingerprint()
    assert train.fingerprint() != val.fingerprint()


def test_a_copy_elsewhere_is_known_and_other_images_of_the_same_size_are_not(
    tmp_path: Path,
) -> None:
    def written(name: str, value: int) -> str:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": [bytes([value]) * 9] * 300}), path)
        return content_of(load("parquet", root=path).fingerprint())

    assert written("one", 1) == written("two", 1) != written("three", 3)


def test_parquet_that_another_program_wrote_is_read_by_file_pattern_and_split(
    tmp_path: Path,
) -> None:
    for number in range(2):
        values = range(10 * number, 10 * number + 10)
        table = {"jpg": [png(value) for value in values], "y": [value % 2 for value in values]}
        pq.write_table(pa.table({**table, "id": values}), tmp_path / f"part-{number}.parquet")
    both = load("parquet", root=tmp_path / "part-*.parquet")
    assert_holds(both, range(20))
    assert_holds(load("parquet", root=tmp_path / "part-1.parquet"), range(10, 20))
    with pytest.raises(NoValidationError, match=r"no validation images in .*part-1\.parquet"):
        load("parquet", "val", root=tmp_path / "part-1.parquet")
    options = {"root": tmp_path / "part-0.parquet", "val_root": tmp_path / "part-1.parquet"}
    assert_holds(load("parquet", "val", **options), range(10, 20))
    held = load("parquet", "val", root=tmp_path / "part-0.parquet", val_fraction=0.2)
    assert len(held) == 2


def test_other_files_in_a_folder_of_parquet_files_are_left_out(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "set")
    (root / "README.md").write_text("# Things")
    (root / "data" / "notes.json").write_text("{}")
    assert_holds(load("parquet", root=root), range(20))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(1))
    with pytest.raises(ValueError, match="of the kind imagefolder rather than parquet files"):
        load("parquet", root=tmp_path / "pictures")
    assert load("hf", root=tmp_path / "pictures").encoded(0) == png(1)


def test_splits_and_columns_can_be_named(tmp_path: Path) -> None:
    numbers = list(range(8))
    rows = made(
        range(8),
        small=(datasets.Image(), [{"bytes": png(one + 100), "path": None} for one in numbers]),
        kind=(datasets.Value("int32"), [3] * 8),
    )
    datasets.DatasetDict({"first": rows, "second": rows.select(range(2))}).save_to_disk(
        tmp_path / "x"
    )
    options = {"root": tmp_path / "x", "train_split": "first", "val_split": "second"}
    with pytest.raises(ValueError, match="several columns of images: image, small"):
        load("hf", **options)
    named = {**options, "image_column": "small", "label_column": "kind"}
    source = load("hf", **named)
    assert source.encoded(3) == png(103)
    assert source.labels is not None
    assert source.labels.tolist() == [3] * 8
    assert len(load("hf", "val", **named)) == 2
    with pytest.raises(ValueError, match="has no split 'train', but first, second"):
        load("hf", root=tmp_path / "x")


def test_images_without_labels_and_labels_that_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(1)] * 3, "number": [1, 2, 3]}), path)
    assert load("parquet", root=path).labels is None
    pq.write_table(pa.table({"image": [png(1)] * 3, "label": [1, None, 3]}), path)
    labels = load("parquet", root=path).labels
    assert labels is not None
    assert labels.tolist() == [1, -1, 3]


COLUMNS: Mapping[str, Any] = {"image": [png(0)], "text": ["x"], "number": [1.5], "label": [1]}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            ["text", "number"],
            {},
            r"no column that is an image.* text \(string\), number \(f",
        ),
        (None, {"image_column": "text"}, "image_column=text, which is not an image: an Image of"),
        (None, {"image_column": "imag"}, "no such column; did you mean 'image'"),
        (None, {"label_column": "lable"}, "no such column; did you mean 'label'"),
        (None, {"label_column": "text"}, "label_column=text, which is no ClassLabel and no column"),
        (None, {"train_split": "test"}, r"train_split=test: .* has no such split; .*Known: train"),
    ],
)
def test_what_does_not_fit_is_named_with_what_there_is(
    columns: list[str] | None, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    table = {name: COLUMNS[name] for name in columns or COLUMNS}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        load("parquet", root=tmp_path / "a.parquet", **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hf", {}, r"needs either data\.name=OWNER/NAME"),
        ("hf", {"name": "a/b", "root": "c"}, "got data.name=a/b and data.root=c"),
        ("hf", {"root": "absent"}, "no folder of a Hugging Face data set at absent"),
        ("hf", {"name": "nobody/nothing"}, "cannot load the data set nobody/nothing: .*Offline"),
        ("parquet", {}, r"needs data\.root=PATH"),
        ("parquet", {"root": "absent.parquet"}, r"cannot load the data set absent\.parquet: "),
        ("parquet", {"root": __file__}, "cannot load the data set"),
    ],
)
def test_a_set_that_cannot_be_had_is_an_error_of_one_line(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(kind, **options)
    assert "\n" not in str(caught.value)


def test_a_label_that_is_no_class_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(1)] * 2, "label": [0, -7]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column label of .*got -7"):
        load("parquet", root=tmp_path / "a.parquet")


def test_validation_images_elsewhere_must_have_the_same_classes(tmp_path: Path) -> None:
    made(range(4)).to_parquet(tmp_path / "train.parquet")
    other = made(range(4)).cast_column("label", datasets.ClassLabel(names=CLASSES[::-1]))
    other.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"the classes of .*other.*\(red, blue"):
        load("parquet", "val", root=tmp_path / "train.parquet", val_root=tmp_path / "other.parquet")


@pytest.mark.parametrize("kind", ["hf", "parquet"])
def test_a_row_cannot_name_any_file_of_the_machine(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(5))
    inside = tmp_path / "set" / "inside.png"
    inside.parent.mkdir()
    inside.write_bytes(png(6))
    paths = [str(secret), str(inside.parent / ".." / "secret.png"), str(inside), None]
    kinds = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": path} for path in paths]},
        datasets.Features({"image": kinds}),  # as Image, it would be saved with the files inside
    )
    if kind == "hf":
        rows.save_to_disk(tmp_path / "set")
    else:
        struct = pa.array([{"bytes": None, "path": path} for path in paths])
        struct = struct.cast(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pa.table({"image": struct}), tmp_path / "set" / "a.parquet")
    source = load(kind, root=tmp_path / "set" / ("a.parquet" if kind == "parquet" else ""))
    for index in (0, 1) if kind == "hf" else (0, 1, 2):
        with pytest.raises(ValueError, match=r"names the file .*png, which is neither in d"):
            source.encoded(index)
    if kind == "hf":
        assert source.encoded(2) == png(6)
    with pytest.raises(ValueError, match=r"cannot read image 'train-3' of .* the value is null"):
        source.image(3)
    assert source.fingerprint()


def test_rows_are_neither_decoded_nor_copied_into_memory(tmp_path: Path) -> None:
    source = load("hf", root=write_parquet(tmp_path / "set"))
    assert isinstance(source, HuggingFaceSource)
    assert isinstance(source._rows.data, datasets.table.MemoryMappedTable)
    assert len(pickle.dumps(source)) < 5000


def test_conversion_keeps_files_and_labels(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "set")
    words = [f"data.root='{root}'", "to=shards", f"output='{tmp_path / 'out'}'"]
    for split in ("train", "val"):
        convert(compose("convert", ["data=parquet", *words, f"split={split}"]))
    assert_holds(load("shards", root=tmp_path / "out"), range(20))
    assert_holds(load("shards", "val", root=tmp_path / "out"), range(20, 26))


def test_the_missing_library_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data=hf needs datasets, .* 'seed_exp\[hf\]'"):
        load("hf", root=tmp_path)


@pytest.mark.parametrize("layout", ["parquet", pytest.param("cached", marks=pytest.mark.slow)])
def test_the_command_line_trains_from_it_offline_with_workers_and_again(
    layout: str, tmp_path: Path
) -> None:
    kind, write = WRITERS[layout]
    place = [f"data.{key}={value}" for key, value in write(tmp_path / "set").items()]
    command = [sys.executable, "-m", "seed_exp.pretrain", f"data={kind}", *place]
    command += ["data.num_workers=2", "student=convnet_w2", "views=digits", "device=cpu"]
    command += ["batch_size=8", "steps=3", "moco.queue_size=16", "moco.bn_group_size=null"]
    command += ["tracker=files", "run_dir=run", "log_every=1", "knn_bank_size=20"]
    # Libraries read where a cache is when they are imported.
    run = subprocess.run if layout == "cached" else forks.run
    numbers = []
    for _ in range(2):
        done = run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        numbers.append((tmp_path / "run" / "metrics.jsonl").read_text())
    assert numbers[0] == numbers[1]
    assert [json.loads(line)["step"] for line in numbers[0].splitlines()][:3] == [1, 2, 3]
    assert not os.path.lexists(tmp_path / "run" / "bad_samples.jsonl")
