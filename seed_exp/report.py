"""Tables, curves and one page of what is in run folders, beside what papers published; also of half-finished runs.

  python -m seed_exp.report                                                    all runs below runs/
  python -m seed_exp.report 'runs=[runs,/mnt/cluster/runs]' output=report
  python -m seed_exp.report table1,table1_baseline seed=0,1,2                  a table of experiments/, and what is missing of it
  python -m seed_exp.report small_table1,small_table1_baseline scale=small     options as distill's -m takes them

Writes index.html (one file that needs no network), table.md, table.tex and table.csv into the folder `output`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING

from seed_exp.config.command import command, spelled_out
from seed_exp.config.compose import SCHEMAS, compose, config_home, groups, jobs
from seed_exp.config.errors import explain
from seed_exp.config.schema import ReportConfig, StudentConfig
from seed_exp.engine.run_folder import decisive_options, to_plain
from seed_exp.evaluation.frozen import eval_options
from seed_exp.files import atomic_write
from seed_exp.models.cost import forward_flops
from seed_exp.models.students import STUDENTS, build_student
from seed_exp.redaction import redact_all
from seed_exp.registry import lookup
from seed_exp.reporting.comparison import compare
from seed_exp.reporting.entries import Job
from seed_exp.reporting.formats import comma_separated, latex, markdown
from seed_exp.reporting.page import page
from seed_exp.reporting.page_content import Model, Report
from seed_exp.reporting.published import Published, network_of, read_published, students_of
from seed_exp.reporting.runs import TRAINING, Result, Run, read_runs
from seed_exp.training import data_words


def report(config: ReportConfig) -> Path:
    """Writes page and tables, prints the table; returns the path of the page.

    Raises:
        ValueError: as `planned_jobs`.
    """
    runs, problems = read_runs([Path(path) for path in config.runs], effective_options)
    published, unreadable = read_published(config_home() / "experiments" / "published.csv")
    planned = [job for line in config.sweeps for job in planned_jobs(line)]
    title = (
        ", ".join(dict.fromkeys(re.findall(r"(?<=\bexperiments=)[\w/]+", " ".join(config.sweeps))))
        or ("All runs", "Sweep")[bool(config.sweeps)]
    )
    models = known_models([*runs, *planned], published)
    sizes = {name: model.parameters for name, model in models.items()}
    table = compare(title, runs, published, evaluation_command, planned if config.sweeps else None, sizes)
    content = Report(config.title, [table], runs, published, models, [*problems, *unreadable])
    output = Path(config.output)
    files = {
        "table.md": f"{markdown(table)}\n",
        "table.tex": f"{latex(table)}\n",
        "table.csv": comma_separated([table]),
        "index.html": page(content),
    }
    for name, text in files.items():
        with atomic_write(output / name) as file:
            file.write(text.encode())
    for problem in content.problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(f"{files['table.md']}\nThe page is {output / 'index.html'}; table.md, table.tex and table.csv are beside it.")
    return output / "index.html"


def planned_jobs(line: str) -> list[Job]:
    """What `line`, such as `distill experiments=table1 seed=0,1`, starts.

    Raises:
        ValueError: it names no command of a training, or an experiment or option that there is not.
    """
    name, *overrides = shlex.split(line) or [""]
    lookup(dict.fromkeys(TRAINING), name, "command of a sweep")
    try:
        with outside_hydra():
            return [Job(name, job, redact_all(decisive_options(to_plain(compose(name, job))))) for job in jobs(name, overrides)]
    except HydraException as error:
        raise ValueError(explain(error)) from None


def effective_options(command: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of the nested options of a run those that decide, flat; one that its version had not yet has the schema's default."""
    defaults = dict(_defaults(SCHEMAS[command], ""))
    for name in options.get("students") or {}:
        defaults |= _defaults(StudentConfig, f"students.{name}.")
    return {**decisive_options(to_plain(defaults)), **decisive_options(options)}


