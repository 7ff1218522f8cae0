"""Image files that a data set lists, for sources with more than labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.data.decode import decode


class ListedImages:
    """Image files in the order of a list: everything of a source but its fingerprint.

    Args:
        files: The image files [n].
    """

    labels: NDArray[np.int64] | None = None

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]; a ValueError if it cannot be read."""
        return decode(self.encoded(index), str(self.files[index]))

    def encoded(self, index: int) -> bytes:
        """The file of image `index`."""
        try:
            return self.files[index].read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read image {self.files[index]}: {error.strerror}") from error

    def key(self, index: int) -> str:
        """The last two parts of the image's path."""
        return "/".join(self.files[index].parts[-2:])


def listed_in(path: Path, kind: str, root: Path) -> str:
    """The text of a file that a data set consists of.

    Args:
        path: The file.
        kind: Folder below `root` in which such files are, for the error.
        root: data.root.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(
            f"cannot read {path} ({reason}); "
            f"data.root={root} should be the folder that holds {kind}"
        ) from None
