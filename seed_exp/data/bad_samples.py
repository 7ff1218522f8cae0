"""The list of images that cannot be read, and the limit on their number."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from seed_exp.base.files import append_json
from seed_exp.base.fingerprints import same_images
from seed_exp.base.redaction import redact_all
from seed_exp.data.sources import Source

_NUM_SHOWN = 5  # bad images whose whole error is logged

log = logging.getLogger("seed_exp")


class BadSamples:
    """Counts and lists the images of a source that cannot be read and were replaced.

    An instance serves as `on_bad` of `load_batches`. Each bad image is one line of
    bad_samples.jsonl, {"source", "index", "key", "error"}. It counts once, even over several starts
    of a run and over all processes that share the folder. The sources of a run share the file;
    lines of another source, or of another state of this source, are skipped.

    Args:
        folder: Folder of the list.
        source: The source of the images.
        max_bad: Largest share of the source's images that may be bad, 0 to 1.
    """

    def __init__(self, folder: Path, source: Source, max_bad: float) -> None:
        self.file = folder / "bad_samples.jsonl"
        self._source, self._fingerprint = source, source.fingerprint()
        self._max_bad = max_bad
        self._known: set[int] = set()
        self._read = 0  # bytes of the list
        self._read_new_entries()

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, index: int, error: str) -> None:
        """Notes that image `index` cannot be read.

        Raises:
            ValueError: more images are bad than `max_bad` allows.
        """
        if index not in self._known:
            self._read_new_entries()
        if index not in self._known:
            self._known.add(index)
            entry = {
                "source": self._fingerprint,
                "index": index,
                "key": self._source.key(index),
                "error": error,
            }
            try:
                append_json(self.file, redact_all(entry))
            except OSError as failure:  # a full disk must not end a training
                log.warning("cannot write to %s: %s", self.file, failure.strerror)
            if len(self._known) <= _NUM_SHOWN:
                log.warning(
                    "the next good image takes the place of one that cannot be read: %s", error
                )
            elif len(self._known) == _NUM_SHOWN + 1:
                log.warning("further images that cannot be read are only listed in %s", self.file)
        if len(self._known) > self._max_bad * len(self._source):
            raise ValueError(
                f"{len(self._known)} of {len(self._source)} images cannot be read, more than "
                f"data.max_bad={self._max_bad:g} allows, the last: {error}. "
                f"The list is {self.file}; python -m seed_exp.verify finds all of them. "
                "Mend the data and delete the list, or raise data.max_bad"
            )

    def _read_new_entries(self) -> None:
        """Reads the entries that were added to the list since the last call.

        A line that was cut off when its writer was killed does not count.
        """
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]  # another process may be writing the next one
        self._read += len(lines)
        for line in lines.splitlines():
            try:
                entry = json.loads(line)
                if same_images(entry["source"], self._fingerprint):
                    self._known.add(int(entry["index"]))
            except (ValueError, TypeError, KeyError):
                continue
