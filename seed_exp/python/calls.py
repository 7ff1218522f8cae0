"""The commands as functions: the same options, checked in the same way, and results as objects.

An option has the name that it has on the command line. A dot becomes a dictionary, or the whole
name is given in one: `optimizer={"lr": 0.1}` or `**{"optimizer.lr": 0.1}`.
`python -m seed_exp.COMMAND --help` lists all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from seed_exp.base import slurm
from seed_exp.config.from_python import composed
from seed_exp.python.results import (
    EmbeddedImages,
    Evaluation,
    ExportedNetworks,
    Report,
    TrainedRun,
)

T = TypeVar("T")
PathLike = str | os.PathLike[str]
"""A path; also what `distill` and `pretrain` return."""


def distill(
    *,
    student: str | Sequence[str] | None = None,
    teacher: str | None = None,
    data: PathLike | None = None,
    **options: Any,
) -> TrainedRun:
    """Trains students of a frozen teacher, or goes on where the same call was interrupted.

    Args:
        student: A student or several: "resnet18", "timm/NAME", ["resnet18", "resnet34"].
        teacher: A teacher, such as "moco_v2_r50".
        data: A folder of images, or the name of a data source such as "tsv".
        options: Any other option of `python -m seed_exp.distill`.

    Raises:
        ValueError: an option does not exist or has a wrong value, images or weights are absent, or
            the training failed; as the command says it.

    Examples:
        >>> run = seed_exp.distill(
        ...     student="convnet_w2", teacher="run", data="digits", views="digits", tracker="files",
        ...     steps=2, batch_size=32, objective={"queue_size": 64},
        ...     **{"teacher.checkpoint": teacher, "data.num_workers": 0})
        >>> run.students
        {'convnet_w2': PosixPath('runs/distill/.../students/convnet_w2.safetensors')}
        >>> run.metrics[-1]["step"]
        2
        >>> seed_exp.distill(studnet="convnet_w2")
        Traceback (most recent call last):
            ...
        ValueError: no option 'studnet'; did you mean 'student'? Known: ...
    """
    config = composed("distill", _given(options, student, teacher, data))
    # Late: errors of options need no torch.
    from seed_exp.training.distillation import distill as run

    return TrainedRun(_call("distill", run, config))


def pretrain(
    *, student: str | Sequence[str] | None = None, data: PathLike | None = None, **options: Any
) -> TrainedRun:
    """Trains students without a teacher (MoCo-V2), or goes on where the same call was interrupted.

    Args:
        student: As in `distill`.
        data: As in `distill`.
        options: Any other option of `python -m seed_exp.pretrain`.

    Raises:
        ValueError: as `distill`.
    """
    config = composed("pretrain", _given(options, student, None, data))
    from seed_exp.training.pretraining import pretrain as run

    return TrainedRun(_call("pretrain", run, config))


def knn(run: PathLike, **options: Any) -> Evaluation:
    """Classifies validation images by their nearest training images, on frozen features.

    Args:
        run: A run folder, a student's file, or what `distill` returned.
        options: Any other option of `python -m seed_exp.knn`. Images are by default those of the
            run.

    Raises:
        ValueError: as the command says it.

    Examples:
        >>> result = seed_exp.knn(run, ks=[10])
        >>> sorted(result.numbers["convnet_w2"])
        ['knn10_majority', 'knn10_weighted']
        >>> result.protocol["ks"]
        [10]
    """
    config = composed("knn", {"run": run, **options})
    from seed_exp.protocols.knn import knn as measure

    return _evaluation("knn", measure, config)


def retrieval(run: PathLike, **options: Any) -> Evaluation:
    """Searches a gallery for images of each validation image's class, by frozen features.

    Arguments and errors are those of `knn`.

    Examples:
        >>> result = seed_exp.retrieval(run, gallery="val", ks=[1, 5])
        >>> list(result.numbers["convnet_w2"])
        ['map', 'recall1', 'recall5']
    """
    config = composed("retrieval", {"run": run, **options})
    from seed_exp.protocols.retrieval import retrieval as measure

    return _evaluation("retrieval", measure, config)


def linear(run: PathLike, **options: Any) -> Evaluation:
    """Trains a linear classifier on frozen features; arguments and errors as those of `knn`."""
    config = composed("linear", {"run": run, **options})
    from seed_exp.protocols.linear import linear as measure

    return _evaluation("linear", measure, config)


def finetune(run: PathLike, **options: Any) -> Evaluation:
    """Fine-tunes a copy of each encoder on labels; arguments and errors as those of `knn`."""
    config = composed("finetune", {"run": run, **options})
    from seed_exp.protocols.finetune import finetune as measure

    return _evaluation("finetune", measure, config)


def detect(run: PathLike, **options: Any) -> Evaluation:
    """Trains object detectors on the encoders; arguments and errors as those of `knn`."""
    config = composed("detect", {"run": run, **options})
    from seed_exp.protocols.detect import detect as measure

    return _evaluation("detect", measure, config)


def segment(run: PathLike, **options: Any) -> Evaluation:
    """Trains classifiers of pixels on frozen maps; arguments and errors as those of `knn`."""
    config = composed("segment", {"run": run, **options})
    from seed_exp.protocols.segment import segment as measure

    return _evaluation("segment", measure, config)


def embed(run: PathLike, *, data: PathLike | None = None, **options: Any) -> EmbeddedImages:
    """Writes the features of all images of a source into one file.

    Args:
        run: As in `knn`.
        data: As in `distill`; by default the images of the run.
        options: Any other option of `python -m seed_exp.embed`.

    Raises:
        ValueError: as the command says it.

    Examples:
        >>> seed_exp.embed(run, output="features.npz").file
        PosixPath('features.npz')
    """
    config = composed("embed", {"run": run, **_given(options, None, None, data)})
    from seed_exp.tools.embed import duplicates_file
    from seed_exp.tools.embed import embed as write

    _call("embed", write, config)
    return EmbeddedImages(
        Path(config.output),
        None if config.gallery is None else Path(config.gallery),
        None if config.duplicates is None else duplicates_file(config),
    )


def export(run: PathLike, *, data: PathLike | None = None, **options: Any) -> ExportedNetworks:
    """Writes the students of a run for timm, torchvision and others, checked, with a model card.

    Args:
        run: As in `knn`.
        data: As in `distill`: images on which the files are tried; by default those of the run.
        options: Any other option of `python -m seed_exp.export`.

    Raises:
        ValueError: as the command says it.
    """
    config = composed("export", {"run": run, **_given(options, None, None, data)})
    from seed_exp.tools.export import export as write
    from seed_exp.tools.export import output_folder

    errors = _call("export", write, config)
    return ExportedNetworks({name: output_folder(config) / name for name in errors}, errors)


def report(**options: Any) -> Report:
    """Writes a page and tables of runs, beside published numbers.

    Args:
        options: Any option of `python -m seed_exp.report`, such as runs=["runs"].

    Raises:
        ValueError: as the command says it.

    Examples:
        >>> seed_exp.report(output="report").page
        PosixPath('report/index.html')
    """
    config = composed("report", options)
    from seed_exp.tools.report import report as write

    page = _call("report", write, config)
    return Report(page, page.with_name("table.csv"))


def _evaluation(command: str, measure: Callable[[Any], Any], config: Any) -> Evaluation:
    numbers = _call(command, measure, config)
    return Evaluation(command, dict(numbers), numbers.file)


def _given(
    options: Mapping[str, Any],
    student: str | Sequence[str] | None,
    teacher: str | None,
    data: PathLike | None,
) -> dict[str, Any]:
    """All options; None = the command's default."""
    chosen = {"student": student, "teacher": teacher, "data": data}
    return {name: value for name, value in chosen.items() if value is not None} | dict(options)


def _call(command: str, run: Callable[[Any], T], config: Any) -> T:
    """Result of the command's function for the config; leaves the process as it was."""
    from seed_exp.python.undisturbed import undisturbed

    if int((os.environ | slurm.torchrun_variables()).get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "a call from Python runs in one process; several are started by "
            f"torchrun -m seed_exp.{command}"
        )
    with undisturbed():
        return run(config)
