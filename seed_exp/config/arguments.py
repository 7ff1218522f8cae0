"""Parts of the command lines that Hydra does not compose: those of `plan`, `sweep` and `zoo`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from seed_exp.base.redaction import printable


class Parser(argparse.ArgumentParser):
    """Ends on an error with one line and status 1, as the composed commands do."""

    def error(self, message: str) -> NoReturn:
        """Prints the message; exits."""
        sys.exit(printable(f"error: {message}"))


def count(text: str) -> int:
    """The `type` of an argument that counts something: a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
