"""Object detection with a run's students as encoders."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seed_exp.config.schema import DataConfig, DetectConfig
from seed_exp.data.detection_sets import DetectionSet
from seed_exp.data.sources import load_source
from seed_exp.engine import distributed
from seed_exp.engine.fleet import derive_seed
from seed_exp.evaluation.average_precision import RECALL_STEPS, average_precision, find_objects
from seed_exp.evaluation.setup import FrozenRun, load_frozen
from seed_exp.methods.detection import Detection
from seed_exp.models.detectors import build_detector
from seed_exp.protocols.supervised import (
    Evaluated,
    Measures,
    open_evaluation,
    train_and_measure,
    with_shared_batch_norm,
    write_measures,
)
from seed_exp.views.uncropped import WholeImages

log = logging.getLogger("seed_exp")


def detect(config: DetectConfig) -> Measures:
    """Trains and evaluates detectors, prints a table, writes results/detect-*.json into the run.

    Returns:
        {student: {"box_ap": percent, "box_ap50": ..., "box_ap75": ...}}, with masks also "mask_ap"
        and so on. Students that diverged are left out.
    """
    _check_library()
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        frozen = load_frozen(Path(config.run), config.networks, device)
        with distributed.rank0_first():
            train, val = load_objects(config.data)
        train = train.with_objects()
        if config.masks and train.objects[0].outlines is None:
            raise ValueError(
                "masks=true needs data with the objects' outlines, "
                f"which data={config.data.source} lacks; use coco"
            )
        detectors = build_detectors(config, frozen, len(train.category_ids), device)
        evaluated = Evaluated(frozen, train, val)
        with open_evaluation("detect", config, evaluated, device) as run:
            log.info("%d training images, %d classes", len(train), len(train.category_ids))
            method = Detection(
                detectors,
                train,
                masks=config.masks,
                flip_prob=config.views.flip_prob,
                seed=config.seed,
            )

            def precision(names: Collection[str]) -> Measures:
                networks = {name: detectors[name].eval() for name in names}
                found = find_objects(networks, val, device, run.num_workers, config.precision)
                if distributed.rank() != 0:
                    return {}
                return {name: precisions(val, objects, config) for name, objects in found.items()}

            measured = train_and_measure(
                run, evaluated, method, WholeImages(int(train.sizes.max())), precision
            )
            return write_measures(
                run,
                evaluated,
                measured,
                title="detection",
                protocol={"recall_steps": RECALL_STEPS[config.data.source]},
                # On a GPU it is synchronised.
                bn_per_rank=not config.freeze_bn and device.type != "cuda",
            )


def precisions(val: DetectionSet, objects: Any, config: DetectConfig) -> dict[str, float]:
    """AP, AP50 and AP75 in percent of the objects found: of boxes and, with `masks`, of masks."""
    kinds = {"box": "bbox", "mask": "segm"} if config.masks else {"box": "bbox"}
    steps = RECALL_STEPS[config.data.source]
    return {
        f"{kind}_{key}": value
        for kind, iou_type in kinds.items()
        for key, value in average_precision(val.truth, objects, iou_type, steps).items()
    }


def load_objects(config: DataConfig) -> tuple[DetectionSet, DetectionSet]:
    """Training and validation images with objects.

    Raises:
        ValueError: the data has images only, or files are missing.
    """
    train, val = load_source(config, "train"), load_source(config, "val")
    if not isinstance(train, DetectionSet) or not isinstance(val, DetectionSet):
        raise ValueError(
            "detect needs images with boxes around objects, all of them: data=voc or data=coco, "
            f"without data.fraction and data.subset; got data={config.source}"
        )
    return train, val


def build_detectors(
    config: DetectConfig, frozen: FrozenRun, num_classes: int, device: torch.device
) -> dict[str, nn.Module]:
    """A detector on each student's encoder.

    Its own initial weights depend on the seed and the student's name.
    """
    detectors: dict[str, nn.Module] = {}
    for name, student in frozen.students.items():
        torch.manual_seed(derive_seed(config.seed, "detector", name))
        detector = build_detector(
            config.detector,
            student.encoder,
            num_classes,
            masks=config.masks,
            freeze_bn=config.freeze_bn,
            # In evaluation torchvision takes the last one.
            min_size=sorted(config.short_sides),
            max_size=config.long_side,
            image_mean=frozen.views.mean,
            image_std=frozen.views.std,
        )
        # Two images per GPU make no statistics.
        detectors[name] = with_shared_batch_norm(detector, device)
    return detectors


def _check_library() -> None:
    try:
        import pycocotools  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(
            "detect needs pycocotools, which is not installed; pip install 'seed_exp[detect]'"
        ) from None
