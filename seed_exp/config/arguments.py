"""Command lines that are not composed by Hydra: those of `plan`, `sweep` and `zoo`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Ends on an error with one line and status 1, as the composed commands do."""

    def error(self, message: str) -> NoReturn:
        """Prints the message; exits."""
        sys.exit(f"error: {message}")


def count(text: str) -> int:
    """A number of something, at least 1: the `type` of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
