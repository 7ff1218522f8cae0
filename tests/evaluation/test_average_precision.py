"""Average precision against a slow reference, and what becomes of objects that do not count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coding
from ranks import Ranks
from rectangles import write_coco, write_voc

from seed_exp.data.detection_sets import load_coco, load_voc
from seed_exp.engine import distributed
from seed_exp.evaluation.average_precision import (
    RECALL_STEPS,
    Found,
    _gathered,
    average_precision,
)


def overlap(one: list[float], other: list[float]) -> float:
    """Intersection over union of boxes (left, top, width, height)."""
    sides = [
        max(0.0, min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]))
        for i in (0, 1)
    ]
    common = sides[0] * sides[1]
    return common / (one[2] * one[3] + other[2] * other[3] - common)


def reference(truth: dict[str, Any], found: Found, threshold: float, recall_steps: int) -> float:
    """Percent: a class's best precision at or beyond each recall, averaged; then over classes."""
    averages = []
    for category in {annotation["category_id"] for annotation in truth["annotations"]}:
        objects = [
            annotation
            for annotation in truth["annotations"]
            if annotation["category_id"] == category
        ]
        taken: set[int] = set()
        hits = []
        for one in sorted(
            (one for one in found if one["category_id"] == category), key=lambda one: -one["score"]
        ):
            open_ones = [
                o for o in objects if o["image_id"] == one["image_id"] and o["id"] not in taken
            ]
            best = max(open_ones, key=lambda o: overlap(o["bbox"], one["bbox"]), default=None)
            hit = best is not None and overlap(best["bbox"], one["bbox"]) >= threshold
            if hit:
                taken.add(best["id"])
            hits.append(hit)
        recalls = [sum(hits[: n + 1]) / len(objects) for n in range(len(hits))]
        precisions = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits))]
        levels = [step / (recall_steps - 1) for step in range(recall_steps)]
        reached = [
            [p for p, r in zip(precisions, recalls, strict=True) if r >= level - 1e-12]
            for level in levels
        ]
        averages.append(sum(max(values, default=0.0) for values in reached) / recall_steps)
    return 100 * sum(averages) / len(averages)


def perfect(truth: dict[str, Any]) -> Found:
    return [
        {key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for one in truth["annotations"]
    ]


def noisy(truth: dict[str, Any], seed: int) -> Found:
    """Shifted boxes, wrong classes, doubles and inventions, each with a score of its own."""
    draws = np.random.default_rng(seed)
    found = []
    for one in [one for one in perfect(truth) for _ in range(3)]:
        box = (np.array(one["bbox"]) + draws.normal(0, 2, 4)).clip(1).tolist()
        category = one["category_id"] if draws.random() < 0.7 else int(draws.integers(1, 4))
        found.append({**one, "bbox": box, "category_id": category, "score": float(draws.random())})
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_average_precision_equals_the_reference(tmp_path: Path, kind: str, seed: int) -> None:
    write_voc(tmp_path, 6)
    truth = load_voc(tmp_path, "train").truth  # nothing in it is difficult
    found = noisy(truth, seed)
    ours = average_precision(truth, found, "bbox", RECALL_STEPS[kind])
    expected = [
        reference(truth, found, 0.5 + 0.05 * step, RECALL_STEPS[kind]) for step in range(10)
    ]
    assert [ours["ap"], ours["ap50"], ours["ap75"]] == pytest.approx(
        [np.mean(expected), expected[0], expected[5]], abs=1e-9
    )
    assert 5 < ours["ap"] < ours["ap50"] < 95


def test_everything_found_is_100_and_nothing_0(tmp_path: Path) -> None:
    write_voc(tmp_path, 2)
    truth = load_voc(tmp_path, "train").truth
    assert average_precision(truth, perfect(truth), "bbox", 11) == pytest.approx(
        {"ap": 100, "ap50": 100, "ap75": 100}
    )
    assert average_precision(truth, [], "bbox", 11) == {"ap": 0, "ap50": 0, "ap75": 0}


def test_difficult_objects_count_neither_when_found_nor_when_missed(tmp_path: Path) -> None:
    write_voc(tmp_path, 4)
    truth = load_voc(tmp_path, "val").truth
    found = perfect(truth)
    easy = [
        one for one, known in zip(found, truth["annotations"], strict=True) if known["area"] < 1e10
    ]
    assert 0 < len(easy) < len(found)
    # Found twice, with higher scores than all that counts: still no errors.
    again = [{**one, "score": 0.95} for one in found if one not in easy] * 2
    for some in (found, easy, easy + again):
        assert average_precision(truth, some, "bbox", 11)["ap"] == pytest.approx(100)


def test_masks_are_compared_by_their_pixels(tmp_path: Path) -> None:
    write_coco(tmp_path, 4)
    val = load_coco(tmp_path, "val")
    found: Found = []
    for index, objects in enumerate(val.objects):
        for box, number, mask in zip(
            objects.boxes.tolist(), objects.classes.tolist(), val.masks(index).numpy(), strict=True
        ):
            runs = coding.encode(np.asfortranarray(mask))
            outline = {"size": runs["size"], "counts": runs["counts"].decode()}
            size = [box[2] - box[0], box[3] - box[1]]
            one = {
                "image_id": index,
                "category_id": val.category_ids[number - 1],
                "bbox": [*box[:2], *size],
                "score": 0.5,
            }
            found.append({**one, "segmentation": outline})
    assert average_precision(val.truth, found, "segm", 101)["ap"] == pytest.approx(100)
    half = mask * (np.arange(mask.shape[1]) < (box[0] + box[2]) / 2)
    found[-1]["segmentation"]["counts"] = coding.encode(np.asfortranarray(half))["counts"].decode()
    assert average_precision(val.truth, found, "bbox", 101)["ap"] == pytest.approx(100)
    assert average_precision(val.truth, found, "segm", 101)["ap75"] < 100


def gathered() -> Found:
    mine = [
        {"rank": distributed.rank(), "number": number} for number in range(3 * distributed.rank())
    ]
    return _gathered(mine, torch.device("cpu"))


def test_every_process_gets_what_all_have_found(two_ranks: Ranks) -> None:
    expected = [{"rank": 1, "number": number} for number in range(3)]
    assert two_ranks.run(gathered) == [expected, expected]
