"""What every job of a sweep will cost, from a minute of measuring on this machine: img/s, GPU memory, GPU-hours, disk.

  python -m seed_exp.plan table1_moco_v2_r50                               a file in experiments/; images: the folder in SEED_DATA
  python -m seed_exp.plan table1_moco_v2_r50 seed=0,1,2 --gpus 8 --images 1281167
  python -m seed_exp.plan student=resnet18,resnet34 views=swav_multicrop   any options of distill, swept as by its -m
  python -m seed_exp.plan student=resnet18,resnet34 --command pretrain

Each different kind of training step is made a few times, with random weights on synthetic images. No checkpoint is needed and
nothing is downloaded.
"""

from __future__ import annotations


def main() -> None:
    """Reads the command line and acts."""
    from seed_exp.tools.plan import main as run  # late: whoever lists the commands needs none of it

    run(__doc__)


if __name__ == "__main__":
    main()
