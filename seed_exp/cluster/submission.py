"""Submitting cells: where they are to run, the script of that, and who starts it."""

from __future__ import annotations

import datetime
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seed_exp.base.files import atomic_write
from seed_exp.cluster import local, slurm_tools
from seed_exp.cluster.script import Places, local_script, slurm_script
from seed_exp.cluster.snapshot import git_state, snapshot_name, take_snapshot
from seed_exp.cluster.sweep_cells import Attempt
from seed_exp.cluster.sweeps import Sweep


@dataclass(frozen=True)
class Request:
    """Where cells are to run, from a command line; parts that it leaves out are None or empty."""

    launcher: str | None
    """Name of a profile."""
    options: list[str]
    """Options of the profile, as overrides: hydra.launcher.partition=gpu."""
    parallel: int | None
    """Cells that run at once."""
    gpus: int | None
    """On this machine: GPUs, and processes, of each cell."""

    def completed_from(self, before: Request) -> Request:
        """This request, completed from `before` unless that had another launcher."""
        if self.launcher not in (None, before.launcher):
            return self
        own = {option.partition("=")[0].lstrip("+") for option in self.options}
        others = [
            option for option in before.options if option.partition("=")[0].lstrip("+") not in own
        ]
        gpus = before.gpus if self.gpus is None else self.gpus
        return Request(
            before.launcher, [*others, *self.options], self.parallel or before.parallel, gpus
        )


@dataclass(frozen=True)
class Submission:
    """Cells that are started together: a job array of SLURM, or a process of this machine.

    Args:
        home: The folder of sweeps.
        sweep: The sweep of the cells.
        numbers: Numbers of the cells.
        request: Where they are to run, with a launcher.
        profile: The launcher's options.
        code: The folder that is copied, for the jobs to run from.

    Raises:
        ValueError: the request is for this machine, the launcher for SLURM.
    """

    home: Path
    sweep: Sweep
    numbers: list[int]
    request: Request
    profile: Mapping[str, Any]
    code: Path

    def __post_init__(self) -> None:
        if self.on_slurm and self.request.gpus is not None:
            option = f"hydra.launcher.gpus_per_node={self.request.gpus}"
            raise ValueError(f"--gpus is for --launcher local; of a job of SLURM it is {option}")

    @property
    def on_slurm(self) -> bool:
        """Whether SLURM runs the cells."""
        return str(self.profile["_target_"]).endswith("SlurmLauncher")

    @cached_property
    def script(self) -> Path:
        """Path of the script."""
        return self.home / self.sweep.name / f"{len(self.sweep.submissions) + 1:03}.sh"

    @cached_property
    def snapshot(self) -> Path:
        """Folder for the copy of the code, named after its content.

        Found once, so that script and copy agree.
        """
        return self.home / "snapshots" / snapshot_name(self.code)

    def text(self) -> str:
        """Text of the script; errors as `sbatch_options`."""
        logs = self.home / self.sweep.name / "logs"
        places = Places(Path(sys.executable), self.snapshot.resolve(), logs.resolve(), Path.cwd())
        cells = [self.sweep.cells[number] for number in self.numbers]
        if not self.on_slurm:
            return local_script(cells, places, tasks=max(1, self.request.gpus or 0))
        return slurm_script(
            cells,
            places,
            options={"job-name": self.sweep.name, **slurm_tools.sbatch_options(self.profile)},
            parallel=self.request.parallel or self.profile["array_parallelism"],
            setup=self.profile["setup"] or [],
            srun=self.profile.get("srun_args") or [],
        )

    def start(self) -> str:
        """Copies the code, writes and starts the script, records it in the sweep.

        Returns:
            Name of the job.

        Raises:
            ValueError: fewer GPUs are here than asked for, or as `sbatch` and `local.start`.
        """
        if not self.on_slurm:
            self._count_gpus()
        text, git = self.text(), git_state(self.code)  # what can fail, before anything runs
        take_snapshot(self.code, self.snapshot)
        (self.script.parent / "logs").mkdir(parents=True, exist_ok=True)
        with atomic_write(self.script) as file:
            file.write(text.encode())
        if self.on_slurm:
            job = slurm_tools.sbatch(self.script)
        else:
            job, parallel = f"{local.PREFIX}{secrets.token_hex(3)}", self.request.parallel or 1
            gpus = self.request.gpus or 0
            local.start(
                self.script.resolve(),
                job,
                num_cells=len(self.numbers),
                parallel=parallel,
                gpus=gpus,
            )
        self._record(job, git)
        return job

    def _count_gpus(self) -> None:
        import torch  # takes seconds, and nothing else here needs it

        gpus, parallel, seen = (
            self.request.gpus or 0,
            self.request.parallel or 1,
            torch.cuda.device_count(),
        )
        if gpus * parallel > seen:
            raise ValueError(
                f"{gpus * parallel} GPUs are needed for what --gpus and --parallel ask for, "
                f"{seen} are here; ask for fewer"
            )
        if gpus == 0 and parallel > 1 and seen > 0:
            print(
                f"note: the {parallel} cells that run at once share one GPU; "
                "--gpus 1 gives each its own"
            )

    def _record(self, job: str, git: dict[str, str | None]) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        cells = [self.sweep.cells[number][1] for number in self.numbers]
        for task, cell in enumerate(cells):
            cell.attempts.append(
                Attempt(f"{job}_{task}", f"{self.sweep.name}/logs", now, self.snapshot.name)
            )
        facts: dict[str, Any] = {
            "job": job,
            "script": self.script.name,
            "time": now,
            "snapshot": self.snapshot.name,
        }
        facts |= {"git": git, "cells": [cell.id for cell in cells], "request": asdict(self.request)}
        self.sweep.submissions.append(facts)
