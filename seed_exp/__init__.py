"""Self-supervised distillation (SEED, ICLR 2021) as a suite: strong small vision encoders."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seed_exp.python.calls import (
        detect,
        distill,
        embed,
        export,
        finetune,
        knn,
        linear,
        pretrain,
        report,
        retrieval,
        segment,
    )
    from seed_exp.python.encoder import load

__all__ = [
    "detect",
    "distill",
    "embed",
    "export",
    "finetune",
    "knn",
    "linear",
    "load",
    "pretrain",
    "report",
    "retrieval",
    "segment",
]
__version__ = "0.2.0"

CALLS = frozenset(__all__) - {"load"}
"""Commands that are functions too, `seed_exp.distill(...)`: modules that can be called."""

if sys.argv[:1] == ["-m"]:  # python -m seed_exp.COMMAND: Ctrl-C may come while it imports
    from seed_exp.base.stopping import show_interrupt_in_one_line

    sys.excepthook = show_interrupt_in_one_line


def __getattr__(name: str) -> Any:
    """The doors for Python, imported when they are first asked for."""
    if name == "load":
        from seed_exp.python.encoder import load

        return load
    if name in CALLS:
        from importlib import import_module

        return import_module(f"seed_exp.{name}")
    raise AttributeError(f"module 'seed_exp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
