"""Every experiment at every scale: its jobs compose, and its header tells the truth.

Slow tests run each experiment from its own command line.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pytest

from seed_exp import distill, pretrain
from seed_exp.base.announcement import VARIABLE, announced
from seed_exp.config.compose import compose
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.config.report_line import training_command
from seed_exp.config.schema import EVALUATIONS, Precision
from seed_exp.config.sweep import jobs
from seed_exp.methods.objectives import OBJECTIVES
from seed_exp.models.students import STUDENTS
from seed_exp.models.teacher_ssl import TEACHER_SSL
from seed_exp.models.teachers import NETWORKS, TEACHERS
from seed_exp.protocols import follow_up
from seed_exp.protocols.follow_up import PROTOCOLS, plan_evaluations, run_evaluations

HOME = Path(__file__).parents[2]
NAMES = sorted(file.stem for file in (HOME / "experiments").glob("*.yaml"))
SCALES = ["full", "small", "smoke"]
STEPS_PER_EPOCH = {256: 1281167 // 256, 512: 50000 // 512}
COLUMNS = [
    "student",
    "teacher",
    "teacher_ssl",
    "objective",
    "epochs",
    "views",
    "hidden_dim",
    "protocol",
    "dataset",
    "value",
    "source",
]
ONLY_SMALL = {"small_table1", "small_table1_baseline"}
OTHER_NETWORKS = {"mobilenetv2", "vit_tiny", "vit_small"}
"""Students of published numbers that are no students of ours."""
OTHER_METHODS = {"smd", "sslight", "dinov2", "eupe", "proteus"}
"""Methods of published numbers that are not here."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    """An empty working directory, without the variables that matter.

    Puts the package's logger back afterwards.
    """
    monkeypatch.chdir(tmp_path)
    for variable in ("SEED_DATA", "SEED_SMALL_DATA", "SEED_TEACHERS"):
        monkeypatch.delenv(variable, raising=False)


def header(name: str) -> str:
    """The comment on top of an experiment, as one line."""
    lines = (HOME / "experiments" / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def command_of(name: str) -> str:
    found = re.search(rf"python -m seed_exp\.(\w+) experiments={name}\b", header(name))
    assert found is not None
    return found[1]


def jobs_of(name: str, scale: str, *options: str) -> list[list[str]]:
    return jobs(command_of(name), [f"experiments={name}", f"scale={scale}", *options])


@functools.cache
def configs(name: str, scale: str, *options: str) -> list[Any]:
    return [compose(command_of(name), job) for job in jobs_of(name, scale, *options)]


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        pytest.param(
            name,
            scale,
            marks=pytest.mark.slow
            if scale != "full" and name not in ("table1", "teachers")
            else (),
        )
        for name in NAMES
        for scale in SCALES
    ],
)
def test_every_job_composes_and_types(name: str, scale: str) -> None:
    found = configs(name, scale)
    assert all(config.tracker.group == name for config in found)
    assert all(line.split()[0] in EVALUATIONS for config in found for line in config.evaluations)
    assert all(
        {line.split()[0] for line in config.evaluations} == {"knn", "linear"} for config in found
    )
    if scale == "smoke":
        assert {student.network for config in found for student in config.students.values()} == {
            "convnet_w2",
            "convnet_w32",
        }
        assert {(config.data.source, config.tracker.name, config.device) for config in found} == {
            ("digits", "files", "cpu")
        }
        assert all(config.steps <= 2 for config in found)
    else:
        options = [json.dumps(decisive_options(to_plain(config))) for config in found]
        assert len(set(options)) == len(options)
        assert {config.steps for config in found} == {None}
    if scale != "full":
        assert {
            crop.size for config in found for crop in config.views.crops.values() if crop.num > 0
        } <= {16, 32}
        assert all(
            config.teacher.network == "run" for config in found if command_of(name) == "distill"
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_a_header_is_the_one_that_the_file_is_for(name: str) -> None:
    assert training_command(name) == command_of(name)


def test_an_experiment_of_another_command_is_refused_with_the_right_one() -> None:
    for name in [name for name in NAMES if command_of(name) == "pretrain"]:
        message = r"written for pretrain, not for distill: type python -m seed_exp\.pretrain"
        with pytest.raises(ValueError, match=message):
            compose("distill", [f"experiments={name}"])
    for wrong in ("linear", "pretain"):
        message = f"command must be null or one of distill, pretrain, got {wrong}"
        with pytest.raises(ValueError, match=message):
            compose("pretrain", [f"command={wrong}"])


@pytest.mark.parametrize("name", ["teacher_ssl", "table1_baseline"])
def test_evaluations_of_an_experiment_take_their_options_at_every_scale(name: str) -> None:
    for scale in SCALES:
        for config in configs(name, scale)[:1]:
            planned = plan_evaluations(config)
            assert [evaluation.line for evaluation in planned] == config.evaluations
            (linear,) = [
                evaluation.config for evaluation in planned if evaluation.run is PROTOCOLS["linear"]
            ]
            assert linear.views.eval_size == config.views.eval_size
            assert (linear.views.mean, linear.views.std) == (config.views.mean, config.views.std)
            assert all(milestone < linear.epochs for milestone in linear.optimizer.milestones)


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_paper_command_cost_and_what_to_expect(name: str) -> None:
    text = header(name)
    assert re.search(r"arXiv:\d{4}\.\d{5}|github\.com|not-measured\.md|small_table1\.yaml", text)
    assert "Published" in text or name in ONLY_SMALL
    found = configs(name, "small" if name in ONLY_SMALL else "full")
    cost = re.search(r"Cost: (\d+) jobs?\b[^;]* steps", text)
    assert cost is not None
    assert int(cost[1]) == len(found)
    steps = {config.epochs * STEPS_PER_EPOCH[config.batch_size] for config in found}
    assert {f"{number:,}" for number in (min(steps), max(steps))} <= set(
        re.findall(r"\d[\d,]+", cost[0])
    )
    assert f"seed_exp.plan {name}" in text or name == "teachers"


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_a_header_are_published_ones(name: str) -> None:
    published = {row["value"] for row in rows()}
    text = header(name).partition("Published")[2]
    numbers = re.findall(r"(?<![\d.:/])\d\d\.\d+(?![\d])", text)
    assert set(numbers) <= published
    assert not numbers or "ResNet" in text


def test_a_teacher_of_the_small_scale_is_one_that_the_commands_in_teachers_yaml_make() -> None:
    text = (HOME / "experiments" / "teachers.yaml").read_text()
    lines = re.sub(r"\\\n#", "", text).splitlines()
    start = "#   python -m seed_exp.pretrain experiments=teachers scale=small"
    typed = [line.removeprefix(start).split() for line in lines if line.startswith(start)]
    made = {
        config.run_dir: config
        for options in typed
        for config in configs("teachers", "small", *options)
    }
    needed = {
        config.teacher.checkpoint
        for name in NAMES
        if command_of(name) == "distill"
        for config in configs(name, "small")
    }
    assert needed == made.keys()
    for folder, config in made.items():
        (student,) = config.students.values()
        assert folder == f"runs/teachers/small/{student.name}-{config.views.name}"
        assert student.network == "timm"


def test_a_stand_in_has_the_network_of_the_teacher_or_says_otherwise() -> None:
    for file in sorted((HOME / "conf" / "scale" / "teacher" / "small").glob("*.yaml")):
        spec, text = TEACHERS[file.stem], file.read_text()
        comment, _, values = text.partition("\n")
        network = re.search(r"small/(\w+)-(\w+)", values)
        assert network is not None
        same = network[1] == spec.network and spec.teacher_ssl == "moco_v2"
        assert comment.startswith("# In place of") != same
        assert network[2] in {"mocov1", "mocov2", "simclr", "swav"}


def test_teachers_are_looked_for_where_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED_TEACHERS", "/elsewhere")
    for scale, folder in (
        ("smoke", "/elsewhere/smoke"),
        ("small", "/elsewhere/small/resnet50-mocov2"),
    ):
        assert configs.__wrapped__("teachers", scale)[0].run_dir == folder
        assert configs.__wrapped__("table1_moco_v2_r50", scale)[0].teacher.checkpoint == folder


def test_a_scale_wins_over_an_experiment_and_the_command_line_over_a_scale() -> None:
    (config,) = configs("table1_multicrop", "small")
    assert (config.epochs, config.batch_size, config.views.name) == (200, 512, "swav_multicrop")
    assert (config.views.crops["local"].num, config.views.blur_prob) == (6, 0)
    (config,) = configs(
        "table1_multicrop", "small", "epochs=7", "student=resnet18", "data=tsv", "data.root=/x"
    )
    assert (config.epochs, list(config.students), config.data.source, config.data.root) == (
        7,
        ["resnet18"],
        "tsv",
        "/x",
    )
    assert [
        config.seed for config in configs("objectives", "small", "objective=seed", "seed=0,1,2")
    ] == [0, 1, 2]


@pytest.mark.parametrize(
    ("part", "students", "teacher", "views", "epochs"),
    [
        ("moco_v2_r50_200ep", ["resnet18", "mobilenetv3_large"], "moco_v2_r50", "mocov2", 200),
        ("swav_r50w2_400ep", ["resnet18"], "swav_r50w2", "swav_multicrop", 400),
        ("swav_r50w4_400ep", ["efficientnet_b0", "resnet50"], "swav_r50w4", "swav_multicrop", 400),
        ("swav_r50w2_800ep", ["efficientnet_b0"], "swav_r50w2", "swav_multicrop", 800),
        ("swav_r50_200ep", ["efficientnet_b1"], "swav_r50_400ep", "swav_multicrop", 200),
        ("moco_v2_r152_200ep", ["efficientnet_b1"], "moco_v2_r152", "swav", 200),
    ],
)
def test_released_students_are_trained_as_their_files_names_and_the_readme_say(
    part: str, students: list[str], teacher: str, views: str, epochs: int
) -> None:
    """`SMALL_PATCH` in the name of a released file means local views."""
    option = f"experiments/checkpoints@_global_={part}"
    (config,) = configs("checkpoints", "full", option)
    assert list(config.students) == students
    assert (config.teacher.network, config.views.name, config.epochs) == (teacher, views, epochs)
    assert ("local" in config.views.crops) == (views == "swav_multicrop")


# published.csv


def rows() -> list[dict[str, str]]:
    with (HOME / "experiments" / "published.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_published_number_has_a_source_and_names_that_exist() -> None:
    recipes = {file.stem for file in (HOME / "conf" / "views").glob("*.yaml")}
    keys = []
    for row in rows():
        assert list(row) == COLUMNS
        other = row["objective"] in OTHER_METHODS
        assert row["student"] in STUDENTS.keys() | NETWORKS.keys() | OTHER_NETWORKS
        assert row["teacher"] in NETWORKS.keys() | {""} or other
        assert row["teacher_ssl"] in TEACHER_SSL.keys() | {""} or other
        assert other or row["objective"] in (OBJECTIVES if row["teacher"] else TEACHER_SSL)
        assert row["epochs"] == "" or int(row["epochs"]) > 0
        assert row["hidden_dim"] == "" or int(row["hidden_dim"]) > 0
        assert row["views"] in recipes | {""}
        assert row["protocol"] in {
            "knn",
            "linear_top1",
            "linear_top5",
            "linear_top1_gain",
            "semi_1pct",
            "semi_10pct",
        }
        assert row["dataset"] == "imagenet"
        assert re.fullmatch(r"\d\d\.\d\d?", row["value"])
        assert row["source"]
        keys.append(tuple(value for key, value in row.items() if key != "value"))
    assert len(set(keys)) == len(keys)


def test_teachers_have_the_accuracy_of_the_registry() -> None:
    for spec in TEACHERS.values():
        if (
            spec.network in NETWORKS
            and spec.top1 is not None
            and spec.teacher_ssl in {"moco_v1", "moco_v2", "swav"}
        ):
            what = {
                "student": spec.network,
                "teacher": "",
                "objective": spec.teacher_ssl,
                "epochs": str(spec.epochs),
            }
            values = [
                row["value"]
                for row in rows()
                if what.items() <= row.items() and row["protocol"] == "linear_top1"
            ]
            assert f"{spec.top1:.1f}" in values, spec


# Evaluations that follow a training.

TRAIN = [
    "data=digits",
    "views=digits",
    "data.num_workers=0",
    "device=cpu",
    "tracker=files",
    "student=convnet_w2",
]
TRAIN += [
    "steps=2",
    "batch_size=32",
    "moco.queue_size=64",
    "knn_bank_size=50",
    "knn_query_size=20",
    "run_dir=run",
]
BOTH = 'evaluations=["knn ks=[10]","linear views=linear_digits epochs=1 lrs=[1]"]'


def results(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in (folder / "results").glob("*.json"))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The options of each evaluation that was run, instead of which nothing is done."""
    calls: list[Any] = []
    for name in PROTOCOLS:
        monkeypatch.setitem(follow_up.PROTOCOLS, name, calls.append)
    return calls


