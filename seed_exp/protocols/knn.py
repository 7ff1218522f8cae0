"""k-NN evaluation of a run's students."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seed_exp.base.table import markdown_table
from seed_exp.config.schema import KnnConfig
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine import distributed
from seed_exp.engine.precision import resolve
from seed_exp.engine.run import list_bad_samples, num_workers_of
from seed_exp.evaluation.features import Extractor, is_finite
from seed_exp.evaluation.recalibration import recalibrate_batch_norm
from seed_exp.evaluation.results import WrittenMeasures, run_home, write_results
from seed_exp.evaluation.setup import eval_options, load_frozen, load_labelled
from seed_exp.evaluation.votes import knn_accuracy
from seed_exp.views.recipe import EvalViews

Accuracies = dict[str, dict[str, float]]


def knn(config: KnnConfig) -> Accuracies:
    """Evaluates, prints a table, writes results/knn-*.json into the run folder.

    Returns:
        {student: {measure: percent}}. Students whose features are not finite are left out.

    Raises:
        ValueError: no student's features are finite; or as `load_frozen` and `load_labelled`.
    """
    run = Path(config.run)
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        frozen, sources = load_frozen(run, config.networks, device), load_labelled(config.data)
        bad_samples = list_bad_samples(config.data, run_home(run))
        num_workers = num_workers_of(config.data)
        extract = Extractor(
            EvalViews(frozen.views),
            device,
            num_workers,
            config.batch_size,
            config.precision,
            bad_samples,
        )
        encoders = {name: student.features for name, student in frozen.students.items()}
        recalibrated = {}
        if config.recalibrate_bn:
            networks = {name: student.encoder for name, student in frozen.students.items()}
            recalibrated["recalibrate_bn"] = recalibrate_batch_norm(
                networks, extract, sources.train
            )
        bank, bank_labels, _ = extract(encoders, sources.train, evenly_spaced(len(sources.train)))
        queries, query_labels, _ = extract(encoders, sources.val, evenly_spaced(len(sources.val)))
        if distributed.rank() != 0:
            return {}
        diverged = [
            name for name in encoders if not (is_finite(bank[name]) and is_finite(queries[name]))
        ]
        if len(diverged) == len(encoders):
            raise ValueError(
                f"the features of {', '.join(diverged)} are not finite: the training has diverged; "
                "train with a lower optimizer.lr or with optimizer.clip_grad_norm=1"
            )
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
            for name in encoders
            if name not in diverged
        }
        protocol: dict[str, Any] = {
            "features": "pooled encoder output, cosine similarity",
            "votes": "majority; weighted by exp(similarity / temperature)",
            "ks": ks,
            "temperature": config.temperature,
            "views": eval_options(frozen.views),
            "precision": resolve(config.precision, device).value,
            "bank": sources.train.fingerprint(),
            "queries": sources.val.fingerprint(),
            "students": frozen.record,
            **recalibrated,
        }
        if diverged:
            protocol["diverged"] = diverged
        path = write_results(run_home(run), "knn", protocol, results)
    measures = list(next(iter(results.values())))
    rows = [
        [name, *(f"{accuracy[measure]:.2f}" for measure in measures)]
        for name, accuracy in results.items()
    ]
    rows += [[name, *("diverged" for _ in measures)] for name in diverged]
    print(markdown_table(["k-NN top-1, %", *measures], rows))
    print(f"written to {path}")
    return WrittenMeasures(results, path)


def possible_ks(ks: Sequence[int], num_images: int) -> list[int]:
    """The numbers of neighbours with none above the number of images; prints which it lowered."""
    large = [k for k in ks if k > num_images]
    if large:
        names = ", ".join(f"k={k}" for k in large)
        print(f"{names}: there are {num_images:,} training images; k={num_images} instead")
    return list(dict.fromkeys(min(k, num_images) for k in ks))
