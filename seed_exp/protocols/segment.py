"""Semantic segmentation with a run's students as frozen encoders."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from seed_exp.config.schema import IGNORED, OnError, SegmentConfig, ViewsConfig
from seed_exp.data.images_and_masks import ImagesAndMasks
from seed_exp.data.sources import load_source
from seed_exp.engine import distributed
from seed_exp.engine.fleet import derive_seed
from seed_exp.engine.run import Run, num_workers_of
from seed_exp.evaluation.features import Extractor
from seed_exp.evaluation.recalibration import recalibrate_batch_norm
from seed_exp.evaluation.segmentation import Survey, segment_images, survey
from seed_exp.evaluation.setup import FrozenRun, load_frozen
from seed_exp.methods.segmentation import SegmentationProbe, pixel_classifier
from seed_exp.models.maps import LastMaps
from seed_exp.protocols.supervised import (
    Evaluated,
    Measures,
    open_evaluation,
    train_and_measure,
    with_shared_batch_norm,
    write_measures,
)
from seed_exp.views.masked import MaskedCrops
from seed_exp.views.recipe import EvalViews

log = logging.getLogger("seed_exp")


def segment(config: SegmentConfig) -> Measures:
    """Trains and evaluates pixel classifiers, prints a table, writes results/segment-*.json.

    Returns:
        {student: {"miou": percent, "pixel_accuracy": percent}}. Students that diverged are left
        out.

    Raises:
        ValueError: a student has no feature maps, a mask is missing or wrong, or there are no
            classes to learn; or as `load_frozen`.
    """
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        frozen = load_frozen(Path(config.run), config.networks, device)
        encoders = {
            name: LastMaps(student.encoder, config.crop_size, f"student {name}")
            for name, student in frozen.students.items()
        }
        train, val, surveyed = load_masked(config)
        num_classes = val.num_classes
        assert num_classes is not None
        evaluated = Evaluated(frozen, train, val)
        with open_evaluation("segment", config, evaluated, device) as run:
            log.info("%d training images, %d classes", len(train), num_classes)
            views = dataclasses.replace(config.views, mean=frozen.views.mean, std=frozen.views.std)
            protocol = {
                "num_classes": num_classes,
                "inference": "windows of crop_size, two thirds of it apart, on images whose "
                "shorter side is crop_size",
            }
            if config.recalibrate_bn:
                protocol["recalibrate_bn"] = _recalibrated(run, frozen, views, train)
            probe = SegmentationProbe(
                encoders, _classifiers(encoders, num_classes, config.seed, device)
            )

            def measures(names: Collection[str]) -> Measures:
                for name in names:
                    probe.trainable[name].eval()
                return segment_images(
                    {name: partial(probe.logits, name) for name in names},
                    val,
                    views,
                    config.crop_size,
                    surveyed.elongation,
                    device,
                    run.num_workers,
                    config.precision,
                )

            measured = train_and_measure(
                run,
                evaluated,
                probe,
                MaskedCrops(views, config.crop_size, config.scales, config.seed),
                measures,
            )
            return write_measures(
                run,
                evaluated,
                measured,
                title="segmentation",
                protocol=protocol,
                # On a GPU it is synchronised.
                bn_per_rank=device.type != "cuda",
            )


def load_masked(config: SegmentConfig) -> tuple[ImagesAndMasks, ImagesAndMasks, Survey]:
    """Training and validation images with masks, all of which are read once, and what val has.

    Raises:
        ValueError: files are missing, a mask is wrong, or there are fewer than two classes.
    """
    with distributed.rank0_first():
        train, val = (ImagesAndMasks(load_source(config.data, split)) for split in ("train", "val"))
    threads = max(1, num_workers_of(config.data))
    train.num_classes = train.num_classes or config.num_classes
    shown = survey(train, threads, tolerant=config.data.on_error is OnError.skip).pixels[:IGNORED]
    classes = np.flatnonzero(shown)
    if len(classes) < 2:
        found = f"only class {classes[0]}" if len(classes) else f"no class: all are {IGNORED}"
        raise ValueError(
            f"segment needs two classes or more; the pixels of {len(train)} training masks show "
            f"{found}"
        )
    num_classes = train.num_classes or int(classes[-1]) + 1
    if 2 * len(classes) < num_classes:
        log.warning(
            "the training masks show %d of %d classes; are their values the numbers of classes?",
            len(classes),
            num_classes,
        )
    train.num_classes = val.num_classes = num_classes
    surveyed = survey(val, threads, tolerant=False)
    if not surveyed.pixels[:IGNORED].any():
        raise ValueError(
            f"no pixel of {len(val)} validation masks has a class: all are {IGNORED}, ignored"
        )
    return train, val, surveyed


def _classifiers(
    encoders: dict[str, LastMaps], num_classes: int, seed: int, device: torch.device
) -> dict[str, nn.Module]:
    """A classifier for each encoder, whose weights depend on the seed and the student's name."""
    classifiers = {}
    for name, encoder in encoders.items():
        torch.manual_seed(derive_seed(seed, "segment", name))
        classifier = pixel_classifier(encoder.width, num_classes)
        classifiers[name] = with_shared_batch_norm(classifier, device)
    return classifiers


def _recalibrated(
    run: Run[SegmentConfig], frozen: FrozenRun, views: ViewsConfig, train: ImagesAndMasks
) -> str:
    """Measures batch norm anew on squares of the crops' size; returns it in words."""
    size = run.config.crop_size
    extract = Extractor(
        EvalViews(dataclasses.replace(views, eval_size=size, eval_resize=size)),
        run.device,
        run.num_workers,
        batch_size=32,
        precision=run.config.precision,
        bad_samples=run.bad_samples,
    )
    networks = {name: student.encoder for name, student in frozen.students.items()}
    return recalibrate_batch_norm(networks, extract, train.images)
