"""`python -m seed_exp` lists the commands."""

from __future__ import annotations

import ast
from pathlib import Path

from seed_exp.config.schema import SCHEMAS, WITHOUT_SCHEMA


def main() -> None:
    """Prints each command with the first line of its description."""
    print("python -m seed_exp.COMMAND [OPTION=VALUE ...]\n")
    for name in sorted([*SCHEMAS, *WITHOUT_SCHEMA]):
        # Read, because importing all of them would take seconds.
        file = Path(__file__).with_name(f"{name}.py")
        described = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        print(f"  {name:<12}{described.splitlines()[0]}")
    print("\npython -m seed_exp.COMMAND --help explains a command and its options.")


if __name__ == "__main__":
    main()
