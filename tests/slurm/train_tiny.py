"""A task of a step: `srun python train_tiny.py FOLDER` trains.

Without batch norm, which would see each rank's images only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny
import torch

from seed_exp.engine import distributed


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        method = tiny.seed(["a", "b"], bn=False)
        tiny.train(method, folder)
        name = (
            f"rank {distributed.rank()} of {distributed.world_size()}, "
            f"{distributed.local_world_size()} on its node"
        )
        torch.save(
            {"weights": tiny.weights(method), "node": os.environ.get("SLURMD_NODENAME")},
            folder / f"{name}.pt",
        )


if __name__ == "__main__":
    main()
