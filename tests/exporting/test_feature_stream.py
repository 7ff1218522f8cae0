"""Features streamed part by part equal those computed at once, each under its image's number.

One process or two may compute them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Ranks

from seed_exp.config.schema import CropConfig, ViewsConfig
from seed_exp.data.bad_samples import BadSamples
from seed_exp.data.digits import DigitsSource
from seed_exp.data.image_folder import ImageFolderSource
from seed_exp.data.sources import Source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine import distributed
from seed_exp.evaluation.features import Extractor
from seed_exp.exporting import feature_stream
from seed_exp.exporting.feature_stream import FilesSource, feature_parts
from seed_exp.models.convnet import ConvNet
from seed_exp.views.recipe import EvalViews

CPU = torch.device("cpu")


def extractor(folder: Path | None = None) -> Extractor:
    views = EvalViews(ViewsConfig("eval", {"global": CropConfig()}, eval_size=16, eval_resize=16))
    bad = None if folder is None else (lambda source: BadSamples(folder, source, 1.0))
    return Extractor(views, CPU, 0, 16, bad_samples=bad)


def encoder() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(2).eval()


def together(
    source: Source, folder: Path | None = None, first: int = 40
) -> tuple[list[int], torch.Tensor, list[int]]:
    feature_stream._FIRST_PART, feature_stream._MAX_PART_BYTES = (
        first,
        4 * 16 * 100,
    )  # at most 100 images of 16 numbers
    found = list(feature_parts(extractor(folder), {"a": encoder()}, source))
    indices = [index for part in found for index in part.indices.tolist()]
    return (
        indices,
        torch.cat([part.features["a"] for part in found if part.features]),
        [part.done for part in found],
    )


@pytest.fixture(autouse=True)
def _sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_stream, "_FIRST_PART", feature_stream._FIRST_PART)
    monkeypatch.setattr(feature_stream, "_MAX_PART_BYTES", feature_stream._MAX_PART_BYTES)


def test_parts_are_what_all_at_once_are() -> None:
    source = DigitsSource("val")
    indices, features, done = together(source)
    assert indices == list(range(360))
    assert done[0] == 40
    assert done[-1] == 360
    assert max(np.diff(done)) <= 100
    whole = extractor()({"a": encoder()}, source, evenly_spaced(360)).features
    torch.testing.assert_close(features, whole["a"])


def test_an_image_that_cannot_be_read_has_no_features_and_lends_its_name_to_none(
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(12):
        Image.new("RGB", (20, 20), (20 * number, 255 - 20 * number, 7)).save(
            tmp_path / "in" / f"{number:02}.png"
        )
    for number in (0, 4, 5, 11):
        (tmp_path / "in" / f"{number:02}.png").write_bytes(b"broken")
    source = ImageFolderSource(tmp_path / "in")
    indices, features, done = together(source, tmp_path, first=5)
    assert indices == [1, 2, 3, 6, 7, 8, 9, 10]
    assert done[-1] == 12
    alone = extractor()({"a": encoder()}, source, np.array(indices)).features
    torch.testing.assert_close(features, alone["a"])
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match=r"00\.png"):
        together(source, first=5)


def on_a_rank() -> tuple[int, list[int], list[float], list[int]]:
    found = list(feature_parts(extractor(), {"a": encoder()}, DigitsSource("val")))
    rows = [part.features["a"] for part in found if part.features]
    indices = [index for part in found for index in part.indices.tolist()]
    return (
        distributed.rank(),
        indices,
        torch.cat(rows).flatten().tolist() if rows else [],
        [part.done for part in found],
    )


def test_two_processes_share_the_work_and_the_first_has_all(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(on_a_rank)
    indices, features, _ = together(DigitsSource("val"))
    assert first[1] == indices
    torch.testing.assert_close(torch.tensor(first[2]), features.flatten())
    assert (second[1], second[2]) == ([], [])
    assert first[3] == second[3]


def test_single_files_are_images_and_a_missing_one_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "a.png")
    files = FilesSource([str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    assert files.image(0).shape == (3, 4, 5)
    with pytest.raises(ValueError, match=r"cannot read image .*b\.png: No such file"):
        files.image(1)
