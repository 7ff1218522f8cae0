"""Times several students: one run that shares images, views, teacher and queue, or one run each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from seed_exp.benchmarks.bench_step import IN_FLOAT32, TimedStep
from seed_exp.benchmarks.measure import BenchReport, Contender, interleave, machine
from seed_exp.config.schema import BenchConfig, Precision

ONE_RUN_EACH = "ours, one run each"


def bench(config: BenchConfig) -> BenchReport:
    """Measures images per second at which all students of `config` are trained.

    Raises:
        ValueError: there is only one student.
    """
    if len(config.students) < 2:
        raise ValueError(
            f"a fleet is several students, got {next(iter(config.students))}; "
            "e.g. 'student=[resnet18,resnet34]'"
        )
    training, num = TimedStep(config), config.batch_size
    ways = [
        Contender(
            ONE_RUN_EACH,
            one_after_the_other([training.ours([name]) for name in config.students]),
            num,
        ),
        Contender("ours, one run of all", training.ours(config.students), num),
        Contender(
            "plain, one run each",
            one_after_the_other([training.plain(name) for name in config.students]),
            num,
        ),
        Contender("teacher forward", training.teacher_forward, num),
    ]
    if training.has_half:
        single = training.ours(config.students, precision=Precision.float32)
        ways.insert(2, Contender(f"ours, one run of all, {IN_FLOAT32}", single, num))
    *rows, bound = interleave(ways, seconds=config.seconds, device=training.device)
    facts = {"students": ", ".join(config.students), **training.facts()}
    report = BenchReport(
        "training several students",
        "img/s",
        rows,
        ONE_RUN_EACH,
        [bound],
        facts | machine(training.device),
    )
    cost = f"{1 / report.ratio(rows[1]):.2f} of {len(config.students)} runs"
    return replace(report, facts={"cost of one run of all": cost, **report.facts})


def one_after_the_other(steps: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """Returns a function that makes all steps, one after the other."""

    def run() -> None:
        for step in steps:
            step()

    return run
