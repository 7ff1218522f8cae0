"""Estimate what each job of a sweep will cost, before it starts.

  python -m seed_exp.plan table1_moco_v2_r50
      # a file of experiments/; images: the folder in SEED_DATA
  python -m seed_exp.plan table1_moco_v2_r50 seed=0,1,2 --gpus 8 \\
      --images 1281167
  python -m seed_exp.plan student=resnet18,resnet34 views=swav_multicrop
      # any options of distill, swept as with its -m
  python -m seed_exp.plan student=resnet18,resnet34 --command pretrain

Prints images per second, GPU memory, GPU-hours and disk, from a minute of
measuring on this machine. A few training steps of each different kind are made,
with random weights on synthetic images. No checkpoint is needed and nothing is
downloaded.
"""

from __future__ import annotations


def main() -> None:
    """Reads the command line and acts."""
    # Late: whoever lists the commands needs none of it.
    from seed_exp.tools.plan import main as run

    run(__doc__)


if __name__ == "__main__":
    main()
