"""Distil a frozen self-supervised teacher into one or several small students, with unlabelled images (SEED, arXiv:2101.04731).

  python -m seed_exp.distill student=efficientnet_b1 teacher=swav_r50          images: the folder in SEED_DATA
  python -m seed_exp.distill student=resnet18 teacher=moco_v2_r50 data.root=/data/imagenet epochs=200
  python -m seed_exp.distill 'student=[resnet18,efficientnet_b0]' views=swav_multicrop teacher=swav_r50w2
                                                  a fleet: one pass of images and teacher trains all of them
  torchrun --nproc-per-node=8 -m seed_exp.distill ...                          batch_size is that of all processes together

The same command, typed again, goes on where the run was. Several GPUs: torchrun. A sweep: -m student=resnet18,resnet34.
"""

from __future__ import annotations

from pathlib import Path

from seed_exp.config.command import command
from seed_exp.config.schema import DistillConfig
from seed_exp.engine.fit import Method
from seed_exp.methods.seed import Seed
from seed_exp.models.students import Student
from seed_exp.models.teachers import build_teacher
from seed_exp.training import build_students, train_encoders


def distill(config: DistillConfig) -> Path:
    """Trains the students of `config`; returns the run folder."""
    label = "-".join(["+".join(config.students), config.teacher.name, config.views.name, config.data.source])
    return train_encoders("distill", label, config, build)


def build(config: DistillConfig) -> tuple[dict[str, Student], Method]:
    """The students and their distillation from the teacher."""
    teacher = build_teacher(config.teacher, config.teacher_ssl.name)
    students = build_students(config.students, teacher.embedding_dim, config.seed)
    resolutions = [name for name, crop in config.views.crops.items() if crop.num > 0]
    return students, Seed(students, teacher, config.objective, resolutions, config.seed)


main = command(distill)

if __name__ == "__main__":
    main()
