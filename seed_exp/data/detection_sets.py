"""Images with objects (boxes, and outlines if the data has them): VOC 2007 + 2012, COCO 2017."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.base.files import file_hash
from seed_exp.data.fingerprints import middle_of, sample_hash, sizes_of
from seed_exp.data.listed_images import ListedImages, listed_in

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_VOC_PARTS = {
    "train": (("VOC2007", "trainval"), ("VOC2012", "trainval")),
    "val": (("VOC2007", "test"),),
}
# In pixels. COCO's evaluation ignores objects outside the range of areas that it looks at.
_BEYOND_ALL_AREAS = 1e11


class Objects(NamedTuple):
    """The objects of an image that a detector learns, which excludes crowds."""

    boxes: NDArray[np.float32]
    """Boxes [n, 4]: left, top, right, bottom in pixels; right and bottom are exclusive."""
    classes: NDArray[np.int64]
    """Classes [n], numbered from 1: 0 is the background."""
    outlines: Sequence[Any] | None
    """COCO's segmentations, polygons or run lengths; None if the data has none."""


class DetectionSet(ListedImages):
    """Images with objects, as a source whose images have no labels.

    Args:
        name: Name of the data set and its split.
        files: The image files [n].
        sizes: Heights and widths of the images [n, 2] in pixels.
        objects: Objects of each image [n].
        category_ids: Id in `truth` of each class, in the order of the classes 1, 2, ...
        truth: Images, categories and annotations in COCO's format, for evaluation. The `id` of an
            image is its index in `files`.
        digest: Hash of the annotations.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        sizes: NDArray[np.int64],
        objects: Sequence[Objects],
        category_ids: Sequence[int],
        truth: dict[str, Any],
        digest: str,
    ) -> None:
        super().__init__(files)
        self.name, self.sizes, self.objects = name, sizes, objects
        self.category_ids, self.truth, self._digest = category_ids, truth, digest
        self._fingerprint: str | None = None

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W].

        Raises:
            ValueError: it cannot be read, or its size differs from the one in the annotations.
        """
        image = super().image(index)
        found, expected = [*image.shape[1:]], self.sizes[index].tolist()
        if found != expected:
            raise ValueError(
                f"image {self.files[index]} is {found} pixels high and wide, "
                f"its annotation says {expected}"
            )
        return image

    def fingerprint(self) -> str:
        """Name, number of images, hash of the annotations, hash of sizes and bytes of images."""
        if self._fingerprint is None:
            files = self.files
            content = sample_hash(
                len(files), lambda index: middle_of(files[index]), sizes_of(files)
            )
            self._fingerprint = f"{self.name}:{len(self)}:{self._digest[:16]}+{content}"
        return self._fingerprint

    def with_objects(self) -> DetectionSet:
        """The images that have objects to learn, without `truth`: for training, not evaluation."""
        kept = [index for index, objects in enumerate(self.objects) if len(objects.boxes) > 0]
        files, objects = (
            [self.files[index] for index in kept],
            [self.objects[index] for index in kept],
        )
        return DetectionSet(
            self.name, files, self.sizes[kept], objects, self.category_ids, {}, self._digest
        )

    def masks(self, index: int) -> Tensor:
        """Masks of the objects in image `index`, uint8 [n, H, W]; 1 inside an object, else 0."""
        from pycocotools import mask as coding

        height, width = self.sizes[index].tolist()
        outlines = self.objects[index].outlines
        assert outlines is not None
        masks = np.zeros((len(outlines), height, width), np.uint8)
        for mask, outline in zip(masks, outlines, strict=True):
            runs = coding.frPyObjects(outline, height, width)
            mask[:] = coding.decode(coding.merge(runs) if isinstance(outline, list) else runs)
        return torch.from_numpy(masks)


