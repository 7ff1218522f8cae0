"""k-NN evaluation of a run's students."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seed_exp.config.schema import KnnConfig
from seed_exp.engine import distributed
from seed_exp.evaluation.votes import knn_accuracy
from seed_exp.protocols.untrained import diverged_among, frozen_features, write_numbers

Accuracies = dict[str, dict[str, float]]


def knn(config: KnnConfig) -> Accuracies:
    """Evaluates, prints a table, writes results/knn-*.json into the run folder.

    Returns:
        {student: {measure: percent}}. Students whose features are not finite are left out.

    Raises:
        ValueError: no student's features are finite; or as `load_frozen` and `load_labelled`.
    """
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        features = frozen_features(config, device)
        bank, bank_labels, _ = features(features.sources.train)
        queries, query_labels, _ = features(features.sources.val)
        if distributed.rank() != 0:
            return {}
        diverged = diverged_among(bank, queries)
        ks = possible_ks(config.ks, len(bank_labels))
        results = {
            name: knn_accuracy(
                bank[name].to(device),
                bank_labels,
                queries[name].to(device),
                query_labels,
                ks=ks,
                temperature=config.temperature,
            )
            for name in bank
            if name not in diverged
        }
        protocol = {
            **features.protocol,
            "votes": "majority; weighted by exp(similarity / temperature)",
            "ks": ks,
            "temperature": config.temperature,
            "bank": features.sources.train.fingerprint(),
            "queries": features.sources.val.fingerprint(),
        }
        return write_numbers("knn", "k-NN top-1", Path(config.run), protocol, results, diverged)


def possible_ks(ks: Sequence[int], num_images: int) -> list[int]:
    """The numbers of neighbours with none above the number of images; prints which it lowered."""
    large = [k for k in ks if k > num_images]
    if large:
        names = ", ".join(f"k={k}" for k in large)
        print(f"{names}: there are {num_images:,} training images; k={num_images} instead")
    return list(dict.fromkeys(min(k, num_images) for k in ks))
