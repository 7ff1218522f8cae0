"""`embed`: features of a folder with file names, its near-duplicates, and a page of neighbours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seed_exp import __version__, embed
from seed_exp.base.files import file_hash
from seed_exp.config.compose import compose
from seed_exp.config.schema import DataConfig, StudentConfig
from seed_exp.data.sources import load_source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.evaluation.features import Extractor
from seed_exp.evaluation.setup import load_frozen
from seed_exp.models.students import build_student, save_student
from seed_exp.views.recipe import EvalViews

VIEWS = {"eval_size": 16, "eval_resize": 16, "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run of two networks and a folder of photos.

    One photo is there twice and one is broken.
    """
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = StudentConfig("convnet_w2")
        facts = {"command": "distill", "step": 2, "eval_views": VIEWS}
        save_student(
            tmp_path / "run" / "students" / f"{name}.safetensors",
            build_student(config, 8),
            config,
            facts,
        )
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 24, 3), np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "photos" / f"{number}.png")
    Image.fromarray(pixels[2]).save(tmp_path / "photos" / "copy.png")
    (tmp_path / "photos" / "5.png").write_bytes(b"broken")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*options: str) -> None:
    data = [
        "data=image_folder",
        "data.root=photos",
        "data.num_workers=0",
        "data.max_bad=0.5",
        "device=cpu",
    ]
    embed.embed(compose("embed", ["run=run", *data, *options]))


def expected(name: str, *, head: bool = False) -> torch.Tensor:
    """Features of the good images, in the order of their names."""
    frozen = load_frozen(Path("run"), [name], torch.device("cpu"))
    source = load_source(DataConfig("image_folder", root="photos"), "train")
    student = frozen.students[name]
    network: Any = student if head else student.features
    indices = np.delete(evenly_spaced(len(source)), 5)
    return Extractor(EvalViews(frozen.views), torch.device("cpu"), 0)(
        {"x": network}, source, indices
    )[0]["x"]


def test_parquet_has_each_readable_image_under_its_name_with_what_made_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run()
    table = parquet.read_table("features.parquet")
    assert table["key"].to_pylist() == [f"{number}.png" for number in (0, 1, 2, 3, 4, 6, 7, 8)] + [
        "copy.png"
    ]
    assert table["label"].null_count == 9
    for name in ("one", "two"):
        torch.testing.assert_close(torch.tensor(table[name].to_pylist()), expected(name))
    metadata = json.loads(table.schema.metadata[b"seed_exp"])
    assert metadata["students"]["two"]["sha256"] == file_hash(
        home / "run" / "students" / "two.safetensors"
    )
    assert metadata["data"].startswith("image_folder:photos:10:")
    assert (metadata["values"], metadata["run"], metadata["views"], metadata["version"]) == (
        "features",
        "run",
        VIEWS,
        __version__,
    )
    assert json.loads((home / "bad_samples.jsonl").read_text())["key"] == "5.png"
    assert "10 of 10 images, 1 cannot be read, " in capsys.readouterr().out


def test_npz_may_hold_embeddings_in_half_precision_and_labels(home: Path) -> None:
    run("networks=[one]", "head=true", "dtype=float16", "output=out/e.npz")
    with np.load("out/e.npz") as file:
        assert file["one"].dtype == np.float16
        torch.testing.assert_close(
            torch.from_numpy(file["one"]).float(), expected("one", head=True), atol=1e-3, rtol=0
        )
    run("networks=[one]", "output=d.npz", "data=digits", "split=val")
    with np.load("d.npz") as file:
        assert len(file["one"]) == 360
        assert set(file["labels"].tolist()) == set(range(10))


def test_copies_are_listed_and_neighbours_shown(home: Path) -> None:
    Image.open("photos/7.png").resize((48, 40)).save("query.png")
    run(
        "networks=[one]",
        "output=f.npz",
        "duplicates=0.999999",
        "gallery=page.html",
        "neighbours=3",
        "query=[query.png]",
    )
    assert [json.loads(line) for line in Path("f-duplicates.jsonl").read_text().splitlines()] == [
        ["2.png", "copy.png"]
    ]
    page = Path("page.html").read_text()
    assert page.count("<img") == 1 + 3 + 2
    first_row = page[page.index("query.png") :]
    assert first_row.index('title="7.png"') < first_row.index("</section>")
    run("networks=[one]", "output=f.npz", "gallery=page.html", "num_queries=4", "neighbours=100")
    assert Path("page.html").read_text().count("<img") == 4 * 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["output=f.csv"], r"unknown format of features '\.csv'"),
        (
            ["gallery=g.html"],
            r"gallery and duplicates are of one network, run has one, two; "
            r"choose one with networks=\[NAME\]",
        ),
        (["query=[a.png]"], r"query=\[...\] needs gallery"),
        (
            ["networks=[one]", "gallery=g.html", "query=[a.png]"],
            "cannot read image a.png: No such file",
        ),
        (
            ["networks=[one]", "gallery=g.html", "query=[photos/5.png]"],
            "cannot decode image 'photos/5.png'",
        ),
        (["duplicates=1.5"], "duplicates must be a cosine above 0 and up to 1, got 1.5"),
        (["split=val"], "no validation images in photos"),
        (["data.max_bad=0"], "1 of 10 images cannot be read, more than data.max_bad=0"),
        (["data.root=none"], "data.root=none does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_leaves_no_features(
    home: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run("output=f.npz", *options)
    assert not Path("f.npz").exists()
    assert not Path("g.html").exists()


def test_names_that_are_no_text_are_written_so_that_they_can_be_read(home: Path) -> None:
    (home / "photos" / "0.png").rename(home / "photos" / "\udcff.png")
    run("networks=[one]", "output=f.npz", "gallery=g.html")
    with np.load("f.npz") as file:
        assert "\\udcff.png" in file["keys"].tolist()
