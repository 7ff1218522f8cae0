"""Train encoders without labels and without a teacher (MoCo-V2).

  python -m seed_exp.pretrain student=resnet18
      # images: the folder in SEED_DATA
  python -m seed_exp.pretrain student=resnet50 data=torchvision \\
      data.name=CIFAR10 data.download=true
  python -m seed_exp.distill student=resnet18 teacher=run \\
      teacher.checkpoint=runs/pretrain/NAME
      # the trained encoder as a teacher

This is the baseline of SEED's tables (arXiv:2003.04297), and a way to make a
teacher. The same command, typed again, goes on where the run was.

Small sets need more epochs: for fewer than 100,000 images LightlyTrain's
documentation recommends 200 to 2,000. The command says when a training is
shorter.
"""

from __future__ import annotations

from pathlib import Path

from seed_exp.config.command import command
from seed_exp.config.schema import PretrainConfig
from seed_exp.python.callable_module import make_callable


def pretrain(config: PretrainConfig) -> Path:
    """Trains and evaluates encoders without a teacher; returns the run folder."""
    # Late: --help and errors of options need no torch.
    from seed_exp.training.pretraining import pretrain as run

    return run(config)


main = command("pretrain", pretrain, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
