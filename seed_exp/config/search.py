"""Searches for options with Optuna, `-m hydra/sweeper=optuna`: the number, and the study."""

from __future__ import annotations

import logging
import math
import statistics
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seed_exp.base.files import json_lines
from seed_exp.config.schema import EVALUATIONS
from seed_exp.config.schema.training import TRAINING

SWEEPER = "optuna"
"""Name of the sweeper in the group hydra/sweeper."""
PLUGIN = "hydra_plugins.hydra_optuna_sweeper"
COMMAND = "seed_exp_command"
"""Name under which a study keeps the command whose number it optimises."""
SETTINGS = {
    "direction": "maximize",
    "n_jobs": "1",
    "max_failure_rate": "1",  # a training that diverges ends its trial, not the search
    "custom_search_space": f"{__name__}.keep_to_one_command",
}
"""Options hydra.sweeper.* of a search that differ from the sweeper's own defaults."""


def begin_search(command: str, arguments: list[str]) -> list[str]:
    """Checks that a search with this command is possible, and lets the sweeper log.

    Returns:
        The command line with SETTINGS and a name for the study, where it does not give others.

    Raises:
        ValueError: the sweeper is not installed, or the command has no number.
    """
    if find_spec(PLUGIN) is None:
        raise ValueError(
            "hydra/sweeper=optuna needs hydra-optuna-sweeper, which is not installed; "
            "pip install 'seed_exp[optuna]'"
        )
    if command not in (*TRAINING, *EVALUATIONS):
        raise ValueError(
            f"{command} has no number to optimise; choose {', '.join((*TRAINING, *EVALUATIONS))}"
        )
    logger = logging.getLogger(PLUGIN)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(logging.StreamHandler(sys.stderr))
    given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    settings = {"study_name": command, **SETTINGS}
    words = {f"hydra.sweeper.{name}": value for name, value in settings.items()}
    return [*arguments, *(f"{key}={value}" for key, value in words.items() if key not in given)]


def number_to_optimise(command: str, result: Any) -> float:
    """The number that a search makes large, in percent: the mean over the students.

    Args:
        command: Name of the command.
        result: What its function returned: the run folder of a training, or {student: {measure:
            percent}} of an evaluation.

    Raises:
        ValueError: there is none.
    """
    numbers = _of_training(result) if command in TRAINING else _of_evaluation(command, result)
    if not numbers:
        raise ValueError(
            f"{command} measured nothing to optimise: its images have no labels to measure with"
        )
    return statistics.fmean(0.0 if math.isnan(number) else number for number in numbers)


def _of_training(folder: Path) -> list[float]:
    """The last k-NN accuracy of each student of a run."""
    last: dict[str, float] = {}
    for line in json_lines((folder / "metrics.jsonl").read_text()):
        found = {key: value for key, value in line.items() if key.endswith("/knn10")}
        last |= {key: math.nan if value is None else float(value) for key, value in found.items()}
    return list(last.values())


def _of_evaluation(command: str, result: Mapping[str, Mapping[str, float]]) -> list[float]:
    """The first number to look at of each student, at its best learning rate."""
    headline = EVALUATIONS[command].headline
    return [
        float(measures[headline])
        for name, measures in result.items()
        if "/lr" not in name and headline in measures
    ]


def keep_to_one_command(config: Any, trial: Any) -> None:
    """Refuses a study of another command; the sweeper calls it for each new trial.

    Args:
        config: Hydra's whole config.
        trial: Trial of the study.

    Raises:
        ValueError: the numbers in the study are not those of this command.
    """
    from optuna.trial import TrialState

    command, study = config.hydra.job.config_name, trial.study
    others = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]
    # A study without a command and with finished trials was made by another program.
    unknown = "another program" if any(each.state.is_finished() for each in others) else command
    owner = study.user_attrs.get(COMMAND, unknown)
    if owner != command:
        study.tell(trial, state=TrialState.FAIL)  # not left behind as a running one
        raise ValueError(
            f"study {study.study_name} in {config.hydra.sweeper.storage} is one of {owner}, not of "
            f"{command}; choose another hydra.sweeper.study_name"
        )
    study.set_user_attr(COMMAND, command)
