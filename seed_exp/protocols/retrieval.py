"""Retrieval evaluation of a run's students."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seed_exp.config.schema import GallerySplit, RetrievalConfig
from seed_exp.engine import distributed
from seed_exp.evaluation.features import Extracted
from seed_exp.evaluation.retrieval import retrieval as measure
from seed_exp.evaluation.setup import LabelledSources
from seed_exp.protocols.untrained import diverged_among, frozen_features, write_numbers

log = logging.getLogger("seed_exp")


def retrieval(config: RetrievalConfig) -> dict[str, dict[str, float]]:
    """Evaluates, prints a table, writes results/retrieval-*.json into the run folder.

    Returns:
        {student: {"map": percent, "recall1": ..., ...}}. Students whose features are not finite are
        left out.

    Raises:
        ValueError: no validation image has another image of its class in the gallery, no student's
            features are finite; or as `load_frozen` and `load_labelled`.
    """
    device = distributed.local_device(config.device)
    leave_one_out = config.gallery is GallerySplit.val
    with distributed.process_group(device):
        features = frozen_features(config, device)
        sources = features.sources
        _check(sources, leave_one_out)
        queries = _once(features(sources.val))
        gallery = queries if leave_one_out else _once(features(sources.train))
        if distributed.rank() != 0:
            return {}
        diverged = diverged_among(gallery.features, queries.features)
        found = {
            name: measure(
                gallery.features[name].to(device),
                gallery.labels,
                queries.features[name].to(device),
                queries.labels,
                ks=config.ks,
                own=torch.arange(len(queries.labels)) if leave_one_out else None,
            )
            for name in queries.features
            if name not in diverged
        }
        num_queries = next(iter(found.values())).num_queries
        if alone := len(queries.labels) - num_queries:
            log.warning(
                "%d of %d validation images have no other image of their class in the gallery; "
                "the numbers are means over the rest",
                alone,
                len(queries.labels),
            )
        protocol: dict[str, Any] = {
            **features.protocol,
            "ranking": "whole gallery; among equal similarities other classes first",
            "ks": config.ks,
            "gallery_split": config.gallery.value,
            "num_queries": num_queries,
            "gallery": (sources.val if leave_one_out else sources.train).fingerprint(),
            "queries": sources.val.fingerprint(),
        }
        results = {name: numbers.measures for name, numbers in found.items()}
        return write_numbers(
            "retrieval", "retrieval", Path(config.run), protocol, results, diverged
        )


def _check(sources: LabelledSources, leave_one_out: bool) -> None:
    """Refuses images of which none can find another, before features are computed."""
    queries: NDArray[np.int64] = np.asarray(sources.val.labels)
    if leave_one_out:
        if np.unique(queries, return_counts=True)[1].max() > 1:
            return
        problem = f"each of the {len(queries)} validation images is the only one of its class"
        advice = "take gallery=train, or data with more images of a class"
    else:
        if np.isin(queries, np.asarray(sources.train.labels)).any():
            return
        problem = "no validation image has a class that the training images show"
        advice = "take gallery=val, which searches the validation images themselves"
    raise ValueError(f"retrieval has nothing to find: {problem}; {advice}")


def _once(images: Extracted) -> Extracted:
    """The images without repetitions: the next good one stands in for one that cannot be read."""
    first = np.unique(images.indices.numpy(), return_index=True)[1]
    if len(first) == len(images.indices):
        return images
    kept = torch.from_numpy(np.sort(first))
    features = {name: rows[kept] for name, rows in images.features.items()}
    return Extracted(features, images.labels[kept], images.indices[kept])
