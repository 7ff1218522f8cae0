"""`python -m seed_exp.plan`: the arithmetic against numbers worked out by hand.

Sizes are compared with real runs; no test looks at the clock.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seed_exp import distill, plan, pretrain
from seed_exp.benchmarks import planning as planning
from seed_exp.benchmarks.calibration import (
    Config,
    StepCost,
    cost_options,
    measure_step,
    worker_rate,
)
from seed_exp.benchmarks.planning import Estimate, Plan, make_plan, render
from seed_exp.config.compose import compose
from seed_exp.config.schema import StudentConfig
from seed_exp.data.digits import DigitsSource
from seed_exp.evaluation.setup import eval_options
from seed_exp.methods.teacher_cache import TeacherCache
from seed_exp.models import cpu_precision, teachers
from seed_exp.models.students import build_student, save_student
from seed_exp.models.teachers import build_teacher
from seed_exp.tools import plan as tools_plan

CPU = torch.device("cpu")
DIGITS = ["data=digits", "views=digits", "data.num_workers=0", "device=cpu"]
RUN = [
    *DIGITS,
    "batch_size=32",
    "steps=2",
    "checkpoint_every=1",
    "knn_bank_size=50",
    "knn_query_size=20",
]
COST = StepCost(
    images_per_s=100,
    measured_images=4,
    memory=7 << 30,
    checkpoint=10**9,
    students=10**8,
    cached=516,
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory and no folder of images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEED_DATA", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The option that names a teacher of our own."""
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    config, views = StudentConfig("convnet_w2"), compose("distill", DIGITS).views
    save_student(file, build_student(config, 128), config, {"eval_views": eval_options(views)})
    return f"teacher.checkpoint={file}"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The steps that were "measured": each one costs COST."""
    steps: list[Config] = []

    def measure(options: Config, device: torch.device, seconds: float) -> StepCost:
        steps.append(options)
        return COST

    monkeypatch.setattr(planning, "measure_step", measure)
    return steps


def job(
    *overrides: str, num_images: int | None = 1000, gpus: int = 1, command: str = "distill"
) -> Estimate:
    """The estimate of a single job."""
    (row,) = make_plan(
        [("a", compose(command, list(overrides)))], seconds=0, num_images=num_images, gpus=gpus
    ).jobs
    return row


def sweep(
    *overrides: str, command: str = "distill", num_images: int | None = 1000, gpus: int = 1
) -> Plan:
    return tools_plan.plan(command, list(overrides), seconds=0, num_images=num_images, gpus=gpus)


# The arithmetic, at 100 images per second.


def test_hours_are_images_times_epochs_over_the_rate(measured: list[Config]) -> None:
    row = job("epochs=36", "batch_size=250")
    assert row.hours == pytest.approx(0.1)
    assert (row.images_per_s, row.model_images_per_s) == (pytest.approx(100), pytest.approx(100))
    assert (row.data_images_per_s, row.bound_by) == (None, None)
    assert row.memory == 7 << 30
    assert row.checkpoints == 2 * 10**9 + 10**8


def test_the_last_images_of_an_epoch_that_make_no_batch_are_not_counted(
    measured: list[Config],
) -> None:
    assert job("epochs=36", "batch_size=300").hours == pytest.approx(0.09)


def test_a_number_of_steps_counts_instead_of_epochs(measured: list[Config]) -> None:
    assert job("steps=36", "batch_size=100").hours == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("num_workers", "gpus", "data_rate", "rate", "bound_by"),
    [
        (2, 1, 60, 60, "data"),
        (4, 1, 120, 100, "model"),
        (2, 4, 60, 60, "data"),  # workers are counted per device
        (0, 1, 30, 1 / (1 / 100 + 1 / 30), "data"),  # the training process waits for both
    ],
)
def test_the_slower_of_model_and_data_bounds_the_rate(
    measured: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    gpus: int,
    data_rate: float,
    rate: float,
    bound_by: str,
) -> None:
    monkeypatch.setattr(planning, "worker_rate", lambda source, views: 30.0)
    options = ["data=digits", f"data.num_workers={num_workers}", "epochs=36", "batch_size=100"]
    row = job(*options, gpus=gpus)
    assert row.data_images_per_s == pytest.approx(data_rate)
    assert (row.images_per_s, row.bound_by) == (pytest.approx(rate), bound_by)
    assert row.hours == pytest.approx(36000 / rate / 3600)


def test_without_a_number_of_workers_each_device_has_its_share_of_the_cores(
    measured: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "worker_rate", lambda source, views: 30.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert job("data=digits", "batch_size=100").data_images_per_s == 15 * 30
    assert job("data=digits", "batch_size=100", gpus=4).data_images_per_s == 3 * 30


def test_students_that_end_earlier_cost_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        planning,
        "measure_step",
        lambda options, *_: COST if len(options.students) == 2 else StepCost(200, 4, 1, 1, 1, 1),
    )
    options = [
        "student=[resnet18,resnet34]",
        "students.resnet18.epochs=10",
        "epochs=30",
        "batch_size=100",
    ]
    row = job(*options)
    assert row.hours * 3600 == pytest.approx(10 * 1000 / 100 + 20 * 1000 / 200)
    assert row.images_per_s == pytest.approx(30 * 1000 / 200)
    assert (row.memory, row.checkpoints) == (
        COST.memory,
        2 * 10**9 + 10**8,
    )  # those of the whole fleet


@pytest.mark.parametrize(
    ("length", "phases", "seen", "memory"),
    [  # images at 24 and at 32 pixels with two students, then with one; ten steps an epoch
        (
            ["epochs=30", "students.convnet_w2.epochs=10"],
            "[[0,24],[20,24,32],[28,32,24]]",
            {2: [10_000, 0], 1: [15_000, 5000]},
            48,
        ),
        (["steps=30"], "[[0,24],[25,24,32],[28,32,24]]", {2: [2800, 200]}, 64),
    ],
)
def test_steps_of_each_size_are_measured_and_counted(
    monkeypatch: pytest.MonkeyPatch,
    length: list[str],
    phases: str,
    seen: dict[int, list[int]],
    memory: int,
) -> None:
    def measure(options: Config, *_: object) -> StepCost:
        # The recipe's own size stays: teacher.size is the teacher's side for it.
        assert options.views.crops["global"].size == 32
        size, num = options.views.size_at(0), len(options.students)
        return replace(COST, images_per_s=2400 / size / num, memory=size * num)

    monkeypatch.setattr(planning, "measure_step", measure)
    monkeypatch.setattr(
        planning, "worker_rate", lambda _, views: 3200 / views.crops["global"].size ** 2
    )
    words = [*DIGITS, "student=[convnet_w2,convnet_w32]", "batch_size=100", *length]
    row = job(*words, f"views.resolution={phases}")
    model = sum(num * (24 * small + 32 * large) / 2400 for num, (small, large) in seen.items())
    small, large = map(sum, zip(*seen.values(), strict=True))
    data = (24**2 * small + 32**2 * large) / 3200  # DIGITS has no workers: one after the other
    assert row.hours * 3600 == pytest.approx(model + data)
    assert row.model_images_per_s == pytest.approx((small + large) / model)
    assert row.data_images_per_s == pytest.approx((small + large) / data)
    assert row.memory == memory
    facts = sweep(*words, f"views.resolution={phases}").facts
    assert facts["views.resolution"].startswith("each size was measured")
    assert "views.resolution" not in sweep(*words).facts


def test_the_batch_is_divided_among_devices_and_hours_are_not(measured: list[Config]) -> None:
    one, eight = (job("epochs=36", "batch_size=200", gpus=gpus) for gpus in (1, 8))
    assert eight.hours == one.hours
    assert [options.batch_size for options in measured] == [200, 25]


def test_an_automatic_batch_size_is_taken_for_256_images_per_device(measured: list[Config]) -> None:
    estimates = sweep("batch_size=auto", gpus=2)
    assert [options.batch_size for options in measured] == [256]
    assert estimates.facts["batch_size=auto"] == "taken for 256 images per device"
    assert estimates.jobs[0].hours * 3600 == pytest.approx(200 * 512 / 100)


def test_a_teacher_cache_is_as_large_as_the_cache_says_and_counts_once(
    measured: list[Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = TeacherCache(
        tmp_path / "cache", {}, num_images=1000, num_views={"global": 1}, embedding_dim=128
    )
    estimates = sweep("student=resnet18,resnet34", "epochs=3", "batch_size=100", "teacher_cache=c")
    assert [row.teacher_cache for row in estimates.jobs] == [3 * cache.bytes_per_epoch] * 2
    assert estimates.total.teacher_cache == 3 * cache.bytes_per_epoch
    assert sweep("batch_size=100").total.teacher_cache == 0


def test_the_total_is_the_sum_of_the_jobs(measured: list[Config]) -> None:
    estimates = sweep("seed=0,1,2", "batch_size=100", "epochs=36")
    assert (estimates.total.hours, estimates.total.checkpoints) == (
        pytest.approx(0.3),
        3 * (2 * 10**9 + 10**8),
    )


# The steps that are measured, and how often.


@pytest.mark.parametrize(
    ("swept", "number"),
    [
        ("seed=0,1,2", 1),
        ("optimizer.lr=0.1,1", 1),
        ("objective.tau_teacher=0.1,0.01", 1),
        ("objective.tau_teacher=0.01,0.001", 2),  # the second keeps the teacher in float32
        ("epochs=1,2", 1),
        ("teacher=moco_v2_r50,moco_v2_r50_800ep", 1),
        ("teacher=moco_v2_r50,moco_v2_r152,swav_r50", 3),
        ("student=resnet18,resnet34", 2),
        ("students.resnet18.hidden_dim=null,2048", 2),
        ("views=mocov2,swav_multicrop", 2),
        ("batch_size=100,200", 2),
        ("accumulation=1,2", 2),
        ("objective.queue_size=10,20", 2),
        ("precision=float32,bfloat16", 2),
        ("compile=True,False", 2),
        ("optimizer=sgd,lars", 2),
        ("optimizer.momentum=0,0.9", 2),
    ],
)
def test_jobs_that_cost_the_same_are_measured_once(
    measured: list[Config], swept: str, number: int
) -> None:
    estimates = sweep(swept, "epochs=1") if "epochs" not in swept else sweep(swept)
    assert len(measured) == number
    key, _, values = swept.partition("=")
    assert [row.label for row in estimates.jobs] == [
        f"{key}={value}" for value in values.split(",")
    ]


def test_the_time_is_divided_among_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(
        planning, "measure_step", lambda options, device, seconds: given.append(seconds) or COST
    )
    tools_plan.plan(
        "distill", ["student=resnet18,resnet34", "seed=0,1,2"], seconds=60, num_images=1000, gpus=1
    )
    assert given == [30, 30]


def step_cost(*overrides: str, batch_size: int = 32, command: str = "distill") -> StepCost:
    config = compose(command, [*DIGITS, *overrides])
    return measure_step(cost_options(config, batch_size, list(config.students)), CPU, seconds=0)


def test_a_step_is_measured_in_the_formats_that_the_run_would_have(
    teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_precision, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(cpu_precision, "SMALLEST_VIEW", 1)
    own = ["teacher=run", teacher, "student=convnet_w2", "objective.queue_size=64"]
    assert step_cost(*own).precision == "bfloat16: teacher, students.convnet_w2"
    sharp = step_cost(*own, "objective.tau_teacher=1e-3").precision
    assert sharp == "bfloat16: students.convnet_w2; float32: teacher"
    assert step_cost(*own, "precision=float32").precision == "float32"


def test_memory_is_what_stays_and_what_grows_with_the_batch(teacher: str) -> None:
    own = ["teacher=run", teacher, "student=convnet_w32", "objective.queue_size=64"]
    memory = {size: step_cost(*own, batch_size=size).memory for size in (8, 16, 32)}
    per_image = (memory[16] - memory[8]) / 8
    assert per_image > 0
    assert memory[32] - memory[16] == pytest.approx(16 * per_image)
    assert step_cost(*own, "accumulation=4", batch_size=32).memory == memory[8]

    config = compose("distill", own)
    student = build_student(config.students["convnet_w32"], 128)
    frozen = build_teacher(config.teacher, "")
    frozen.fold_batch_norm()
    held = sum(
        tensor.nbytes for module in (student, frozen) for tensor in module.state_dict().values()
    )
    weights = sum(
        parameter.nbytes for parameter in student.parameters()
    )  # once more each for gradients and momentum
    assert memory[8] - 8 * per_image == held + 2 * weights + 64 * 128 * 4


def test_memory_is_that_of_the_precision_that_a_gpu_would_use(teacher: str) -> None:
    own = ["teacher=run", teacher, "student=convnet_w32", "objective.queue_size=64"]
    automatic, half, full = (
        step_cost(*own, f"precision={name}").memory for name in ("auto", "bfloat16", "float32")
    )
    assert automatic == half < full


def test_nothing_is_downloaded_and_no_file_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(teachers, "download", None)
    options = [
        "teacher=moco_v2_r50",
        "teacher.checkpoint=nowhere",
        "students.convnet_w2.init=nowhere",
    ]
    cost = step_cost("student=convnet_w2", *options, "objective.queue_size=64", batch_size=2)
    assert cost.images_per_s > 0
    assert cost.measured_images == 2
    assert list(tmp_path.iterdir()) == []


def test_a_worker_reads_images_at_some_rate() -> None:
    rate = worker_rate(DigitsSource("train"), compose("distill", DIGITS).views)
    assert math.isfinite(rate)
    assert rate > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill", "pretrain"])
def test_checkpoints_take_as_much_disk_as_those_of_a_run(
    teacher: str, command: str, tmp_path: Path, logged: list[str]
) -> None:
    method = (
        ["teacher=run", teacher, "objective.queue_size=4096"]
        if command == "distill"
        else ["moco.queue_size=4096"]
    )
    options = [*RUN, *method, "student=[convnet_w2,convnet_w32]", f"run_dir={tmp_path}/run"]
    folder = {"distill": distill.distill, "pretrain": pretrain.pretrain}[command](
        compose(command, options)
    )
    files = [*folder.glob("checkpoints/*.pt"), *folder.glob("students/*")]
    assert len(files) == 4
    estimated = job(*options, num_images=None, command=command).checkpoints
    assert estimated == pytest.approx(sum(file.stat().st_size for file in files), rel=0.03)


def test_no_embeddings_are_kept_where_there_is_no_teacher(teacher: str) -> None:
    assert step_cost("student=convnet_w2", "moco.queue_size=64", command="pretrain").cached == 0
    multicrop = ["views=swav_multicrop", "views.crops.global.size=32", "views.crops.local.size=16"]
    cost = step_cost(
        "student=convnet_w2",
        "teacher=run",
        teacher,
        *multicrop,
        "objective.queue_size=64",
        batch_size=4,
    )
    cache = TeacherCache(
        Path("cache"), {}, num_images=1, num_views={"global": 1, "local": 6}, embedding_dim=128
    )
    assert cost.cached == cache.bytes_per_epoch


@pytest.mark.gpu
def test_on_a_gpu_the_memory_of_a_step_is_measured(teacher: str) -> None:
    config = compose(
        "distill",
        [*DIGITS, "teacher=run", teacher, "student=convnet_w32", "objective.queue_size=64"],
    )
    costs = [
        measure_step(cost_options(config, size, ["convnet_w32"]), torch.device("cuda"), seconds=0)
        for size in (32, 256)
    ]
    assert [cost.measured_images for cost in costs] == [32, 256]
    assert costs[0].checkpoint < costs[0].memory < costs[1].memory


# The command line.


def type_line(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    plan.main()


@pytest.fixture
def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The output of a command line."""

    def call(*arguments: str) -> str:
        type_line(monkeypatch, *arguments)
        return capsys.readouterr().out

    return call


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_sweep_on_real_images_as_a_table_and_as_json(
    teacher: str, printed: Callable[..., str], tmp_path: Path
) -> None:
    line = [
        "none",
        "data=digits",
        "views=digits",
        "student=convnet_w2,convnet_w32",
        "teacher=run",
        teacher,
        "batch_size=32",
    ]
    line += ["objective.queue_size=64", "device=cpu", "epochs=2", "--seconds", "0"]
    table, _, facts = printed(*line).partition("\n\n")
    header, _, *rows = map(cells, table.splitlines())
    assert header == [
        "job",
        "img/s",
        "bound by",
        "model img/s",
        "data img/s",
        "GPU memory",
        "CPU-hours",
        "checkpoints",
    ]
    assert [row[0] for row in rows] == ["student=convnet_w2", "student=convnet_w32", "total"]
    assert all(all(row) for row in rows[:2])
    assert rows[2][1:6] == [""] * 5
    assert {"device", "CPU threads", "torch", "images", "rates", "GPU memory", "data"} <= {
        fact.partition(":")[0].removeprefix("- ") for fact in facts.splitlines()
    }

    content = json.loads(printed(*line, "--json", "--gpus=2"))
    assert [row["label"] for row in content["jobs"]] == [
        "student=convnet_w2",
        "student=convnet_w32",
    ]
    for row in content["jobs"]:
        assert row.keys() == Estimate.__dataclass_fields__.keys()
        assert row["images_per_s"] <= min(row["model_images_per_s"], row["data_images_per_s"]) * (
            1 + 1e-9
        )
        assert row["bound_by"] in ("model", "data")
        assert row["memory"] > 0
    assert (content["gpus"], content["device"], content["facts"]["images"]) == (2, "cpu", "1,437")
    assert content["total"]["hours"] == pytest.approx(sum(row["hours"] for row in content["jobs"]))
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_is_named_by_its_file(
    measured: list[Config], printed: Callable[..., str]
) -> None:
    content = json.loads(
        printed("table1_moco_v2_r50", "--images", "1281167", "seed=0,1", "--json", "--gpus", "8")
    )
    assert [row["label"] for row in content["jobs"]] == ["seed=0", "seed=1"]
    assert [len(options.students) for options in measured] == [5]
    seen = 1281167 // 256 * 256 * 200
    assert content["total"]["hours"] == pytest.approx(2 * seen / 100 / 3600)
    assert "neither SEED_DATA" in content["facts"]["data not measured"]
    (row,) = json.loads(printed("table1_moco_v2_r50", "--images=1000", "--json"))["jobs"]
    assert row["label"] == "experiments=table1_moco_v2_r50"


