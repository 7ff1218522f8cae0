"""Doors that are functions too, so that `seed_exp.distill` is one thing whoever imports it first.

`import seed_exp.distill` makes the module the attribute `distill` of the package. A function of the
same name would be replaced by it; hence the module itself can be called.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that calls the function of its name in `python.calls`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Does what the command does, with options as keywords; `docs/python.md` shows how."""
        return self._function(*arguments, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def _function(self) -> Any:
        from seed_exp.python import calls  # late: a command line does not need it

        return getattr(calls, self.__name__.rpartition(".")[2])


def make_callable(name: str) -> None:
    """Makes the module `name` callable; the module that `python -m` runs stays as it is."""
    if name != "__main__":
        sys.modules[name].__class__ = CallableModule
