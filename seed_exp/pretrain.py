"""Train encoders without labels and without a teacher (MoCo-V2, arXiv:2003.04297): the baseline, and a way to make a teacher.

  python -m seed_exp.pretrain student=resnet18                                 images: the folder in SEED_DATA
  python -m seed_exp.pretrain student=resnet50 data=torchvision data.name=CIFAR10 data.download=true
  python -m seed_exp.distill student=resnet18 teacher=run teacher.checkpoint=runs/pretrain/NAME

The same command, typed again, goes on where the run was.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from seed_exp.config.command import command
from seed_exp.config.schema import PretrainConfig
from seed_exp.data.sources import Source
from seed_exp.evaluations import plan_evaluations, run_evaluations
from seed_exp.methods.moco import Moco
from seed_exp.training import Built, OpenFolder, build_students, init_inputs, train_encoders


def pretrain(config: PretrainConfig) -> Path:
    """Trains and evaluates the students of `config`; returns the run folder."""
    evaluations = plan_evaluations(config)
    label = "-".join(["+".join(config.students), "moco_v2", config.views.name, config.data.source])
    return train_encoders("pretrain", label, config, build, then=partial(run_evaluations, evaluations))


def build(config: PretrainConfig, train: Source, open_folder: OpenFolder) -> Built:  # noqa: ARG001
    """The students and their contrastive training."""
    students, weights = build_students(config, config.embedding_dim), init_inputs(config.students)
    return Built(open_folder(weights), students, Moco(students, config.moco, config.seed), weights, [])


main = command(pretrain)

if __name__ == "__main__":
    main()
