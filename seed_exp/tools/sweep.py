"""The command line of `sweep`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from seed_exp.base.registry import lookup
from seed_exp.config.arguments import Parser, count
from seed_exp.config.command import flags_to_overrides
from seed_exp.config.errors import errors_in_one_line
from seed_exp.config.schema import TRAINING
from seed_exp.tools.sweep_actions import cancel, collect, retry, status, submit

ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "submit": submit,
    "status": status,
    "collect": collect,
    "cancel": cancel,
    "retry": retry,
}


def main(description: str) -> None:
    """Reads the command line and acts; errors as those of the other commands."""
    if {"-h", "--help"} & set(sys.argv[1:]) or not sys.argv[1:]:
        print(description)
    action = next(iter(sys.argv[1:]), "")
    if action.startswith("-") or not action:
        return
    with errors_in_one_line():
        act = lookup(ACTIONS, action, "action of sweep")
        given = _parser(action).parse_intermixed_args(sys.argv[2:])
        given.action, given.words = (
            action,
            flags_to_overrides(given.words, given.command, "experiments"),
        )
        try:
            act(given)
        except KeyboardInterrupt:
            sys.exit(130)


def _parser(action: str) -> argparse.ArgumentParser:
    parser = Parser(f"python -m seed_exp.sweep {action}", allow_abbrev=False)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="EXPERIMENT or KEY=VALUE",
        help="as `python -m seed_exp.distill -m` takes them",
    )
    parser.add_argument(
        "--command",
        choices=TRAINING,
        default="distill",
        help="what a cell runs (distill)",
    )
    if action in ("submit", "retry"):
        parser.add_argument(
            "--launcher",
            metavar="PROFILE",
            help="of conf/hydra/launcher: slurm, slurm_8gpu, slurm_2node, local",
        )
        parser.add_argument(
            "--parallel",
            type=count,
            metavar="N",
            help="cells that run at once (of the profile; local: 1)",
        )
        parser.add_argument(
            "--gpus",
            type=count,
            metavar="G",
            help="local: GPUs, and processes, of each cell (one that sees all)",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="print the script and submit nothing"
        )
        parser.add_argument(
            "--plan", action="store_true", help="first measure for a minute what it will cost"
        )
    if action in ("submit", "retry", "cancel"):
        parser.add_argument(
            "--cell",
            action="append",
            default=[],
            metavar="CELL",
            help="only this one, by number or label; may be repeated",
        )
    if action == "status":
        parser.add_argument(
            "--watch",
            nargs="?",
            type=count,
            const=10,
            metavar="SECONDS",
            help="again and again until all is done (10)",
        )
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    if action == "collect":
        parser.add_argument(
            "--output",
            type=Path,
            metavar="FILE",
            help="write everything to FILE.json, or all numbers to FILE.csv",
        )
    return parser
