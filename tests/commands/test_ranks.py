"""Several processes started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.slow
def test_an_error_in_one_rank_ends_all_and_says_which_it_was(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(64):
        Image.new("RGB", (32, 32), (3 * number, number, 0)).save(
            tmp_path / "pictures" / f"{number:03}.png"
        )
    (tmp_path / "pictures" / "040.png").write_bytes(b"broken")
    options = [
        "student=convnet_w2",
        "views=digits",
        "views.crops.global.num=2",
        "data=image_folder",
        "data.root=pictures",
    ]
    options += [
        "data.on_error=raise",
        "data.num_workers=1",
        "batch_size=16",
        "moco.queue_size=64",
        "epochs=3",
        "device=cpu",
    ]
    options += ["tracker=files"]
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "seed_exp.pretrain",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*line, *options],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        _, printed = process.communicate(timeout=120)  # it hangs for ten minutes if nobody notices
    assert process.returncode == 1
    ranks = [rank for rank in (0, 1) if f"error (rank {rank}): cannot decode image" in printed]
    assert len(ranks) == 1
    assert "040.png" in printed
    assert not [path for path in Path("/proc").glob("[0-9]*") if works_in(path, tmp_path)]


def works_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").resolve() == folder
    except OSError:  # it is gone, or somebody else's
        return False
