"""VOC and COCO as they lie on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rectangles import COLOURS, write_coco, write_voc

from seed_exp.config.schema import DataConfig
from seed_exp.data.detection_sets import VOC_CLASSES, DetectionSet, load_coco, load_voc
from seed_exp.data.sources import load_source


def test_voc_trains_on_trainval_of_both_years_and_is_tested_on_2007(tmp_path: Path) -> None:
    written = write_voc(tmp_path, 3)
    train, val = load_voc(tmp_path, "train"), load_voc(tmp_path, "val")
    parts = [file.parts[-3] for file in train.files], [file.parts[-3] for file in val.files]
    assert parts == (["VOC2007"] * 3 + ["VOC2012"] * 3, ["VOC2007"] * 3)
    for index, file in enumerate(val.files):
        size, found = written[f"VOC2007/{file.stem}"]
        assert tuple(val.sizes[index]) == size == tuple(val.image(index).shape[1:])
        assert val.objects[index].boxes.tolist() == [list(box) for _, box in found]
        assert [VOC_CLASSES[number - 1] for number in val.objects[index].classes] == [
            name for name, _ in found
        ]
    assert train.key(0) == "JPEGImages/trainval0.jpg"


def test_difficult_objects_lie_outside_the_areas_that_count(tmp_path: Path) -> None:
    write_voc(tmp_path, 2)
    areas = [annotation["area"] for annotation in load_voc(tmp_path, "val").truth["annotations"]]
    assert [area > 1e10 for area in areas] == [True, False, True, False]
    assert all(
        annotation["area"] < 1e10 for annotation in load_voc(tmp_path, "train").truth["annotations"]
    )


def test_coco_numbers_classes_without_gaps_and_leaves_crowds_out(tmp_path: Path) -> None:
    written = write_coco(tmp_path, 3)
    train = load_coco(tmp_path, "train")
    assert (len(train), train.category_ids) == (4, [3, 7, 90])
    for index, file in enumerate(train.files):
        expected = written[f"train2017/{file.name}"]
        expected = expected[:1] if index == 2 else expected
        assert train.objects[index].boxes.tolist() == [list(box) for _, box in expected]
        assert [list(COLOURS)[number - 1] for number in train.objects[index].classes] == [
            name for name, _ in expected
        ]
        for mask, (_, (left, top, right, bottom)) in zip(train.masks(index), expected, strict=True):
            rectangle = torch.zeros(*train.sizes[index].tolist(), dtype=torch.uint8)
            rectangle[top:bottom, left:right] = 1
            assert torch.equal(mask, rectangle)
    assert [image["id"] for image in train.truth["images"]] == [0, 1, 2, 3]
    assert {annotation["image_id"] for annotation in train.truth["annotations"]} == {0, 1, 2}
    assert len(train.with_objects()) == 3


def test_images_come_as_from_every_source(tmp_path: Path) -> None:
    write_coco(tmp_path, 2)
    source = load_source(DataConfig(source="coco", root=str(tmp_path)), "val")
    assert isinstance(source, DetectionSet)
    assert source.labels is None
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.image(1), source.image(1))
    with Image.open(source.files[1]) as image:
        assert (
            np.abs(np.asarray(image).astype(int) - source.image(1).permute(1, 2, 0).numpy()).max()
            <= 3
        )
    assert source.fingerprint().startswith("coco:val2017:3:")
    before = source.fingerprint()
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"iscrowd": 1', '"iscrowd": 0'))
    assert load_coco(tmp_path, "val").fingerprint() != before


def test_an_image_of_another_size_than_its_annotation_says_is_refused(tmp_path: Path) -> None:
    write_voc(tmp_path, 1)
    source = load_voc(tmp_path, "val")
    Image.new("RGB", (30, 40)).save(source.files[0])
    with pytest.raises(
        ValueError, match=r"test0\.jpg is \[40, 30\] pixels high and wide, its annotation says \["
    ):
        source.image(0)
    source.files[0].unlink()
    with pytest.raises(ValueError, match=r"cannot read image .*test0\.jpg: No such file"):
        source.image(0)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (
            "VOC2012/ImageSets/Main/trainval.txt",
            None,
            r"cannot read .*trainval\.txt .* the folder that holds VOC2012/ImageSets/Main",
        ),
        (
            "VOC2007/Annotations/trainval1.xml",
            None,
            r"cannot read .*trainval1\.xml .* holds VOC2007/Annotations",
        ),
        (
            "VOC2007/Annotations/trainval1.xml",
            "<annotation>",
            r"trainval1\.xml is no annotation of VOC",
        ),
        ("VOC2007/Annotations/trainval1.xml", "<a/>", r"trainval1\.xml is no annotation of VOC"),
        (
            "annotations/instances_train2017.json",
            None,
            r"cannot read .*json .* the folder that holds annotations",
        ),
        ("annotations/instances_train2017.json", "{", r"json holds no annotations of COCO"),
        (
            "annotations/instances_train2017.json",
            '{"images": []}',
            r"holds no annotations of COCO \(KeyError: 'categories'\)",
        ),
        ("annotations/instances_train2017.json", "[]", r"holds no annotations of COCO"),
    ],
)
def test_what_is_missing_or_broken_is_named_in_one_line(
    tmp_path: Path, path: str, content: str | None, message: str
) -> None:
    write_voc(tmp_path, 2)
    write_coco(tmp_path, 1)
    (tmp_path / path).unlink()
    if content is not None:
        (tmp_path / path).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        (load_coco if path.startswith("annotations") else load_voc)(tmp_path, "train")
    assert "\n" not in str(caught.value)
