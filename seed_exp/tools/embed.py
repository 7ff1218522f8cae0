"""Features of all images of a source in one file, with near-duplicates and neighbours."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seed_exp import __version__
from seed_exp.base.redaction import redact_all
from seed_exp.config.schema import EmbedConfig, FeatureType
from seed_exp.data.sources import Source, load_source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine import distributed
from seed_exp.engine.precision import resolve
from seed_exp.engine.run import list_bad_samples, num_workers_of
from seed_exp.evaluation.features import Extractor
from seed_exp.evaluation.recalibration import recalibrate_batch_norm
from seed_exp.evaluation.setup import eval_options, load_frozen
from seed_exp.exporting.feature_stream import FilesSource, Part, feature_parts
from seed_exp.exporting.neighbours import (
    SearchedImages,
    duplicates,
    near_duplicates,
    neighbours_of_files,
    neighbours_of_images,
    write_duplicates,
)
from seed_exp.exporting.neighbours_page import gallery
from seed_exp.exporting.tables import check_table, rows_of, write_table
from seed_exp.views.recipe import EvalViews

FeaturesOf = tuple[Source, dict[str, Tensor]]
"""Images, and their features by network."""


def embed(config: EmbedConfig) -> None:
    """Writes the features and, if asked for, duplicates and gallery; prints its progress."""
    logging.basicConfig(format="%(message)s")
    run, output = Path(config.run), Path(config.output)
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        frozen = load_frozen(run, config.networks, device)
        check_table(output, frozen.students)
        is_searched = config.gallery is not None or config.duplicates is not None
        if is_searched and len(frozen.students) > 1:
            names = ", ".join(frozen.students)
            raise ValueError(
                f"gallery and duplicates are of one network, {run} has {names}; "
                "choose one with networks=[NAME]"
            )
        with distributed.rank0_first():
            source = load_source(config.data, config.split.value)
        output.parent.mkdir(parents=True, exist_ok=True)
        networks = {
            name: student if config.head else student.features
            for name, student in frozen.students.items()
        }
        bad_samples = list_bad_samples(config.data, output.parent)
        num_workers = num_workers_of(config.data)
        extract = Extractor(
            EvalViews(frozen.views),
            device,
            num_workers,
            config.batch_size,
            config.precision,
            bad_samples,
        )
        recalibrated = {}
        if config.recalibrate_bn:
            with distributed.rank0_first():
                train = load_source(config.data, "train")
            encoders = {name: student.encoder for name, student in frozen.students.items()}
            recalibrated["recalibrate_bn"] = recalibrate_batch_norm(encoders, extract, train)
        queries = None
        if config.query is not None:
            files = FilesSource(config.query)
            queries = (
                files,
                dataclasses.replace(extract, bad_samples=None)(
                    networks, files, evenly_spaced(len(files))
                ).features,
            )
        parts = feature_parts(extract, networks, source)
        if distributed.rank() != 0:
            for _ in parts:
                pass
            return
        metadata = {
            "run": config.run,
            "students": frozen.record,
            "values": "embeddings" if config.head else "features",
            "data": source.fingerprint(),
            "split": config.split.value,
            "views": eval_options(frozen.views),
            "precision": resolve(config.precision, device).value,
            "version": __version__,
            **recalibrated,
        }
        kept: list[Part] = []
        shown = _shown(parts, len(source), kept if is_searched else None)
        half = config.dtype is FeatureType.float16
        write_table(
            output,
            (rows_of(source, part.indices, part.features, half=half) for part in shown),
            redact_all(metadata),
        )
        print(f"written to {output}")
        if is_searched:
            _search(config, source, kept, next(iter(networks)), queries)


def duplicates_file(config: EmbedConfig) -> Path:
    """The list of near-duplicates, beside the features."""
    return Path(config.output).with_name(f"{Path(config.output).stem}-duplicates.jsonl")


def _shown(parts: Iterator[Part], num_images: int, kept: list[Part] | None) -> Iterator[Part]:
    """Yields the parts, prints progress after each, and appends them to `kept` if it is a list."""
    began, num_read = time.perf_counter(), 0
    for part in parts:
        num_read += len(part.indices)
        rate = part.done / (time.perf_counter() - began)
        left = datetime.timedelta(seconds=round((num_images - part.done) / rate))
        unread = f", {part.done - num_read:,} cannot be read" if num_read < part.done else ""
        print(
            f"{part.done:,} of {num_images:,} images{unread}, {rate:.0f} img/s, {left} left",
            flush=True,
        )
        if kept is not None:
            kept.append(part)
        yield part


def _search(
    config: EmbedConfig, source: Source, kept: list[Part], name: str, queries: FeaturesOf | None
) -> None:
    """Writes duplicates and gallery."""
    indices = np.concatenate([part.indices for part in kept])
    if len(indices) < 2:
        raise ValueError(
            f"{source.fingerprint()} has {len(indices)} readable image; neighbours need two or more"
        )
    device = distributed.local_device(config.device)
    images = SearchedImages(
        source, indices, torch.cat([part.features[name] for part in kept]).to(device)
    )
    chapters = []
    if config.gallery is not None and queries is not None:
        files, features = queries
        chapters.append(neighbours_of_files(images, files, features[name], config.neighbours))
    elif config.gallery is not None:
        rows = torch.from_numpy(evenly_spaced(len(indices), config.num_queries))
        chapters.append(neighbours_of_images(images, rows, config.neighbours))
    if config.duplicates is not None:
        groups = near_duplicates(images.features, config.duplicates)
        path = duplicates_file(config)
        write_duplicates(path, images, groups)
        print(
            f"{len(groups):,} groups of near-duplicates, {sum(map(len, groups)):,} images: {path}"
        )
        chapters.append(duplicates(images, groups, config.duplicates))
    if config.gallery is not None:
        values = "Embeddings" if config.head else "Features"
        text = f"{values} of {name} ({config.run}); {source.fingerprint()}"
        gallery(Path(config.gallery), f"What looks alike to {name}", text, chapters)
        print(f"written to {config.gallery}")