def test_several_devices_and_a_cache_have_columns_of_their_own(measured: list[Config]) -> None:
    options = ["batch_size=100", "epochs=36", "device=cpu"]
    row = render(sweep(*options)).splitlines()[2]
    assert cells(row) == [" ".join(options), "100", "", "100", "", "~7 GiB", "0.1", "2.1 GB"]
    header, _, first, total = render(sweep(*options, "teacher_cache=c", gpus=4)).splitlines()[:4]
    assert cells(header)[-4:] == ["CPU-hours", "hours on 4", "checkpoints", "teacher cache"]
    assert cells(first)[-4:] == cells(total)[-4:] == ["0.1", "0.025", "2.1 GB", "0.0186 GB"]


@pytest.mark.parametrize("width", [80, 60])
def test_the_tables_fit_a_terminal(measured: list[Config], width: int) -> None:
    options = ["optimizer.lr=0.03,1", "objective.tau_teacher=0.01,0.02"]
    plan = sweep("student=resnet18", "epochs=36,37", "teacher_cache=c", *options, gpus=4)
    whole, narrow = render(plan), render(plan, width)
    assert render(plan, max(map(len, whole.splitlines()))) == whole
    assert all(len(line) <= width for line in narrow.splitlines() if line.startswith("|"))
    names = [name for line in narrow.splitlines() if "img/s" in line for name in cells(line)]
    assert names[:2] == ["job", "img/s"]
    numbers = {cell for line in whole.splitlines() if line[0:1] == "|" for cell in cells(line)[1:]}
    shown = {cell for line in narrow.splitlines() if line[0:1] == "|" for cell in cells(line)[1:]}
    empty = {"bound by", "data img/s"}
    assert {cell for cell in numbers - empty if not cell.startswith("-")} <= shown
    for letter, row in zip("ABCDEFGH", plan.jobs, strict=True):
        assert f"- {letter}: {row.label}" in narrow.splitlines()
    assert whole.splitlines()[-1] == narrow.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "table1_moco_r50",
            "no option 'table1_moco_r50' in config group 'experiments'; "
            "did you mean 'table1_moco_v2_r50'?",
        ),
        (
            "table1_moco_v2_r50 seed=0,1",
            "neither SEED_DATA (environment) nor data.root=PATH is set",
        ),
        ("table1_moco_v2_r50", "without the images, give their number: --images N"),
        ("student=resnet18,resnt34 --images 1000", "did you mean 'resnet34'?"),
        ("seed=0,1 epochs=0 --images 1000", "epochs must be at least 1, got 0"),
        ("seed=interval(0,1)", "BasicSweeper does not support sweep type"),
        ("table1_moco_v2_r50 seed", "cannot read 'seed'; options are written KEY=VALUE"),
        ("experimnets=x", "did you mean 'experiments'?"),
        ("--images 100", "batch_size=256 exceeds the 100 images"),
        ("--images 1000 --gpus 3", "batch_size=256 does not divide by the 3 processes"),
        (
            "--images 1000 accumulation=3",
            "accumulation=3 does not divide the 256 images of each process",
        ),
        ("--images 0", "argument --images: must be at least 1, got 0"),
        ("--command linear", "argument --command: invalid choice: 'linear'"),
        ("--student resnet18", "unrecognized arguments: --student"),
        ("data=digits views=digits teacher=run", "teacher=run needs teacher.checkpoint=PATH"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        type_line(monkeypatch, *line.split())
    message = stopped.value.code  # Python prints it on stderr and exits with status 1
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert expected in message
    assert "\n" not in message
    assert capsys.readouterr() == ("", "")


def test_help_says_how_it_is_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        type_line(monkeypatch, "--help")
    assert not stopped.value.code
    text = capsys.readouterr().out
    assert plan.__doc__ is not None
    assert plan.__doc__.strip() in text
    for option in ("--command", "--seconds", "--images", "--gpus", "--json"):
        assert option in text
