"""Writes what a run logs as event files of TensorBoard, as `engine.follower` says.

Called as `python -m seed_exp.engine.tensorboard_process FOLDER`. Files are in
FOLDER/tensorboard/STUDENT, a new one for each process. A step is one record: it is there as a
whole or not at all.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from seed_exp.base.table import markdown_table
from seed_exp.config.options import flatten
from seed_exp.engine.follower import StudentRun, Trainer, run_folder, send_all

_TIME = re.compile(r"events\.out\.tfevents\.(\d+)")


class TensorboardRun(StudentRun):
    """The event files of a student."""

    def __init__(
        self, student: str, about: Mapping[str, Any], folder: Path, training: Trainer
    ) -> None:
        super().__init__(student, about, folder, training)
        self._place = folder / "tensorboard" / student
        self.delivered = last_step(self._place)

    def begin(self) -> int:
        """Opens a new file, which holds the options if it is the first one."""
        self._place.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in self._place.iterdir()]
        times = [int(found[1]) for name in names if (found := _TIME.match(name))]
        # TensorBoard reads files in the order of their names, and none that comes too late.
        now = max([int(time.time()), *(one + 1 for one in times)])
        name = f"events.out.tfevents.{now:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = (self._place / name).open("xb", buffering=0)
        self._add(Event(file_version="brain.Event:2"))
        if self.delivered < 0:
            options = {"student": self.student, **flatten(self.about["config"])}
            known = {name: _plain(value) for name, value in options.items()}
            self._add(Event(summary=hparams_pb(known, trial_id=self.about["names"][self.student])))
        return self.delivered

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes one record."""
        values = [one for key, value in row.items() for one in self._values(key, value)]
        self._add(Event(step=step, summary=Summary(value=values)))

    def write_weights(self, path: Path) -> None:
        """Does nothing: TensorBoard takes no files, and the run folder has them."""

    def end(self, status: int) -> None:  # noqa: ARG002
        """Leaves the file on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        # At once, and not by a buffer: it might write the rest later, when the step is repeated.
        if self._file.write(record.getbuffer()) < record.tell():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file.name))

    def _values(self, key: str, value: Any) -> Iterator[Summary.Value]:
        if not isinstance(value, dict):
            yield Summary.Value(tag=key, simple_value=value)
        elif "picture" in value:
            path = self.picture(value)
            with Image.open(path) as image:
                width, height = image.size
            picture = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
            )
            yield Summary.Value(tag=key, image=picture)
        else:
            rows = [[str(cell) for cell in row] for row in value["rows"]]
            yield from text_pb(key, markdown_table(value["columns"], rows)).value


def last_step(place: Path) -> int:
    """The last step in the event files of a folder, up to where one was torn; -1 = none."""
    steps = [-1]
    for path in sorted(place.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            if any(value.tag != SESSION_START_INFO_TAG for value in event.summary.value):
                steps.append(event.step)
    return max(steps)


def _plain(value: Any) -> str | float | bool:
    return value if isinstance(value, str | float | bool | int) else json.dumps(value)


def main() -> None:
    """Follows the run folder until its training has ended."""
    send_all(run_folder(), "tensorboard", TensorboardRun)


if __name__ == "__main__":
    main()
