"""`seed-exp COMMAND` is `python -m seed_exp.COMMAND`; without a command it lists all."""

from __future__ import annotations

import ast
import os
import sys
from importlib import import_module
from pathlib import Path

from seed_exp.base.registry import closest
from seed_exp.base.stopping import show_interrupt_in_one_line
from seed_exp.config.schema import SCHEMAS, WITHOUT_SCHEMA

COMMANDS = sorted([*SCHEMAS, *WITHOUT_SCHEMA])


def main() -> None:
    """Runs the command that the first argument names."""
    sys.excepthook = show_interrupt_in_one_line
    arguments = sys.argv[1:]
    if arguments[:1] in (["-sc"], ["--shell-completion"]):
        arguments = complete(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        show_commands()
    elif arguments[0] not in COMMANDS:
        sys.exit(f"error: no command {arguments[0]!r}; {closest(arguments[0], COMMANDS)}")
    else:
        sys.argv[1:] = arguments[1:]
        import_module(f"seed_exp.{arguments[0]}").main()


def complete(arguments: list[str]) -> list[str]:
    """The arguments that let Hydra complete the line in COMP_LINE, which begins with a command.

    Ends the process if the line has no whole command yet, or one without Hydra's completion.
    """
    words = os.environ.get("COMP_LINE", "").split(maxsplit=2)
    if "query=" not in arguments[-1]:
        return ["distill", *arguments]  # the shell's part is the same for all commands
    if len(words) > 1 and words[1] in SCHEMAS:
        os.environ["COMP_LINE"] = os.environ["COMP_LINE"].replace(words[1], "", 1)
        return [words[1], *arguments]
    print(" ".join(COMMANDS))
    sys.exit()


def show_commands() -> None:
    """Prints each command with the first line of its description."""
    print("python -m seed_exp.COMMAND [OPTION=VALUE ...], or seed-exp COMMAND [OPTION=VALUE ...]\n")
    for name in COMMANDS:
        # Read, because importing all of them would take seconds.
        file = Path(__file__).with_name(f"{name}.py")
        described = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        print(f"  {name:<12}{described.splitlines()[0]}")
    print("\npython -m seed_exp.COMMAND --help explains a command and its options.")


if __name__ == "__main__":
    main()
