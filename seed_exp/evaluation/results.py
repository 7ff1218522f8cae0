"""Results files: each holds numbers and everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from seed_exp import __version__
from seed_exp.base.files import write_json
from seed_exp.base.redaction import redact_all


class WrittenMeasures(dict[str, dict[str, float]]):
    """Numbers in percent by name, for each network, with the results file that holds them."""

    def __init__(self, numbers: Mapping[str, dict[str, float]], file: Path) -> None:
        super().__init__(numbers)
        self.file = file


def run_home(run: Path) -> Path:
    """The run folder that belongs to `run`: a run folder itself, or a student file.

    For a student file outside of a run folder, the folder that contains it.
    """
    if run.is_dir():
        return run
    return run.parent.parent if run.parent.name == "students" else run.parent


def write_results(
    home: Path,
    evaluation: str,
    protocol: dict[str, Any],
    results: dict[str, Any],
    identity: dict[str, Any] | None = None,
) -> Path:
    """Writes results/<evaluation>-<hash>.json into a run folder; returns its path.

    The same evaluation with the same protocol overwrites its earlier file.

    Args:
        home: Run folder.
        evaluation: Name of the evaluation: "knn", "linear", ...
        protocol: Everything that the numbers depend on; plain JSON.
        results: The numbers, by network; plain JSON.
        identity: The part of the protocol that names the file; None = all.
    """
    named_by = json.dumps(protocol if identity is None else identity, sort_keys=True)
    digest = hashlib.sha256(named_by.encode()).hexdigest()
    path = home / "results" / f"{evaluation}-{digest[:8]}.json"
    versions = {
        "seed_exp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }
    content = {
        "evaluation": evaluation,
        "protocol": protocol,
        "results": results,
        "versions": versions,
    }
    write_json(path, redact_all(content))
    return path


def results_about(folder: Path, name: str, sha256: str) -> list[tuple[Any, dict[str, float]]]:
    """The results files about exactly these weights: whole content, and the network's own numbers.

    Args:
        folder: Folder of the results files.
        name: Name of the network in the files.
        sha256: Checksum of its file.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            record = content["protocol"].get("students", {}).get(name, {})
            measured = content["results"].get(name, {})
        except (ValueError, LookupError, TypeError, AttributeError):
            continue  # a file of somebody else, beside a student's file
        numbers = {key: value for key, value in measured.items() if isinstance(value, int | float)}
        if record.get("sha256") == sha256 and numbers:
            found.append((content, numbers))
    return found


def with_best(accuracy: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """`accuracy` with one more entry per student: the values of its rate with the largest top-1.

    The keys of `accuracy` are <student>/lr<rate>; those of the added entries are <student>.
    """
    best: dict[str, dict[str, float]] = {}
    for name, values in accuracy.items():
        student = name.rpartition("/")[0]
        if student not in best or values["top1"] > best[student]["top1"]:
            best[student] = values
    return {**accuracy, **best}
