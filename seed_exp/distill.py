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
from seed_exp.methods.seed import Seed
from seed_exp.models.teachers import build_teacher
from seed_exp.training import Built, build_students, init_inputs, train_encoders


def distill(config: DistillConfig) -> Path:
    """Trains the students of `config`; returns the run folder."""
    label = "-".join(["+".join(config.students), config.teacher.name, config.views.name, config.data.source])
    return train_encoders("distill", label, config, build)


def build(config: DistillConfig) -> Built:
    """The students and their distillation from the teacher.

    Raises:
        ValueError: the views are not normalised as the teacher's images were.
    """
    teacher = build_teacher(config.teacher, config.teacher_ssl.name)
    if teacher.normalisation != (config.views.mean, config.views.std):
        raise ValueError(
            f"teacher={config.teacher.name} was trained on images with mean and std {teacher.normalisation}, but "
            f"views={config.views.name} normalises with {config.views.mean} and {config.views.std}; choose the views that it saw"
        )
    students = build_students(config.students, teacher.embedding_dim, config.seed)
    resolutions = [name for name, crop in config.views.crops.items() if crop.num > 0]
    inputs = {"teacher": teacher.fingerprint, **init_inputs(config.students)}
    return Built(students, Seed(students, teacher, config.objective, resolutions, config.seed), inputs)


main = command(distill)

if __name__ == "__main__":
    main()
