"""The files of a report, and the runs and jobs that it is about."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from seed_exp.base.files import atomic_write
from seed_exp.base.redaction import redact, redact_all
from seed_exp.base.registry import lookup
from seed_exp.config.compose import compose, config_home
from seed_exp.config.identity import effective_options
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.config.schema import TRAINING, ReportConfig, StudentConfig
from seed_exp.config.sweep import composed_jobs
from seed_exp.config.words import word
from seed_exp.models.cost import forward_flops
from seed_exp.models.students import STUDENTS, build_student
from seed_exp.reporting.comparison import compare
from seed_exp.reporting.entries import PlannedJob
from seed_exp.reporting.page.build import page
from seed_exp.reporting.page.content import Model, PageContent
from seed_exp.reporting.published import Published, network_of, read_published, students_of
from seed_exp.reporting.runs import Result, Run, read_runs
from seed_exp.reporting.table_formats import comma_separated, latex, markdown


def report(config: ReportConfig) -> Path:
    """Writes page and tables, prints the table; returns the path of the page.

    Raises:
        ValueError: as `planned_jobs`.
    """
    runs, problems = read_runs([Path(path) for path in config.runs], effective_options)
    published, unreadable = read_published(config_home() / "experiments" / "published.csv")
    planned = [job for line in config.sweeps for job in planned_jobs(line)]
    named = dict.fromkeys(re.findall(r"(?<=\bexperiments=)[\w/]+", " ".join(config.sweeps)))
    title = ", ".join(named) or ("Sweep" if config.sweeps else "All runs")
    models = known_models([*runs, *planned], published)
    sizes = {name: model.parameters for name, model in models.items()}
    table = compare(
        title, runs, published, evaluation_command, planned if config.sweeps else None, sizes
    )
    content = PageContent(config.title, [table], runs, published, models, [*problems, *unreadable])
    output = Path(config.output)
    files = {
        "table.md": f"{markdown(table)}\n",
        "table.tex": f"{latex(table)}\n",
        "table.csv": comma_separated([table]),
        "index.html": page(content),
    }
    for name, text in files.items():
        with atomic_write(output / name) as file:
            file.write(redact(text).encode())
    for problem in content.problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(
        f"{files['table.md']}\nThe page is {output / 'index.html'}; "
        "table.md, table.tex and table.csv are beside it."
    )
    return output / "index.html"


def planned_jobs(line: str) -> list[PlannedJob]:
    """The jobs that `line`, such as `distill experiments=table1 seed=0,1`, starts.

    Raises:
        ValueError: the line names no training command, or an unknown experiment or option.
    """
    name, *overrides = shlex.split(line) or [""]
    lookup(dict.fromkeys(TRAINING), name, "command of a sweep")
    composed = composed_jobs(name, overrides)
    return [
        PlannedJob(name, job, redact_all(decisive_options(to_plain(config))))
        for job, config in composed
    ]


def evaluation_command(run: Run, evaluation: str, like: Result | None) -> str:
    """The command line that evaluates the run in the way of the result `like`.

    Without `like` it evaluates as the run's own option `evaluations` says.
    """
    line = next(
        (line for line in run.evaluations if shlex.split(line)[:1] == [evaluation]), evaluation
    )
    words = [word("run", str(run.folder)), *([] if like else shlex.split(line)[1:])]
    # Not the run's own, whose address may have had a secret: no option of theirs is compared.
    has_images = any(one.startswith("data=") for one in words)
    images = [] if has_images else [word("data", run.options.get("data.source"))]
    wanted = like.protocol.get("options") if like else None
    if isinstance(wanted, dict):
        default = decisive_options(to_plain(compose(evaluation, [*words, *images])))
        words += [
            word(key, value)
            for key, value in wanted.items()
            if key in default
            and default[key] != value
            and key not in ("seed", "networks")
            and not key.startswith("data.")
        ]
    return shlex.join(["python", "-m", f"seed_exp.{evaluation}", *words])


def known_models(
    trainings: Sequence[Run | PlannedJob], published: Sequence[Published]
) -> dict[str, Model]:
    """Parameters of published students; parameters and FLOPs of trained ones."""
    sizes = {
        network_of(training.options, name): training.options.get("views.eval_size")
        for training in trainings
        for name in students_of(training.options)
    }
    wanted = dict.fromkeys(row.student for row in published if row.student in STUDENTS) | sizes
    return {
        name: model
        for name, size in sorted(wanted.items())
        if (model := _model(name, size)) is not None
    }


def _model(name: str, size: object) -> Model | None:
    config = StudentConfig(name) if name in STUDENTS else StudentConfig("timm", name)
    try:
        with torch.device("meta"):  # shapes are enough
            encoder = build_student(config, embedding_dim=1).encoder
        flops = forward_flops(encoder, size) if isinstance(size, int) else None
    except (RuntimeError, ValueError, NotImplementedError):
        return None  # a network that this version of timm lacks, or that takes another size
    return Model(sum(parameter.numel() for parameter in encoder.parameters()), flops)
