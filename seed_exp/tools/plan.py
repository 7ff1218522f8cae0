"""The costs of the jobs of a sweep."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import TYPE_CHECKING

from seed_exp.cluster.sweep_cells import labels
from seed_exp.config.arguments import Parser, count
from seed_exp.config.command import flags_to_overrides
from seed_exp.config.compose import compose
from seed_exp.config.errors import errors_in_one_line
from seed_exp.config.schema import TRAINING
from seed_exp.config.sweep import jobs

if TYPE_CHECKING:
    from seed_exp.benchmarks.planning import Plan


def plan(
    command: str, overrides: list[str], *, seconds: float, num_images: int | None, gpus: int
) -> Plan:
    """The cost of each job of `python -m seed_exp.<command> -m <overrides>`.

    Other arguments and errors as `make_plan`.
    """
    expanded = jobs(command, overrides)
    named = [
        (label or command, compose(command, job))
        for label, job in zip(labels(expanded), expanded, strict=True)
    ]
    # Late: --help and errors of options need no torch.
    from seed_exp.benchmarks.planning import make_plan

    return make_plan(named, seconds=seconds, num_images=num_images, gpus=gpus)


def main(description: str) -> None:
    """Reads the command line and prints; errors as those of the other commands."""
    given = _parser(description).parse_intermixed_args()
    words = given.words[1:] if given.words[:1] == ["none"] else given.words
    overrides = flags_to_overrides(words, given.command, "experiments")
    with errors_in_one_line():
        result = plan(
            given.command,
            overrides,
            seconds=given.seconds,
            num_images=given.images,
            gpus=given.gpus,
        )
    from seed_exp.benchmarks.planning import render, to_json

    # Piped, it is one whole table.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(to_json(result) if given.json else render(result, width))


def _parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(
        "python -m seed_exp.plan",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="EXPERIMENT or KEY=VALUE",
        help="first, a file of experiments/ or none; then options as the command takes them, "
        "a,b,c for several jobs",
    )
    parser.add_argument(
        "--command",
        choices=TRAINING,
        default="distill",
        help="what would be run (distill)",
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="for the measurements of steps, all together (60)"
    )
    parser.add_argument(
        "--images", type=count, metavar="N", help="training images (as many as the data has)"
    )
    parser.add_argument(
        "--gpus", type=count, default=1, metavar="G", help="devices that share a job (1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser
