"""Features and k-NN accuracy that formats of fewer bits keep, measured on images of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from seed_exp.base.table import markdown_table
from seed_exp.config.schema import ExportConfig
from seed_exp.data.loader import load_batches
from seed_exp.data.sources import NoValidationError, Source, load_source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.evaluation.features import Extractor, is_finite
from seed_exp.evaluation.votes import knn_accuracy

K = 10
"""Neighbours that vote; fewer if there are fewer images."""


@dataclass(frozen=True)
class Kept:
    """Agreement of a file with the network that it was made from."""

    size: int
    """Bytes of the file."""
    cosine: float
    """Mean over images of the cosine between its features and the network's.

    The mean of the network's features is subtracted from both: a large part that all images share
    must not hide an error in the part that tells images apart.
    """
    knn: float | None
    """k-NN top-1 accuracy of its features in percent; None without labels."""


@dataclass(frozen=True)
class TrialImages:
    """Images on which formats of fewer bits are calibrated and measured."""

    config: ExportConfig
    """Says which images, and how many."""
    train: Source
    """Training images: for the calibration, and to find neighbours in."""
    extractor: Extractor
    """Prepares images and computes features."""

    @cached_property
    def val(self) -> Source | None:
        """Validation images, to compare and to classify; None if the data has none."""
        try:
            return load_source(self.config.data, "val")
        except NoValidationError:
            return None

    @property
    def has_labels(self) -> bool:
        """Whether all images have a label, so that neighbours can vote."""
        sources = (self.train, self.val)
        return all(
            source is not None and source.labels is not None and bool((source.labels >= 0).all())
            for source in sources
        )

    @property
    def queries(self) -> Source:
        """The images to compare."""
        return self.train if self.val is None else self.val

    def prepared(self, num: int) -> Tensor:
        """Up to `num` evenly spaced training images as the network takes them [N, 3, S, S]."""
        extractor = self.extractor
        chosen = evenly_spaced(len(self.train), num)
        starts = range(0, len(chosen), extractor.batch_size)
        order = [(0, chosen[start : start + extractor.batch_size]) for start in starts]
        on_bad = None if extractor.bad_samples is None else extractor.bad_samples(self.train)
        # This process reads a few images before worker processes have started.
        workers = extractor.num_workers if len(order) > 1 else 0
        batches = load_batches(
            self.train, extractor.views, order, num_workers=workers, on_bad=on_bad
        )
        with closing(batches):
            parts = [extractor.views.device(batch)["global"][0].clone() for batch in batches]
        return torch.cat(parts).contiguous()

    def words(self) -> str:
        """A sentence about the images that were compared."""
        num = min(self.config.knn_query_size, len(self.queries))
        kind = "training" if self.val is None else "validation"
        compared = f"Measured on {num:,} {kind} images of `{self.queries.fingerprint()}`."
        if not self.has_labels:
            return f"{compared} k-NN accuracy needs labels, which they lack."
        bank = min(self.config.knn_bank_size, len(self.train))
        return (
            f"{compared} k-NN: top-1 of the majority among {min(K, bank)} neighbours in {bank:,} "
            f"training images of `{self.train.fingerprint()}`; each row has its own features of "
            "both."
        )


def kept_by(
    programs: Mapping[str, Callable[[Tensor], Tensor]],
    sizes: Mapping[str, int],
    images: TrialImages,
) -> dict[str, Kept]:
    """Agreement of each program with the first one, which is the network itself.

    Args:
        programs: Functions from images [N, 3, S, S] to features [N, D], by name.
        sizes: Bytes of each program.
        images: Images on which they are compared.
    """
    queries, labels, _ = images.extractor(
        programs, images.queries, evenly_spaced(len(images.queries), images.config.knn_query_size)
    )
    expected = queries[next(iter(programs))]
    cosines = {name: mean_cosine(features, expected) for name, features in queries.items()}
    accuracies: dict[str, float | None] = dict.fromkeys(programs)
    if images.has_labels:
        bank, bank_labels, _ = images.extractor(
            programs, images.train, evenly_spaced(len(images.train), images.config.knn_bank_size)
        )
        k = min(K, len(bank_labels))
        for name, features in queries.items():
            if not (is_finite(features) and is_finite(bank[name])):
                continue  # its cosine says so
            found = knn_accuracy(bank[name], bank_labels, features, labels, ks=[k], temperature=1)
            accuracies[name] = found[f"knn{k}_majority"]
    return {name: Kept(sizes[name], cosines[name], accuracies[name]) for name in programs}


def kept_table(kept: Mapping[str, Kept]) -> str:
    """Markdown table of the agreement of each format with the network."""
    rows = [
        [
            name,
            f"{each.size / 1e6:.2f} MB",
            f"{each.cosine:.5f}",
            "" if each.knn is None else f"{each.knn:.2f}",
        ]
        for name, each in kept.items()
    ]
    return markdown_table(["format", "size", "cosine of features", "k-NN top-1, %"], rows)


def mean_cosine(given: Tensor, expected: Tensor) -> float:
    """Mean cosine of rows [N, D] of both, less the mean of `expected`."""
    mean = expected.mean(0)
    return float(F.cosine_similarity(given - mean, expected - mean, dim=1).mean())


def refuse_loss(
    name: str, file: str, kept: Kept, whole: Kept, min_cosine: float, max_knn_drop: float
) -> None:
    """Refuses a format of fewer bits that keeps too little.

    Args:
        name: The format.
        file: Name of its file.
        kept: Its agreement with the network.
        whole: The network's agreement with itself.
        min_cosine: Smallest mean cosine that is enough.
        max_knn_drop: Percentage points of k-NN accuracy that it may lose.

    Raises:
        ValueError: the cosine is below its bound or not a number, or k-NN lost more.
    """
    advice = f"Nothing was exported: take more calibration_images, or leave out {name}"
    if not kept.cosine >= min_cosine:
        raise ValueError(
            f"{file}: the features of {name} have a mean cosine of {kept.cosine:.4f} to the "
            f"network's, and at least {min_cosine:g} is required (min_cosine). {advice}"
        )
    if kept.knn is not None and whole.knn is not None and whole.knn - kept.knn > max_knn_drop:
        raise ValueError(
            f"{file}: k-NN accuracy of {name} is {kept.knn:.2f} %, of the network {whole.knn:.2f} "
            f"%; at most {max_knn_drop:g} points may be lost (max_knn_drop). {advice}"
        )
