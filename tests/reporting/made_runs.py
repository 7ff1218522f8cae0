"""Run folders as training leaves them, without training."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from seed_exp.base.average_names import network_behind, with_averages
from seed_exp.config.compose import compose
from seed_exp.config.options import to_plain
from seed_exp.config.schema import TRAINING
from seed_exp.reporting.published import num_images

DIGITS = ["data=digits", "views=digits", "steps=100", "batch_size=32"]
STUDENTS = "student=[convnet_w2,convnet_w32]"
PARAMETERS = {"convnet_w2": 1626, "convnet_w32": 388_896}
DIGITS_IMAGES = ("digits:train:1437:9e3955ebcebe34df", "digits:val:360:af9cd18ffe26d5fd")
IMAGENET_IMAGES = ("tsv:train.tsv:1281167:0123456789abcdef", "tsv:val.tsv:50000:fedcba9876543210")
LINEAR = {
    "epochs": 100,
    "steps": None,
    "batch_size": 256,
    "optimizer.milestones": [60.0, 80.0],
    "seed": 0,
    "lrs": [30.0],
}


@functools.cache
def composed(command: str, overrides: tuple[str, ...], num: int = 1_281_167) -> Any:
    """The nested options for `num` images, composed once for all tests: it takes a while."""
    config = compose(command, list(overrides))
    return to_plain(config.sized_for(num) if command in TRAINING else config)


def make_run(
    folder: Path,
    command: str,
    overrides: Sequence[str],
    *,
    step: int = 100,
    images: Sequence[str] = DIGITS_IMAGES,
    finished: bool = True,
) -> Path:
    """The run of the command with these options, trained for `step` steps."""
    options = composed(command, tuple(overrides), num_images(images[0]) or 1)
    folder.mkdir(parents=True)
    inputs = {"data": images[0], **({"teacher": "7" * 64} if command == "distill" else {})}
    content = {"command": command, "version": "0.1.0", "options": options, "inputs": inputs}
    (folder / "config.json").write_text(json.dumps(content))
    rows, speed = [], []
    for at in range(10, step + 1, 10):
        losses = {
            f"{name}/loss": 7 - at / (50 + number)
            for number, name in enumerate(options["students"])
        }
        rows.append(
            {"step": at, "epoch": at / 44, "lr": 0.1, **losses, "effective_neighbours": 30.0}
        )
        speed.append({"step": at, "images_per_s": 640.0, "data_wait_percent": 5.0})
    for name, lines in (("metrics", rows), ("speed", speed)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    if finished:
        for name in with_averages(options["students"], options.get("ema_decay")):
            network = network_behind(name, options["students"])
            student = options["students"][network]
            header = {"student": student, "embedding_dim": 128, "step": step, "command": command}
            encoder = {
                "encoder.weight": torch.zeros(PARAMETERS.get(network, 10)),
                "encoder.bn.running_mean": torch.zeros(7),
            }
            path = folder / "students" / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file(
                {**encoder, "head.0.weight": torch.zeros(3, 3)},
                path,
                metadata={"seed_exp": json.dumps(header)},
            )
    return folder


def add_results(
    folder: Path,
    numbers: Mapping[str, tuple[float, float, float]],
    *,
    step: int = 100,
    images: Sequence[str] = DIGITS_IMAGES,
    evaluations: Sequence[str] = ("knn", "linear"),
    **linear: Any,
) -> None:
    """Files of results: by student k-NN top-1, linear top-1 and top-5."""
    students = {
        name: {"network": name, "step": step, "sha256": f"{index:064x}"}
        for index, name in enumerate(numbers)
    }
    protocols: dict[str, dict[str, Any]] = {
        "knn": {"ks": [10], "bank": images[0], "queries": images[1], "students": students},
        "linear": {
            "options": {**LINEAR, **linear},
            "train": images[0],
            "val": images[1],
            "students": students,
        },
        "finetune": {"options": linear, "train": images[0], "val": images[1], "students": students},
    }
    results: dict[str, dict[str, dict[str, float]]] = {
        "knn": {
            name: {"knn10_majority": knn, "knn10_weighted": knn + 0.5}
            for name, (knn, _, _) in numbers.items()
        },
        **{
            evaluation: {
                name: {"top1": top1, "top5": top5} for name, (_, top1, top5) in numbers.items()
            }
            for evaluation in ("linear", "finetune")
        },
    }
    for evaluation in evaluations:
        content = {
            "evaluation": evaluation,
            "protocol": protocols[evaluation],
            "results": results[evaluation],
        }
        path = folder / "results" / f"{evaluation}-{len(list(folder.glob('results/*'))):08x}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**content, "versions": {"seed_exp": "0.1.0", "torch": "2.11"}}))
