"""Objects that detectors find, and their average precision as COCO and VOC measure it."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.schema import Precision
from seed_exp.data.detection_sets import DetectionSet
from seed_exp.data.loader import load_batches
from seed_exp.engine import distributed
from seed_exp.engine.precision import autocast
from seed_exp.views.uncropped import WholeImages

_BATCH_SIZE = 4  # images per forward pass; the masks of one take 160 MiB at 640 x 640
_LARGEST_AREA = 1e10
RECALL_STEPS = {"voc": 11, "coco": 101}
"""Number of recall levels, from 0 to 1, over which precision is averaged: VOC 2007's and COCO's."""

Found = list[dict[str, Any]]
"""Objects in COCO's results format: image_id, category_id, bbox, score; with masks segmentation."""


@torch.no_grad()
def find_objects(
    detectors: Mapping[str, nn.Module],
    source: DetectionSet,
    device: torch.device,
    num_workers: int,
    precision: Precision,
) -> dict[str, Found]:
    """The objects that each detector finds in the images of `source`; each image is read only once.

    Several processes share the work; all of them get the result. The caller has set the detectors
    to evaluation mode.

    Args:
        detectors: Detectors by name, see `build_detector`.
        source: The images.
        device: Device of the detectors.
        num_workers: Worker processes per rank that read images.
        precision: Precision of the forward pass.

    Returns:
        Objects by name of the detector.

    Raises:
        ValueError: an image cannot be read.
    """
    own = np.array_split(np.arange(len(source)), distributed.world_size())[distributed.rank()]
    order = [(0, own[start : start + _BATCH_SIZE]) for start in range(0, len(own), _BATCH_SIZE)]
    views = WholeImages(int(source.sizes.max()))
    found: dict[str, Found] = {name: [] for name in detectors}
    with closing(
        load_batches(source, views, order, num_workers=num_workers, device=device)
    ) as batches:
        for batch in batches:
            squares, indices = views.device(batch)["global"][0], batch.indices.tolist()
            images = [
                square[:, :height, :width]
                for square, (height, width) in zip(squares, source.sizes[indices], strict=True)
            ]
            for name, detector in detectors.items():
                with autocast(precision, device):
                    outputs = detector(images)
                for index, output in zip(indices, outputs, strict=True):
                    found[name] += _in_coco_format(output, index, source.category_ids)
    return {name: _gathered(objects, device) for name, objects in found.items()}


def average_precision(
    truth: dict[str, Any], found: Found, kind: str, recall_steps: int
) -> dict[str, float]:
    """Mean over classes of the average precision, in percent, of at most 100 objects per image.

    Args:
        truth: Images, categories and annotations in COCO's format. Objects with an area beyond 1e10
            pixels are ignored, however often they are found, as VOC's rules demand.
        found: Objects that a detector found in these images.
        kind: `bbox` = overlap of boxes; `segm` = overlap of masks.
        recall_steps: Value of RECALL_STEPS.

    Returns:
        "ap50" and "ap75": the average precision if an overlap (IoU) of 0.5 or 0.75 counts as found;
        "ap": its mean over overlaps from 0.5 to 0.95 in steps of 0.05.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not found:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        known = COCO()
        known.dataset = {
            **truth,
            "annotations": [*truth["annotations"], *_copies_of_ignored(truth, found)],
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes([dict(one) for one in found]), kind)
        parameters = evaluation.params
        parameters.recThrs = np.linspace(0, 1, recall_steps)
        parameters.areaRng, parameters.areaRngLbl, parameters.maxDets = (
            [[0, _LARGEST_AREA]],
            ["all"],
            [100],
        )
        evaluation.evaluate()
        evaluation.accumulate()
    # Overlaps x levels of recall x classes; -1 if a class has no object.
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    present = precision[:, :, precision[0, 0] > -1]
    at = [round(0.5 + 0.05 * step, 2) for step in range(len(present))]
    return {
        "ap": 100 * float(present.mean()),
        "ap50": 100 * float(present[at.index(0.5)].mean()),
        "ap75": 100 * float(present[at.index(0.75)].mean()),
    }


def _copies_of_ignored(truth: Mapping[str, Any], found: Found) -> list[dict[str, Any]]:
    """Copies of each ignored object, one for every found object of its class in its image.

    COCO's rule ignores only one match of each object.
    """
    num_found = Counter((one["image_id"], one["category_id"]) for one in found)
    ignored = [one for one in truth["annotations"] if one["area"] > _LARGEST_AREA]
    copies = [one for one in ignored for _ in range(num_found[one["image_id"], one["category_id"]])]
    return [
        {**one, "id": number}
        for number, one in enumerate(copies, start=len(truth["annotations"]) + 1)
    ]


def _in_coco_format(output: Mapping[str, Tensor], image: int, category_ids: Sequence[int]) -> Found:
    boxes, labels, scores = (output[key].float().cpu() for key in ("boxes", "labels", "scores"))
    boxes[:, 2:] -= boxes[:, :2]
    objects: Found = [
        {
            "image_id": image,
            "category_id": category_ids[int(label) - 1],
            "bbox": box,
            "score": score,
        }
        for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True)
    ]
    if "masks" in output:
        from pycocotools import mask as coding

        masks = (output["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
        for one, mask in zip(objects, masks, strict=True):
            runs = coding.encode(np.asfortranarray(mask))
            one["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
    return objects


def _gathered(objects: Found, device: torch.device) -> Found:
    """The objects of all ranks, in the order of the ranks."""
    data = torch.frombuffer(bytearray(json.dumps(objects).encode()), dtype=torch.uint8).to(device)
    sizes = distributed.all_gather(torch.tensor([len(data)], device=device)).tolist()
    parts = (
        distributed.all_gather(F.pad(data, (0, max(sizes) - len(data)))).cpu().view(len(sizes), -1)
    )
    return [
        one
        for part, size in zip(parts, sizes, strict=True)
        for one in json.loads(part[:size].numpy().tobytes())
    ]
