"""Names of a run's networks where all of them stand side by side, as in its config.json."""

from __future__ import annotations

TEACHER = "teacher"
"""The frozen teacher."""


def trained(student: str) -> str:
    """The network that is trained under this name."""
    return f"students.{student}"


def keys_of(student: str) -> str:
    """The momentum encoder of the network that is trained under this name."""
    return f"keys.{student}"
