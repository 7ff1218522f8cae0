"""What is seen of encoders while they train: k-NN accuracy, and at the end pictures and a table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from seed_exp.base.average_names import average_of
from seed_exp.config.schema import EncoderFitConfig
from seed_exp.data.sources import Source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine import distributed
from seed_exp.engine.run import Run
from seed_exp.engine.tracking import Tracker
from seed_exp.evaluation.features import Extractor, is_finite, run_extractor
from seed_exp.evaluation.votes import knn_accuracy, nearest
from seed_exp.models.students import Student
from seed_exp.reporting.embedding_map import embedding_map
from seed_exp.reporting.image_grids import Neighbours, neighbours_gallery

PICTURES = ("embedding_map", "neighbours")
"""Pictures of each student at the end."""
TABLE = "students"
"""Key of the table at the end."""
NUM_SHOWN = 8
"""Validation images in a student's gallery, and neighbours of each."""


class Monitor:
    """Evaluates the students of a run by k-NN while they train, and shows the last evaluation.

    Args:
        run: Where they train.
        students: By name.
        averages: Averages of the students, by the student's name, where there are any.
        train: Training images, whose labels vote.
        val: Validation images with labels; None where there are none.
    """

    def __init__(
        self,
        run: Run[EncoderFitConfig],
        students: Mapping[str, Student],
        averages: Mapping[str, Student],
        train: Source,
        val: Source | None,
    ) -> None:
        self._config, self._students, self._train = run.config, students, train
        self._averages = {average_of(name): network for name, network in averages.items()}
        self._networks = {**students, **self._averages}
        self._val = None if train.labels is None else val
        self._extract = run_extractor(run)
        self._last: Evaluated | None = None

    @property
    def has_labels(self) -> bool:
        """Whether there are labelled images to evaluate with."""
        return self._val is not None

    def evaluate(self, names: Collection[str]) -> dict[str, float]:
        """Accuracies in percent, {<student>/knn10: ...}; NaN where features are not finite.

        Averages of students are called <student>/knn10_ema. Nothing without labels, and on ranks
        other than 0.
        """
        if self._val is None:
            return {}
        metrics = {name: f"{name}/knn10" for name in names}
        metrics |= {average_of(name): f"{name}/knn10_ema" for name in names if self._averages}
        self._last = knn_during_training(
            self._extract,
            {name: self._networks[name] for name in metrics},
            self._train,
            self._val,
            self._config.knn_bank_size,
            self._config.knn_query_size,
        )
        return {metrics[name]: value for name, value in self._last.accuracies.items()}

    def show(self, tracker: Tracker, diverged: Collection[str]) -> None:
        """Gives the tracker a map and a gallery of each student, and a table of all.

        A run that was killed between its last checkpoint and these evaluates once more for those
        that are missing.

        Args:
            tracker: Where to show them.
            diverged: Students that are not shown.
        """
        if self._val is None:
            return
        names = [name for name in self._students if name not in diverged]
        keys = [TABLE, *(f"{name}/{picture}" for name in names for picture in PICTURES)]
        if self._last is None and distributed.gather_objects(tracker.missing(keys))[0]:
            self.evaluate(names)
        if self._last is not None:
            show_results(tracker, self._networks, names, self._last, self._train, self._val)


class Evaluated(NamedTuple):
    """What an evaluation during training found; on other ranks than 0 nothing."""

    accuracies: dict[str, float]
    """Percent by network; NaN for one whose features are not finite.

    An average is called <student>_ema. With fewer images than `knn` uses, a number is only
    comparable within a run.
    """
    features: dict[str, Tensor]
    """Features of the validation images [n, num_features], by network; finite ones only."""
    labels: Tensor
    """Labels of these images [n]."""
    neighbours: dict[str, Neighbours]
    """Neighbours of a few of these images among the training images, by network with features."""


def knn_during_training(
    extract: Extractor,
    students: dict[str, Student],
    train: Source,
    val: Source,
    bank_size: int,
    query_size: int,
) -> Evaluated:
    """Top-1 of 10-NN by majority vote, in percent, on evenly spread images of both sources."""
    for student in students.values():
        student.eval()
    encoders = {name: student.features for name, student in students.items()}
    in_bank, in_queries = evenly_spaced(len(train), bank_size), evenly_spaced(len(val), query_size)
    bank, bank_labels, _ = extract(encoders, train, in_bank)
    queries, query_labels, _ = extract(encoders, val, in_queries)
    if distributed.rank() != 0:
        return Evaluated({}, {}, query_labels, {})
    k = min(10, len(bank_labels))
    shown = evenly_spaced(len(in_queries), NUM_SHOWN)
    results, neighbours = {}, {}
    for name in students:
        if not (is_finite(bank[name]) and is_finite(queries[name])):
            results[name] = math.nan
            del queries[name]
            continue
        own_bank, own_queries = bank[name].to(extract.device), queries[name].to(extract.device)
        accuracies = knn_accuracy(
            own_bank, bank_labels, own_queries, query_labels, ks=[k], temperature=0.07
        )
        results[name] = accuracies[f"knn{k}_majority"]
        cosines, found = nearest(own_bank, own_queries[torch.from_numpy(shown)], min(NUM_SHOWN, k))
        neighbours[name] = Neighbours(
            in_queries[shown].tolist(), in_bank[found.cpu().numpy()].tolist(), cosines.tolist()
        )
    return Evaluated(results, queries, query_labels, neighbours)


def show_results(
    tracker: Tracker,
    networks: Mapping[str, Student],
    pictured: Collection[str],
    last: Evaluated,
    train: Source,
    val: Source,
) -> None:
    """Gives the tracker maps and galleries of the students' validation images, and a table.

    Args:
        tracker: Where to show them.
        networks: Students and their averages, by name; all of them are in the table.
        pictured: Names of networks with a map and a gallery.
        last: What the last evaluation found.
        train: Training images.
        val: Validation images.
    """
    for name in (name for name in last.features if name in pictured):
        features = last.features[name]
        draw = (
            partial(embedding_map, features, last.labels, name),
            partial(neighbours_gallery, val, train, last.neighbours[name]),
        )
        for picture, drawn in zip(PICTURES, draw, strict=True):
            tracker.log_picture(f"{name}/{picture}", drawn)
    rows = []
    for name in last.features:
        size = sum(parameter.numel() for parameter in networks[name].encoder.parameters())
        rows.append([name, size, last.accuracies[name]])
    tracker.log_table(TABLE, ["student", "parameters of the encoder", "10-NN top-1, %"], rows)