def test_a_training_ends_with_its_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "job.run"))
    folder = pretrain.pretrain(compose("pretrain", [*TRAIN, BOTH]))
    assert results(folder) == ["knn", "linear"]
    assert announced(tmp_path / "job.run") == folder
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").iterdir()}
    assert pretrain.pretrain(compose("pretrain", [*TRAIN, BOTH])) == folder
    assert {path: path.stat().st_mtime_ns for path in (folder / "results").iterdir()} == before
    log = (folder / "log.txt").read_text()
    assert "knn ks=[10]: done before" in log
    assert "linear views=linear_digits epochs=1 lrs=[1]: done before" in log


def test_what_is_evaluated_changes_nothing_in_the_run(called: list[Any]) -> None:
    plain = pretrain.pretrain(compose("pretrain", TRAIN))
    students = (plain / "students" / "convnet_w2.safetensors").read_bytes()
    assert called == []
    assert pretrain.pretrain(compose("pretrain", [*TRAIN, "evaluations=[knn]"])) == plain
    assert pretrain.pretrain(compose("pretrain", [*TRAIN, "evaluations=[linear,knn]"])) == plain
    assert [type(config).__name__ for config in called] == ["KnnConfig", "LinearConfig"]
    assert (plain / "students" / "convnet_w2.safetensors").read_bytes() == students


