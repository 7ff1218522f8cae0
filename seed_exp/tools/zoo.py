"""The command line of `zoo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from seed_exp.config.arguments import Parser
from seed_exp.config.errors import errors_in_one_line

DESCRIPTIONS = {
    "list": "A line for each entry.",
    "show": "Everything that is known of one entry.",
    "fetch": "Downloads files and prints where each of them is.",
    "verify": "Checks files and prints what was found in each of them.",
}
"""Each action of `zoo_actions`, for its --help."""


def main(description: str) -> None:
    """Reads the command line and acts; errors as those of the other commands."""
    given = _parser(description).parse_args()
    from seed_exp.tools.zoo_actions import ACTIONS  # late: --help needs no torch

    with errors_in_one_line():
        try:
            ACTIONS[given.action](given)
        except KeyboardInterrupt:
            sys.exit(130)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(
        "python -m seed_exp.zoo",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|fetch|verify")
    for name, action_description in DESCRIPTIONS.items():
        action = actions.add_parser(name, description=action_description, allow_abbrev=False)
        action.add_argument("--json", action="store_true", help="print JSON")
        if name == "list":
            action.add_argument(
                "filters",
                nargs="*",
                metavar="licence=KIND",
                help="only permissive, non-commercial, own-terms or unknown licences",
            )
        if name == "show":
            action.add_argument("name", metavar="NAME")
        if name in ("fetch", "verify"):
            action.add_argument("names", nargs="+" if name == "fetch" else "*", metavar="NAME")
        if name == "verify":
            action.add_argument("--all", action="store_true", help="all that are in the cache")
            action.add_argument(
                "--file",
                type=Path,
                metavar="PATH",
                help="this file instead of the one in the cache",
            )
    return parser
