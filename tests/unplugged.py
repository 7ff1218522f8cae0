"""An evaluation that trains, interrupted by a disk that gives no more images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny


def assert_goes_on_bit_for_bit(
    evaluate: Callable[[list[str]], object],
    source: type,
    num_images: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checks three steps in the run folder `cut`, of which two were made before the interruption.

    Args:
        evaluate: Runs the command with these options, besides its own.
        source: Class of the images, whose method `image` is interrupted.
        num_images: Images that can be read before that.
        monkeypatch: Of the test.
    """
    options = ["checkpoint_every=1", "data.on_error=raise"]
    evaluate([*options, "run_dir=whole"])
    image, left = source.image, [num_images]

    def read(self: Any, index: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("unplugged")
        return image(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(source, "image", read)
        with pytest.raises(ValueError, match="unplugged"):
            evaluate([*options, "run_dir=cut"])
    cut, whole = Path("cut"), Path("whole")
    assert (cut / "checkpoints" / "step_00000002.pt").exists()
    evaluate([*options, "run_dir=cut"])
    assert "resuming after step 2 of 3" in (cut / "log.txt").read_text()
    tiny.assert_same(tiny.last_checkpoint(cut), tiny.last_checkpoint(whole))
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
