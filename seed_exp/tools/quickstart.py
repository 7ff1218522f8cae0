"""A teacher and two tiny students on scikit-learn's digits, with a table and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seed_exp.base.files import atomic_write
from seed_exp.base.table import ComparisonRow, comparison_table
from seed_exp.config.compose import compose
from seed_exp.config.schema import DataConfig, QuickstartConfig
from seed_exp.data.sources import load_source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.evaluation.features import Extractor
from seed_exp.evaluation.setup import load_frozen
from seed_exp.evaluation.votes import nearest
from seed_exp.protocols.knn import knn
from seed_exp.protocols.linear import linear
from seed_exp.reporting.figure import overview_figure
from seed_exp.training.distillation import distill
from seed_exp.training.pretraining import pretrain
from seed_exp.views.recipe import EvalViews

TEACHER, STUDENT = "convnet_w32", "convnet_w2"
TRAINING = [
    "data=digits",
    "views=digits",
    "batch_size=128",
    "optimizer.lr=0.12",
    "optimizer.warmup_epochs=0",
]
TRAINING += ["log_every=25", "eval_every=0", "tracker=files"]
MOCO = [
    "moco.queue_size=1024",
    "moco.momentum=0.99",
]  # 0.999 is too slow for runs of some hundred steps
LINEAR = [
    "data=digits",
    "views=linear_digits",
    "epochs=30",
    "batch_size=128",
    "optimizer.milestones=[18,24]",
    "lrs=[3]",
]
COMMANDS: dict[str, Callable[[Any], Any]] = {
    "pretrain": pretrain,
    "distill": distill,
    "knn": knn,
    "linear": linear,
}


def quickstart(config: QuickstartConfig) -> None:
    """Runs the comparison for every seed, prints the table, writes it and a picture."""
    home = Path(config.run_dir)
    repeats = [compare(home / f"seed{seed}", seed, config.steps) for seed in config.seeds]
    rows = [mean_row([rows[index] for rows in repeats]) for index in range(3)]
    table = comparison_table(rows, baseline=rows[1])
    if len(repeats) > 1:
        gains = [repeat[2].linear - repeat[1].linear for repeat in repeats]
        gain = f"{statistics.mean(gains):+.1f} +- {statistics.stdev(gains):.1f} points"
        table += f"\n\nSEED - MoCo-V2, linear top-1: {gain}"
        table += f" over seeds {config.seeds} ({', '.join(f'{gain:+.1f}' for gain in gains)})"
    with atomic_write(home / "table.md") as file:
        file.write(f"{table}\n".encode())
    picture = home / "overview.png"
    draw(picture, home / f"seed{config.seeds[0]}")
    print(f"\n{table}\n\nThe table is in {home / 'table.md'}, a picture in {picture}.")


def compare(home: Path, seed: int, steps: int) -> list[ComparisonRow]:
    """Trains and evaluates the teacher, the student without and the student with a teacher."""
    training = [*TRAINING, f"steps={steps}", f"seed={seed}"]
    run("pretrain", [*training, *MOCO, f"student={TEACHER}", f"run_dir={home / 'teacher'}"])
    run("pretrain", [*training, *MOCO, f"student={STUDENT}", f"run_dir={home / 'moco'}"])
    from_teacher = [
        "teacher=run",
        f"teacher.checkpoint={home / 'teacher'}",
        "objective.queue_size=1024",
    ]
    run("distill", [*training, *from_teacher, f"student={STUDENT}", f"run_dir={home / 'seed'}"])
    networks = {
        "teacher": ("MoCo-V2", TEACHER),
        "moco": ("MoCo-V2, no teacher", STUDENT),
        "seed": ("SEED", STUDENT),
    }
    rows = []
    for folder, (method, network) in networks.items():
        neighbours = run("knn", [f"run={home / folder}", "data=digits", "ks=[10]"])
        linear_top1 = run("linear", [f"run={home / folder}", f"seed={seed}", *LINEAR])
        student = load_frozen(home / folder, None, torch.device("cpu")).students[network]
        parameters = sum(parameter.numel() for parameter in student.encoder.parameters())
        rows.append(
            ComparisonRow(
                network,
                method,
                parameters,
                neighbours[network]["knn10_majority"],
                linear_top1[network]["top1"],
            )
        )
    return rows


def run(name: str, options: list[str]) -> Any:
    """Prints the command line and runs it; returns the command's result."""
    print(f"\n$ python -m seed_exp.{name} {' '.join(options)}", flush=True)
    return COMMANDS[name](compose(name, options))


def mean_row(rows: list[ComparisonRow]) -> ComparisonRow:
    """The row with the mean accuracies over repetitions."""
    knn_mean, linear_mean = (
        statistics.mean(getattr(row, key) for row in rows) for key in ("knn", "linear")
    )
    return replace(rows[0], knn=knn_mean, linear=linear_mean)


def draw(path: Path, home: Path) -> None:
    """Draws loss curves, maps of the unseen digits, and nearest training digits of some of them."""
    titles = {
        f"teacher {TEACHER}, MoCo-V2": "teacher",
        f"{STUDENT}, MoCo-V2": "moco",
        f"{STUDENT}, SEED": "seed",
    }
    data = DataConfig(source="digits")
    train, val = load_source(data, "train"), load_source(data, "val")
    features, neighbours, losses = {}, {}, {}
    queries = evenly_spaced(len(val), 5)
    for title, folder in titles.items():
        frozen = load_frozen(home / folder, None, torch.device("cpu"))
        extract = Extractor(EvalViews(frozen.views), torch.device("cpu"), num_workers=0)
        encoders = {name: student.features for name, student in frozen.students.items()}
        (name,) = encoders
        bank, bank_labels, _ = extract(encoders, train, evenly_spaced(len(train)))
        unseen, labels, _ = extract(encoders, val, evenly_spaced(len(val)))
        features[title] = unseen[name]
        neighbours[title] = nearest(bank[name], unseen[name][queries], k=8)[1]
        losses[title] = read_losses(home / folder / "metrics.jsonl", f"{name}/loss")
    overview_figure(
        path,
        losses=losses,
        maps=features,
        labels=labels,
        neighbours=neighbours,
        query_images=torch.stack([val.image(index) for index in queries.tolist()]),
        query_labels=labels[queries],
        bank_images=torch.stack([train.image(index) for index in range(len(train))]),
        bank_labels=bank_labels,
        title="Handwritten digits, without labels: "
        "the same small student with and without a teacher",
    )


def read_losses(path: Path, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric of a metrics.jsonl."""
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]
