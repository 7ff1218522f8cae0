"""The cells that the words of a line stand for, and the launcher that they ask for."""

from __future__ import annotations

from collections.abc import Sequence

from seed_exp.base.redaction import redact
from seed_exp.cluster.sweep_cells import Cell, labels
from seed_exp.config.compose import compose
from seed_exp.config.identity import digest, identity
from seed_exp.config.sweep import jobs

LAUNCHER_WORDS = ("hydra.launcher.", "+hydra.launcher.", "++hydra.launcher.")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for the cells and the words for the launcher.

    Raises:
        ValueError: a word that must not stand here.
    """
    launcher = [word for word in words if word.startswith(LAUNCHER_WORDS)]
    others = [word for word in words if word not in launcher]
    for word in words:
        key, _, value = word.partition("=")
        if key == "hydra/launcher":
            raise ValueError(f"{word}: choose where the cells run with --launcher {value}")
        if redact(word) != word:
            hint = f"put it into a variable and give {key}='${{oc.env:NAME}}'"
            raise ValueError(f"{redact(word)}: a secret would be written into a script; {hint}")
    return others, launcher


def expand(command: str, words: Sequence[str]) -> list[tuple[str, Cell]]:
    """Label and cell of every job of the grid, each composed and checked.

    Raises:
        ValueError: two cells would be in the same run folder.
    """
    grid = jobs(command, list(words))
    cells: dict[str, Cell] = {}
    for overrides in grid:
        config = compose(command, overrides)
        if config.run_dir is not None and len(grid) > 1:
            raise ValueError(
                f"run_dir={config.run_dir} would be the folder of {len(grid)} cells; leave it out"
            )
        name = digest(command, identity(config, {}))
        if name in cells:
            same = " ".join(cells[name].overrides)
            raise ValueError(
                f"the cells {same!r} and {' '.join(overrides)!r} compute the same; leave one out"
            )
        cells[name] = Cell(name, command, overrides)
    return list(zip(labels(grid), cells.values(), strict=True))