def test_students_that_were_trained_on_are_evaluated_again(called: list[Any]) -> None:
    pretrain.pretrain(compose("pretrain", [*TRAIN, "evaluations=[knn]"]))
    (file,) = Path("run/students").iterdir()
    plan = plan_evaluations(compose("pretrain", [*TRAIN, "evaluations=[knn]"]))
    run_evaluations(plan, Path("run"))
    assert len(called) == 1
    file.write_bytes(file.read_bytes() + b" ")
    run_evaluations(plan, Path("run"))
    assert len(called) == 2


@pytest.mark.parametrize(
    ("error", "is_defect"),
    [(RuntimeError("broken"), True), (OSError(28, "No space left on device", "x.json"), False)],
)
def test_one_that_fails_loses_neither_the_run_nor_the_others_and_is_tried_again(
    called: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception, is_defect: bool
) -> None:
    def fail(_: Any) -> None:
        raise error

    config = compose("pretrain", [*TRAIN, "evaluations=[knn,linear]"])
    monkeypatch.setitem(follow_up.PROTOCOLS, "knn", fail)
    with pytest.raises(ValueError, match="run: the students are trained, but 'knn' failed"):
        pretrain.pretrain(config)
    assert [type(config).__name__ for config in called] == ["LinearConfig"]
    log = Path("run/log.txt").read_text()
    assert str(error) in log
    assert ("Traceback" in log) == is_defect
    assert not Path("run/done.json").exists()
    monkeypatch.setitem(follow_up.PROTOCOLS, "knn", called.append)
    pretrain.pretrain(config)
    assert [type(config).__name__ for config in called] == ["LinearConfig", "KnnConfig"]
    assert Path("run/done.json").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("evaluations=[knnn]", r"unknown evaluation 'knnn'; did you mean 'knn'\?"),
        ('evaluations=[knn,""]', "unknown evaluation ''"),
        ('evaluations=["knn ks=[0]"]', "numbers of neighbours above 0"),
        ('evaluations=["linear veiws=linear"]', "veiws"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, wrong: str, message: str
) -> None:
    for command, run in (("pretrain", pretrain.pretrain), ("distill", distill.distill)):
        options = [
            option for option in TRAIN if command == "pretrain" or not option.startswith("moco")
        ]
        with pytest.raises(Exception, match=message):  # of Hydra's, where it composes
            run(compose(command, [*options, wrong]))
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_has_the_images_and_the_device_of_the_training_unless_it_names_others(
    called: list[Any],
) -> None:
    root = """/data/it's "here", = {[$\\x]} é\\"""
    data = [
        "data=tsv",
        "data.root=x",
        "data.val_fraction=0.25",
        "data.on_error=raise",
        "precision=bfloat16",
        "seed=3",
    ]
    options = [
        *TRAIN[3:],
        *data,
        "views=digits",
        "tracker.tags=[a,b]",
        'evaluations=[knn,"linear seed=5 data.num_workers=2"]',
    ]
    config = compose("pretrain", options)
    config.data.root = root
    knn, linear = (evaluation.config for evaluation in plan_evaluations(config))
    assert knn.data == config.data
    assert (knn.device, knn.precision) == (config.device, config.precision)
    assert (linear.data.root, linear.data.num_workers, linear.seed, linear.tracker) == (
        root,
        2,
        5,
        config.tracker,
    )


