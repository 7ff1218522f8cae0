"""Files of results: every number with all that it depends on."""

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


def run_home(run: Path) -> Path:
    """The run folder of `run`, which is one, or a student file in one; of another student file, the folder it is in."""
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
    """Writes results/<evaluation>-<hash>.json into the run folder; the same evaluation overwrites it.

    Args:
        home: Run folder.
        evaluation: "knn", "linear", ...
        protocol: All that the numbers depend on; plain JSON.
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


def with_best(accuracy: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The accuracies by <student>/lr<rate> and, under each student's own name, those of the rate with its largest top-1."""
    best: dict[str, dict[str, float]] = {}
    for name, values in accuracy.items():
        student = name.rpartition("/")[0]
        if student not in best or values["top1"] > best[student]["top1"]:
            best[student] = values
    return {**accuracy, **best}