def load_voc(root: Path, split: Literal["train", "val"]) -> DetectionSet:
    """VOC07+12: trainval of 2007 and 2012 for training, test of 2007 for validation.

    Difficult objects are learnt like all others, as in Detectron2, and ignored in evaluation, as in
    VOC.

    Args:
        root: Folder VOCdevkit, with VOC2007 and VOC2012; each has Annotations, ImageSets/Main and
            JPEGImages.
        split: Split to load.

    Raises:
        ValueError: a file is missing or is not a valid annotation.
    """
    files: list[Path] = []
    sizes: list[tuple[int, int]] = []
    objects: list[Objects] = []
    categories = [{"id": number, "name": name} for number, name in enumerate(VOC_CLASSES, start=1)]
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    digest = hashlib.sha256()
    for year, part in _VOC_PARTS[split]:
        for name in listed_in(
            root / year / "ImageSets" / "Main" / f"{part}.txt", f"{year}/ImageSets/Main", root
        ).split():
            annotation = root / year / "Annotations" / f"{name}.xml"
            text = listed_in(annotation, f"{year}/Annotations", root)
            digest.update(text.encode())
            size, found, difficult = _voc_objects(annotation, text)
            truth["images"].append({"id": len(files), "height": size[0], "width": size[1]})
            for box, number, is_difficult in zip(
                found.boxes.tolist(), found.classes.tolist(), difficult, strict=True
            ):
                truth["annotations"].append(
                    _annotation(len(truth["annotations"]), len(files), number, box, is_difficult)
                )
            files.append(root / year / "JPEGImages" / f"{name}.jpg")
            sizes.append(size)
            objects.append(found)
    category_ids = range(1, len(VOC_CLASSES) + 1)
    return DetectionSet(
        f"voc:{split}", files, np.array(sizes), objects, category_ids, truth, digest.hexdigest()
    )


def load_coco(root: Path, split: Literal["train", "val"]) -> DetectionSet:
    """COCO 2017. Crowds are not learnt; evaluation treats them as COCO does.

    Args:
        root: Folder with train2017, val2017, annotations/instances_train2017.json and
            annotations/instances_val2017.json.
        split: Split to load.

    Raises:
        ValueError: a file is missing or holds no annotations.
    """
    part = f"{split}2017"
    path = root / "annotations" / f"instances_{part}.json"
    try:
        truth: dict[str, Any] = json.loads(listed_in(path, "annotations", root))
        category_ids = sorted(category["id"] for category in truth["categories"])
        numbers = {category_id: number for number, category_id in enumerate(category_ids, start=1)}
        images, position = truth["images"], {}
        for index, image in enumerate(images):
            position[image["id"]], image["id"] = index, index
        by_image: list[list[dict[str, Any]]] = [[] for _ in images]
        for annotation in truth["annotations"]:
            annotation["image_id"] = position[annotation["image_id"]]
            _, _, width, height = annotation["bbox"]
            if not annotation["iscrowd"] and width > 0 and height > 0:
                by_image[annotation["image_id"]].append(annotation)
        files = [root / part / image["file_name"] for image in images]
        sizes = np.array([[image["height"], image["width"]] for image in images])
        objects = [_coco_objects(annotations, numbers) for annotations in by_image]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no annotations of COCO ({type(error).__name__}: {error})"
        ) from None
    return DetectionSet(f"coco:{part}", files, sizes, objects, category_ids, truth, file_hash(path))


def _voc_objects(path: Path, text: str) -> tuple[tuple[int, int], Objects, list[bool]]:
    """Height and width of the image, its objects, and whether each of them is difficult."""
    boxes, classes, difficult = [], [], []
    try:
        root = ElementTree.fromstring(text)
        size = int(root.findtext("size/height", "")), int(root.findtext("size/width", ""))
        for found in root.iter("object"):
            left, top, right, bottom = (
                float(found.findtext(f"bndbox/{side}", ""))
                for side in ("xmin", "ymin", "xmax", "ymax")
            )
            # VOC counts pixels from 1, and its right and bottom belong to the object.
            boxes.append([left - 1, top - 1, right, bottom])
            classes.append(VOC_CLASSES.index(found.findtext("name", "")) + 1)
            difficult.append(found.findtext("difficult", "0").strip() == "1")
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is no annotation of VOC ({error})") from None
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return size, Objects(array, np.array(classes, np.int64), None), difficult


def _coco_objects(annotations: Sequence[dict[str, Any]], numbers: dict[int, int]) -> Objects:
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    classes = np.array([numbers[annotation["category_id"]] for annotation in annotations], np.int64)
    return Objects(boxes, classes, [annotation["segmentation"] for annotation in annotations])


def _annotation(
    number: int, image: int, category: int, box: Sequence[float], ignored: bool
) -> dict[str, Any]:
    left, top, right, bottom = box
    size = [right - left, bottom - top]
    area = _BEYOND_ALL_AREAS if ignored else size[0] * size[1]
    content = {
        "id": number + 1,
        "image_id": image,
        "category_id": category,
        "bbox": [left, top, *size],
    }
    return {**content, "area": area, "iscrowd": 0}
