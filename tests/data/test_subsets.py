"""Parts of a source: shares of each class, and images that a list names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seed_exp.config.schema import DataConfig
from seed_exp.data.digits import DigitsSource
from seed_exp.data.sources import Source, Subset, load_source
from seed_exp.data.subsets import images_named_in, share_of_each_class

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 7], [3, 40, 100, 260]))
KEYS = [
    "n01/n01_1.JPEG",
    "n01/n01_2.JPEG",
    "n02/n02_1.JPEG",
    "n02/same.png",
    "n01/same.png",
    "plain",
    "a.b/n03_v1.2.jpg",
]


def chosen(tmp_path: Path, *names: str) -> list[int]:
    (tmp_path / "list.txt").write_text("\n".join(names))
    return images_named_in(tmp_path / "list.txt", KEYS.__getitem__, len(KEYS)).tolist()


def digits(**options: object) -> Source:
    return load_source(DataConfig(source="digits", **options), "train")


@pytest.mark.parametrize(
    ("fraction", "sizes"), [(0.01, [1, 1, 1, 3]), (0.1, [1, 4, 10, 26]), (1.0, [3, 40, 100, 260])]
)
def test_each_class_gives_its_share_and_one_image_at_least(
    fraction: float, sizes: list[int]
) -> None:
    indices = share_of_each_class(LABELS, fraction, seed=5, at_least=1)
    assert [(LABELS[indices] == label).sum() for label in (0, 1, 2, 7)] == sizes
    assert np.array_equal(indices, np.unique(indices))


def test_a_smaller_share_is_part_of_a_larger_one_and_another_seed_is_another_choice() -> None:
    shares = [
        set(share_of_each_class(LABELS, fraction, seed=5, at_least=1).tolist())
        for fraction in (0.01, 0.1, 0.5)
    ]
    assert shares[0] < shares[1] < shares[2]
    assert shares[1] != set(share_of_each_class(LABELS, 0.1, seed=6, at_least=1).tolist())


def test_the_choice_of_a_seed_never_changes() -> None:
    # Results with few labels stay comparable only while the same images are chosen.
    assert share_of_each_class(np.arange(20) % 2, 0.2, seed=0).tolist() == [0, 2, 11, 17]


def test_every_image_of_a_class_is_as_likely() -> None:
    counts = sum(
        np.bincount(share_of_each_class(np.zeros(10, int), 0.3, seed), minlength=10)
        for seed in range(1000)
    )
    assert counts.sum() == 3000
    assert (abs(counts - 300) < 75).all()  # 5 standard deviations


def test_a_name_matches_with_and_without_its_folder_and_extension(tmp_path: Path) -> None:
    assert chosen(tmp_path, "n02_1.JPEG", "", "  n01/n01_1.JPEG ") == [0, 2]
    assert chosen(tmp_path, "n01_2", "plain.png", "n03_v1.2.jpeg") == [1, 5, 6]
    assert chosen(tmp_path, "n01/same", "n02/same.png") == [3, 4]
    assert chosen(tmp_path, *KEYS) == list(range(7))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "names no images"),
        (
            ["n01_1", "n09_1.JPEG"],
            r"1 of 2 images in data\.subset=.* not among the training images: n09_1; "
            r".* like n01/n01_1",
        ),
        (["01_1"], "not among"),
        ([f"x{i}" for i in range(5)], r"x0, x1, x2, \.\.\.;"),
        (
            ["same.png"],
            r"same in .* several images, n02/same\.png and n01/same\.png; "
            r"give the names with their folders",
        ),
    ],
)
def test_a_name_that_stands_for_no_image_or_for_several_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(tmp_path, *names)


def test_options_of_the_data_choose_training_images_only(tmp_path: Path) -> None:
    few, whole = digits(fraction=0.1), digits()
    assert isinstance(few, Subset)
    assert abs(len(few) - 144) <= 5
    assert set(np.unique(few.labels)) == set(range(10))
    assert len(load_source(DataConfig(source="digits", fraction=0.1), "val")) == 360
    fingerprints = {
        source.fingerprint()
        for source in (few, whole, digits(fraction=0.2), digits(fraction=0.1, fraction_seed=1))
    }
    assert len(fingerprints) == 4
    assert digits(fraction=0.1).fingerprint() == few.fingerprint()
    assert whole.fingerprint() == DigitsSource("train").fingerprint()
    (tmp_path / "list.txt").write_text(
        "\n".join(few.key(index) for index in reversed(range(len(few))))
    )
    assert digits(subset=str(tmp_path / "list.txt")).fingerprint() == few.fingerprint()


def test_a_share_of_unlabelled_images_is_a_share_of_all(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    assert (
        len(
            load_source(
                DataConfig(source="image_folder", root=str(tmp_path), fraction=0.25), "train"
            )
        )
        == 5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"data\.fraction must be above 0 and up to 1, got 0\.0"),
        ({"fraction": 1.5}, r"data\.fraction must be above 0 and up to 1"),
        (
            {"fraction": 0.1, "subset": "list.txt"},
            r"data\.subset=list\.txt and data\.fraction=0\.1 both choose images",
        ),
        ({"subset": "absent.txt"}, r"no list of images at data\.subset=absent\.txt"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**options)