def planned_detection(*options: str) -> Any:
    (evaluation,) = plan_evaluations(compose("pretrain", [*TRAIN, "precision=bfloat16", *options]))
    return evaluation.config


def test_detection_has_the_device_of_the_training_and_images_of_its_own() -> None:
    planned = planned_detection(
        "seed=3", "tracker.tags=[a]", 'evaluations=["detect data=coco data.root=c masks=true"]'
    )
    assert (planned.device, planned.seed, planned.tracker.tags) == ("cpu", 3, ["a"])
    assert (planned.data.source, planned.data.root, planned.masks) == ("coco", "c", True)
    assert planned.data.num_workers is None
    assert planned.precision is Precision.float32
    assert planned_detection("evaluations=[detect]").data == compose("detect", ["run=."]).data


def test_detection_has_the_images_of_a_training_on_images_with_objects() -> None:
    training = ["data=voc", "data.root=v", "data.num_workers=2"]
    planned = planned_detection(*training, "evaluations=[detect]")
    assert (planned.data.source, planned.data.root, planned.data.num_workers) == ("voc", "v", 2)
    with pytest.raises(ValueError, match=r"detect needs .*, all of them.* got data=voc data\.frac"):
        planned_detection(*training, "data.fraction=0.5", "evaluations=[detect]")


