"""Distil a self-supervised teacher into one or several small students.

  python -m seed_exp.distill student=efficientnet_b1 teacher=swav_r50
      # images: the folder in SEED_DATA
  python -m seed_exp.distill student=resnet18 teacher=moco_v2_r50 \\
      data.root=/data/imagenet epochs=200
  python -m seed_exp.distill 'student=[resnet18,efficientnet_b0]' \\
      views=swav_multicrop teacher=swav_r50w2
      # a fleet: one pass of images and teacher trains all of them
  python -m seed_exp.distill student=resnet34 teacher_cache=/scratch/cache
      # keeps the teacher's embeddings for later students
  torchrun --nproc-per-node=8 -m seed_exp.distill ...
      # several GPUs for one run; batch_size is that of all processes together
  python -m seed_exp.distill -m student=resnet18,resnet34
      # one run after another

The method is SEED (arXiv:2101.04731): the teacher is frozen, the images need no
labels. The same command, typed again, goes on where the run was.

Small sets need more epochs. For fewer than 100,000 images LightlyTrain's
documentation recommends 200 to 2,000, for distillation up to 10,000. With a few
thousand images, students still gain after thousands of epochs
(arXiv:2106.05237). The command says when a training is shorter.
"""

from __future__ import annotations

from pathlib import Path

from seed_exp.config.command import command
from seed_exp.config.schema import DistillConfig
from seed_exp.python.callable_module import make_callable


def distill(config: DistillConfig) -> Path:
    """Trains and evaluates students of a frozen teacher; returns the run folder."""
    # Late: --help and errors of options need no torch.
    from seed_exp.training.distillation import distill as run

    return run(config)


main = command("distill", distill, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
