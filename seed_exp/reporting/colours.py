"""The colours that mean the same in every picture."""

from __future__ import annotations

CLASS_COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#e15759",
    "#76b7b2",
    "#59a14f",
    "#edc948",
    "#b07aa1",
    "#ff9da7",
    "#9c755f",
    "#8a8683",
)
"""Tableau 10: ten hues that stay apart on white; more classes than that share hues."""
INK, MUTED = "#222222", "#767676"
SAME, OTHER = "#2e9e4f", "#d62f2f"
"""Frames of neighbours of the same class and of another."""