def test_every_evaluation_is_a_command_with_a_protocol_that_a_training_can_be_followed_by() -> None:
    assert PROTOCOLS.keys() == EVALUATIONS.keys()
    for name, kind in EVALUATIONS.items():
        assert PROTOCOLS[name].__module__ == f"seed_exp.protocols.{name}"
        assert type(compose(name, ["run=."])) is kind.schema


# The real thing. SEED_SMOKE_RUNS=FOLDER keeps the run folders, below FOLDER/runs, for a report
# of them.


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the teacher of the smoke scale."""
    home = Path(os.environ.get("SEED_SMOKE_RUNS") or tmp_path_factory.mktemp("smoke"))
    home.mkdir(parents=True, exist_ok=True)
    call("teachers", home)
    return home


def call(name: str, home: Path) -> set[Path]:
    """Types the experiment's command at the scale smoke; returns the run folders."""
    line = [
        sys.executable,
        "-m",
        f"seed_exp.{command_of(name)}",
        f"experiments={name}",
        "scale=smoke",
    ]
    done = forks.run(line, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folders = {
        home / folder for folder in re.findall(r"^run folder: (\S+)$", done.stderr, re.MULTILINE)
    }
    return {folder for folder in folders if folder.parent.name not in EVALUATIONS}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_at_the_scale_smoke(smoke: Path, name: str) -> None:
    folders = call(name, smoke)
    assert len(folders) == len(
        {json.dumps(decisive_options(to_plain(config))) for config in configs(name, "smoke")}
    )
    for folder in folders:
        assert {file.stem for file in (folder / "students").iterdir()} == {
            "convnet_w2",
            "convnet_w32",
        }
        assert results(folder) == ["knn", "linear"]
