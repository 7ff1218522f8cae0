"""Distil a frozen self-supervised teacher into one or several small students, with unlabelled images (SEED, arXiv:2101.04731).

  python -m seed_exp.distill student=efficientnet_b1 teacher=swav_r50          images: the folder in SEED_DATA
  python -m seed_exp.distill student=resnet18 teacher=moco_v2_r50 data.root=/data/imagenet epochs=200
  python -m seed_exp.distill 'student=[resnet18,efficientnet_b0]' views=swav_multicrop teacher=swav_r50w2
                                                  a fleet: one pass of images and teacher trains all of them
  python -m seed_exp.distill student=resnet34 teacher_cache=/scratch/cache     keeps the teacher's embeddings for later students
  torchrun --nproc-per-node=8 -m seed_exp.distill ...                          batch_size is that of all processes together

The same command, typed again, goes on where the run was. Several GPUs: torchrun. A sweep: -m student=resnet18,resnet34.
"""

from __future__ import annotations

import math
from pathlib import Path

from seed_exp import __version__
from seed_exp.config.command import command
from seed_exp.config.schema import DistillConfig
from seed_exp.data.sources import Source
from seed_exp.engine.distributed import local_device
from seed_exp.engine.precision import resolve
from seed_exp.engine.run_folder import to_plain
from seed_exp.evaluation.frozen import eval_options
from seed_exp.methods.seed import Seed
from seed_exp.methods.teacher_cache import TeacherCache
from seed_exp.models.cost import forward_flops
from seed_exp.models.students import Student
from seed_exp.models.teachers import Teacher, build_teacher
from seed_exp.training import Built, build_students, init_inputs, train_encoders


def distill(config: DistillConfig) -> Path:
    """Trains the students of `config`; returns the run folder."""
    label = "-".join(["+".join(config.students), config.teacher.name, config.views.name, config.data.source])
    return train_encoders("distill", label, config, build)


def build(config: DistillConfig, train: Source) -> Built:
    """The students and their distillation from the teacher.

    Raises:
        ValueError: the views are not normalised as the teacher's images were, or the teacher cache is of something else.
    """
    teacher = build_teacher(config.teacher, config.teacher_ssl.name)
    if teacher.normalisation != (config.views.mean, config.views.std):
        raise ValueError(
            f"teacher={config.teacher.name} was trained on images with mean and std {teacher.normalisation}, but "
            f"views={config.views.name} normalises with {config.views.mean} and {config.views.std}; choose the views that it saw"
        )
    teacher.fold_batch_norm()
    students = build_students(config.students, teacher.embedding_dim, config.seed)
    num_views = {name: crop.num for name, crop in config.views.crops.items() if crop.num > 0}
    cache = None if config.teacher_cache is None else open_cache(Path(config.teacher_cache), config, teacher, train, num_views)
    method = Seed(students, teacher, config.objective, num_views, config.seed, cache)
    inputs = {"teacher": teacher.fingerprint, **init_inputs(config.students)}
    return Built(students, method, inputs, [] if cache is None else [cache_costs(cache, config, students, teacher, train)])


def open_cache(folder: Path, config: DistillConfig, teacher: Teacher, train: Source, num_views: dict[str, int]) -> TeacherCache:
    """The cache in `folder` for exactly these embeddings; errors as TeacherCache."""
    evaluation = eval_options(config.views).keys() - {"mean", "std"}
    key = {
        "teacher": teacher.fingerprint,
        "teacher_ssl": config.teacher_ssl.name,
        "data": train.fingerprint(),
        "views": {name: value for name, value in to_plain(config.views).items() if name not in evaluation},
        "seed": config.seed,
        "precision": resolve(config.precision, local_device(config.device)).value,
        "version": __version__,
    }
    return TeacherCache(folder, key, num_images=len(train), num_views=num_views, embedding_dim=teacher.embedding_dim)


def cache_costs(cache: TeacherCache, config: DistillConfig, students: dict[str, Student], teacher: Teacher, train: Source) -> str:
    """What the cache takes and saves, in words; errors as TeacherCache.describe."""
    crops = [crop for crop in config.views.crops.values() if crop.num > 0]
    forward = sum(crop.num * forward_flops(teacher, crop.size) for crop in crops)
    # A backward pass costs about two forward passes.
    training = sum(3 * crop.num * forward_flops(student, crop.size) for crop in crops for student in students.values())
    steps_per_epoch = max(1, len(train) // config.batch_size) if isinstance(config.batch_size, int) else 1
    epochs = config.epochs if config.steps is None else math.ceil(config.steps / steps_per_epoch)
    return f"{cache.describe(epochs)}; what it holds saves {100 * forward / (forward + training):.0f} % of a step's arithmetic"


main = command(distill)

if __name__ == "__main__":
    main()