def _defaults(owner: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    types = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(types[field.name]):
            yield from _defaults(types[field.name], f"{prefix}{field.name}.")
        elif value not in (MISSING, dataclasses.MISSING) and not isinstance(value, dict):
            yield f"{prefix}{field.name}", value


@contextmanager
def outside_hydra() -> Iterator[None]:
    """Forgets, while it is entered, that Hydra runs this command: it composes the grid of one command at a time."""
    holder = GlobalHydra.instance()
    running, holder.hydra = holder.hydra, None
    try:
        yield
    finally:
        holder.hydra = running


def evaluation_command(run: Run, evaluation: str, like: Result | None) -> str:
    """The command line that evaluates the run: as the result `like`, or else as it was meant to be evaluated."""
    line = next((line for line in run.evaluations if shlex.split(line)[:1] == [evaluation]), evaluation)
    words = [] if like else shlex.split(line)[1:]
    words += data_words(run.options)
    if evaluation == "linear" and not any(word.startswith("views=") for word in words):
        words += linear_views(run.options.get("views.eval_size"))
    wanted = like.protocol.get("options") if like else None
    if isinstance(wanted, dict):
        default = decisive_options(to_plain(compose(evaluation, ["run=.", *words])))
        words += [
            f"{key}={json.dumps(value)}"
            for key, value in wanted.items()
            if key in default and default[key] != value and key not in ("seed", "networks") and not key.startswith("data.")
        ]
    return shlex.join(["python", "-m", f"seed_exp.{evaluation}", f"run={run.folder}", *words])


@functools.cache
def linear_views(eval_size: object) -> list[str]:
    """The option that chooses views of linear evaluation for encoders trained at this size; none where the default fits."""
    names = [name for name in groups()["views"] if name.startswith("linear")]
    sizes = {name: eval_options(compose("linear", ["run=.", f"views={name}"]).views)["eval_size"] for name in names}
    fitting = [name for name in names if sizes[name] == eval_size]
    return [] if "linear" in fitting or not fitting else [f"views={fitting[0]}"]


def known_models(trainings: Sequence[Run | Job], published: Sequence[Published]) -> dict[str, Model]:
    """Parameters of the students that were published, and parameters and FLOPs of those that are trained."""
    sizes = {
        network_of(training.options, name): training.options.get("views.eval_size")
        for training in trainings
        for name in students_of(training.options)
    }
    wanted = dict.fromkeys(row.student for row in published if row.student in STUDENTS) | sizes
    return {name: model for name, size in sorted(wanted.items()) if (model := _model(name, size)) is not None}


def _model(name: str, size: object) -> Model | None:
    config = StudentConfig(name) if name in STUDENTS else StudentConfig("timm", name)
    try:
        with torch.device("meta"):  # shapes are enough
            encoder = build_student(config, embedding_dim=1).encoder
        flops = forward_flops(encoder, size) if isinstance(size, int) else None
    except (RuntimeError, ValueError, NotImplementedError):  # a network that this version of timm has not, or of another size
        return None
    return Model(sum(parameter.numel() for parameter in encoder.parameters()), flops)


def spelled(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra wants it: experiments and options of their jobs become sweeps, a folder a list of one."""
    words = spelled_out(list(arguments), "report", "experiments")
    words = [f"runs=[{word.removeprefix('runs=')}]" if re.match(r"runs=[^\[]", word) else word for word in words]
    named = next((word for word in words if word.startswith("experiments=")), None)
    if named is None:
        return words
    own = {field.name for field in dataclasses.fields(ReportConfig)} | {"hydra"}
    swept = [word for word in words if re.match(r"[\w.@/+~]+=", word) and re.split(r"[.=]", word)[0] not in own and word != named]
    names = [name.strip() for name in named.partition("=")[2].strip("[]").split(",")]
    sweeps = [shlex.join([training_command(name), f"experiments={name}", *swept]) for name in names]
    quoted = ",".join("'" + sweep.replace("\\", "\\\\").replace("'", "\\'") + "'" for sweep in sweeps)
    return [word for word in words if word not in (*swept, named)] + [f"sweeps=[{quoted}]"]


def training_command(experiment: str) -> str:
    """The command with which the file of the experiment says that it is run."""
    file = config_home() / "experiments" / f"{experiment}.yaml"
    header = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(rf"python -m seed_exp\.(\w+) experiments={re.escape(experiment)}\b", header)
    return found[1] if found and found[1] in TRAINING else "distill"


_main = command(report)


def main() -> None:
    """Reads the command line."""
    sys.argv[1:] = spelled(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
