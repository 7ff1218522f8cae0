"""Watches losses and gradients of a fleet: means for the log, and which networks have diverged."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_exp.engine import distributed
from seed_exp.engine.checkpoint import newest_checkpoint
from seed_exp.engine.fleet import Fleet

log = logging.getLogger("seed_exp")

COLLAPSED_STD = 0.02
"""Standard deviation of the embeddings below which a student has collapsed.

It is relative to that of vectors all over the sphere.
"""
COLLAPSED_RANK = 1.2
"""Effective rank of the embeddings below which a student has collapsed."""
_SHOWN_SAMPLES = 8


class Health:
    """Sums since the last log line, on the device.

    Nothing waits for a GPU until `close` or `check_divergence`.

    Args:
        fleet: The networks to watch; those that diverge are noted in it.
        folder: Run folder, to name the last checkpoint.
        max_skipped: Steps in all in which a network's gradient may be not finite; with more it has
            diverged.
    """

    def __init__(self, fleet: Fleet, folder: Path, max_skipped: int) -> None:
        self._fleet, self._folder, self._max_skipped = fleet, folder, max_skipped
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._skipped: dict[str, Tensor] = {}
        self._steps: list[tuple[int, Tensor, dict[str, Tensor]]] = []
        self._skipped_before = dict.fromkeys(fleet.method.trainable, 0)
        self._collapsed: set[str] = set()

    def add(
        self, step: int, indices: Tensor, means: Mapping[str, Tensor], skipped: Mapping[str, Tensor]
    ) -> None:
        """Adds a step.

        Args:
            step: Number of the step, from 0.
            indices: The images in it.
            means: Its scalars by <name>/<key>.
            skipped: By network, whether it was not updated.
        """
        for key, value in means.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + 1
        for name, flag in skipped.items():
            self._skipped[name] = (
                self._skipped[name] + flag if name in self._skipped else flag.float()
            )
        self._steps.append((step, indices.clone(), dict(skipped)))

    def close(
        self, measured: Mapping[str, Tensor], steps_done: int, *, warmed_up: bool
    ) -> dict[str, float]:
        """Means over steps and ranks, and of `measured` over ranks; begins the next interval.

        Steps in which a network was not updated are left out of its means, and counted in
        <name>/skipped_steps.

        Raises:
            ValueError: no network is left to train, or what they share is not finite.
        """
        keys = [*self._sums, *measured, *self._skipped]
        on_device = [
            *self._sums.values(),
            *(value.float() for value in measured.values()),
            *self._skipped.values(),
        ]
        values = dict(zip(keys, distributed.mean(torch.stack(on_device)).tolist(), strict=True))
        skipped = {name: round(values.pop(name)) for name in self._skipped}
        shown = {}
        for key, value in values.items():
            missed = next(
                (num for name, num in skipped.items() if num and key.startswith(f"{name}/")), 0
            )
            if key not in self._sums:
                if math.isfinite(value) or not missed:
                    shown[key] = value
            elif self._counts[key] > missed:
                shown[key] = value / (self._counts[key] - missed)
        shown |= {f"{name}/skipped_steps": float(num) for name, num in skipped.items() if num}
        self._judge(skipped, shown, steps_done)
        if warmed_up:
            self._warn_of_collapse(shown)
        self._sums, self._counts, self._skipped, self._steps = {}, {}, {}, []
        return shown

    def check_divergence(self, steps_done: int) -> None:
        """Finds networks that have diverged, before a checkpoint.

        Averages the sums over ranks, because rank 0 writes them and all ranks resume from them.

        Raises:
            ValueError: as `close`.
        """
        if not self._sums:
            return
        keys = [*self._sums, *self._skipped]
        totals = distributed.mean(torch.stack([*self._sums.values(), *self._skipped.values()]))
        together = dict(zip(keys, totals, strict=True))
        values = dict(zip(keys, totals.tolist(), strict=True))
        self._sums = {key: together[key] for key in self._sums}
        skipped = {name: round(values[name]) for name in self._skipped}
        self._skipped = {name: together[name] for name in self._skipped}
        self._judge(skipped, {key: values[key] for key in self._sums}, steps_done, settled=True)
        for key in [
            key for key in self._sums for name in self._fleet.diverged if key.startswith(f"{name}/")
        ]:
            del self._sums[key], self._counts[key]

    def evaluated(self, results: Mapping[str, float], steps_done: int) -> dict[str, float]:
        """An evaluation's results on rank 0, without those of networks that it found diverged.

        Losses and gradients may be finite where features are not: an evaluation uses running
        statistics, and other images.

        Args:
            results: By <name>/<key>; those of ranks other than 0 do not count.
            steps_done: Steps before the evaluation.

        Raises:
            ValueError: as `close`.
        """
        shown = dict(distributed.gather_objects(dict(results))[0])
        if found := self._not_finite(shown):
            self._take_out(
                found, shown, steps_done, f"learning rate {self._lrs(found, steps_done)}"
            )
        return shown

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that `load` takes."""
        return {
            "sums": self._sums,
            "counts": self._counts,
            "skipped": self._skipped,
            "skipped_before": self._skipped_before,
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from a checkpoint."""
        self._sums = {key: total.to(device) for key, total in state["sums"].items()}
        self._skipped = {name: total.to(device) for name, total in state["skipped"].items()}
        self._counts, self._skipped_before = dict(state["counts"]), dict(state["skipped_before"])

    def _judge(
        self,
        skipped: Mapping[str, int],
        values: dict[str, float],
        steps_done: int,
        *,
        settled: bool = False,
    ) -> None:
        """Takes diverged networks out of training and `values`; logs which steps were skipped."""
        found: dict[str, list[str]] = {}
        for name, num in skipped.items():
            in_all = self._skipped_before[name] + num
            if not settled:
                self._skipped_before[name] = in_all
                if num:
                    log.warning(
                        "%s: %d steps skipped, whose gradients were not finite, %s",
                        name,
                        num,
                        self._samples(name),
                    )
            if in_all > self._max_skipped:
                found.setdefault(name, []).append(
                    f"{in_all} steps of {name} had gradients that are not finite"
                )
        for owner, reasons in self._not_finite(values).items():
            found.setdefault(owner, []).extend(reasons)
        if found:
            samples = "; ".join(self._samples(name) for name in found if name)
            last = newest_checkpoint(self._folder) or "none"
            details = (
                f"learning rate {self._lrs(found, steps_done)}; {samples}; "
                f"last good checkpoint: {last}"
            )
            self._take_out(found, values, steps_done, details)

    def _not_finite(self, values: Mapping[str, float]) -> dict[str, list[str]]:
        """Reasons to say that a network has diverged, by its name; "" = what networks share."""
        found: dict[str, list[str]] = {}
        for key, value in values.items():
            if not math.isfinite(value):
                networks = self._fleet.method.trainable
                owner = next((name for name in networks if key.startswith(f"{name}/")), "")
                found.setdefault(owner, []).append(f"{key} is {value}")
        return found

    def _lrs(self, names: Iterable[str], steps_done: int) -> str:
        """Learning rates in the last step, as words."""
        lrs = {name: self._fleet.lr(name, steps_done - 1) for name in names if name}
        return ", ".join(f"{name} {lr:.3g}" for name, lr in lrs.items())

    def _take_out(
        self,
        found: Mapping[str, list[str]],
        values: dict[str, float],
        steps_done: int,
        details: str,
    ) -> None:
        """Takes the networks in `found` out of training and `values`."""
        fleet = self._fleet
        names = [name for name in found if name]
        reasons = ", ".join(reason for one in found.values() for reason in one)
        text = (
            f"step {steps_done}: {reasons} ({details}); "
            "lower optimizer.lr or set optimizer.clip_grad_norm=1"
        )
        fleet.diverged |= {name: steps_done for name in names if name not in fleet.diverged}
        left = fleet.method.trainable.keys() - fleet.diverged.keys()
        if not left or not names:
            raise ValueError(text)
        log.error(
            "%s. Training of %s ends here, %d others go on", text, ", ".join(names), len(left)
        )
        for key in [key for key in values for name in names if key.startswith(f"{name}/")]:
            del values[key]

    def _samples(self, name: str) -> str:
        """The images in the first step that was skipped, as words."""
        flagged = [
            (step, indices)
            for step, indices, flags in self._steps
            if name in flags and bool(flags[name])
        ]
        if not flagged:
            return "in earlier steps"
        step, indices = flagged[0]
        more = ", ..." if len(indices) > _SHOWN_SAMPLES else ""
        shown = ", ".join(map(str, indices[:_SHOWN_SAMPLES].tolist()))
        return f"first step {step + 1} with images {shown}{more}"

    def _warn_of_collapse(self, shown: Mapping[str, float]) -> None:
        for name in self._fleet.method.trainable:
            std, rank = (
                shown.get(f"{name}/embedding_std", math.inf),
                shown.get(f"{name}/embedding_rank", math.inf),
            )
            if std >= COLLAPSED_STD and rank >= COLLAPSED_RANK:
                self._collapsed.discard(name)
            elif name not in self._collapsed:
                self._collapsed.add(name)
                log.warning(
                    "%s HAS COLLAPSED: it sees all images alike "
                    "(embedding std %.3g of 1, effective rank %.3g); "
                    "lower optimizer.lr, or check teacher and views",
                    name,
                    std,
                    rank,
                )
