"""A run: its folder, locked and logged to, and what every training in it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch

from seed_exp.base.files import remove_unfinished
from seed_exp.config.options import to_plain
from seed_exp.config.schema import DataConfig, FitConfig, OnError, Precision
from seed_exp.data.bad_samples import BadSamples
from seed_exp.data.loader import default_num_workers
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.engine.determinism import algorithms
from seed_exp.engine.run_folder import claim_folder, folder_of, log_to, run_lock
from seed_exp.engine.tracking import RunFacts, Tracker, build_tracker

C = TypeVar("C", bound=FitConfig)
C_co = TypeVar("C_co", bound=FitConfig, covariant=True)
BadSamplesOf = Callable[[Source], BadSamples]
"""Makes the list of a source's images that cannot be read."""


@dataclass
class Run(Generic[C_co]):
    """A run of `command`, from `open_run`."""

    command: str
    label: str
    """Readable beginning of the folder's name."""
    config: C_co
    folder: Path
    inputs: Mapping[str, str]
    """Fingerprints of what the run reads, by name."""
    device: torch.device
    num_workers: int
    """Processes that prepare views."""
    bad_samples: BadSamplesOf | None
    """Lists unreadable images in the folder; None = such an image is an error."""
    formats: Mapping[str, Precision] = field(default_factory=dict)
    """Networks with a number format of their own, by their names in base.network_names."""
    tracker: Tracker = field(default_factory=Tracker)
    """Takes metrics and pictures; one that drops them, outside of `tracked`."""

    @contextmanager
    def tracked(
        self, networks: Sequence[str], weights: Mapping[str, Path] | None = None
    ) -> Iterator[Tracker]:
        """Sends what is logged to the tracker of the options, until the context ends.

        Args:
            networks: Names of the networks that are trained.
            weights: Files in which checkpoints leave them, by name.
        """
        options = to_plain(self.config)
        facts = RunFacts(self.command, self.label, networks, options, weights or {})
        with build_tracker(self.folder, self.config.tracker, facts) as tracker:
            self.tracker = tracker
            try:
                yield tracker
            finally:
                self.tracker = Tracker()


@contextmanager
def open_run(
    command: str,
    label: str,
    config: C,
    inputs: dict[str, str],
    device: torch.device,
    root: Path | None = None,
    formats: Mapping[str, Precision] | None = None,
) -> Iterator[Run[C]]:
    """A run in its folder, which is made if absent and closed to other processes meanwhile.

    Args:
        command: Name of the command.
        label: Readable beginning of the folder's name.
        config: All options.
        inputs: Fingerprints of what the run reads, by name; together with the options that change
            results they name the folder.
        device: Where to train.
        root: The folder in which it is, unless `config.run_dir` names it; None = runs/<command>.
        formats: Number formats that a new run's networks get on this CPU; the first rank's count,
            and those of an earlier run.

    Raises:
        ValueError: another process has opened it, or it is of a run with other options.
    """
    folder = folder_of(command, label, config, inputs, root or Path("runs") / command)
    with ExitStack() as until_closed:
        until_closed.enter_context(algorithms(deterministic=config.deterministic))
        with distributed.rank0_first():
            folder.mkdir(parents=True, exist_ok=True)
            # Before config.json is read or written: two commands must not both find it absent.
            if until_closed.enter_context(run_lock(folder)):
                for place in (folder / "checkpoints", folder / "students"):
                    remove_unfinished(place)
            kept = claim_folder(folder, command, config, inputs, formats)
        until_closed.enter_context(log_to(folder))
        bad_samples = list_bad_samples(config.data, folder)
        num_workers = num_workers_of(config.data)
        # The first rank's, because others may run on other CPUs. A GPU has its own rule.
        kept = distributed.gather_objects(kept)[0] if device.type == "cpu" else {}
        yield Run(command, label, config, folder, inputs, device, num_workers, bad_samples, kept)


def list_bad_samples(config: DataConfig, folder: Path) -> BadSamplesOf | None:
    """Function from a source to the list of its unreadable images, which is kept in `folder`.

    None if `config` makes such an image an error at once.
    """
    if config.on_error is not OnError.skip:
        return None
    lists: dict[
        str, BadSamples
    ] = {}  # what training and evaluation read of the same source counts once

    def list_of(source: Source) -> BadSamples:
        return lists.setdefault(source.fingerprint(), BadSamples(folder, source, config.max_bad))

    return list_of


def num_workers_of(config: DataConfig) -> int:
    """Worker processes per rank: as asked for, or this rank's share of the machine."""
    if config.num_workers is not None:
        return config.num_workers
    return default_num_workers(distributed.local_world_size())
