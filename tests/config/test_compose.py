from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from seed_exp.config import schema
from seed_exp.config.compose import compose, config_home
from seed_exp.config.errors import explain
from seed_exp.config.options import flatten, to_plain
from seed_exp.config.schema import (
    EVALUATIONS,
    SCHEMAS,
    CropConfig,
    DataConfig,
    FitConfig,
    KnnConfig,
    LinearConfig,
    MocoConfig,
    OptimizerConfig,
    PretrainConfig,
    PreviewConfig,
    QuickstartConfig,
    ScheduleName,
    SeedConfig,
    StudentConfig,
    ViewsConfig,
)
from seed_exp.config.sweep import jobs
from seed_exp.data.sources import SOURCES
from seed_exp.engine.optimizers import OPTIMIZERS
from seed_exp.engine.tracking import TRACKERS
from seed_exp.methods.objectives import OBJECTIVES
from seed_exp.models.students import STUDENTS
from seed_exp.models.teacher_ssl import TEACHER_SSL
from seed_exp.models.teachers import TEACHERS
from seed_exp.models.timm_teachers import TIMM_TEACHERS
from seed_exp.tools.bench import BENCHES

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted((CONF.parent / "experiments").glob("*.yaml"))
REQUIRED = {
    **{name: ["run=x"] for name in (*EVALUATIONS, "export", "embed")},
    **{"bench": ["bench=loss"], "convert": ["to=tsv", "output=x"]},
}
NEEDS = {
    "student=timm": ["students.timm.name=resnet26"],
    "student=custom": ["students.custom.network=my_nets:build"],
    "teacher=custom": ["teacher.network=my_nets:build"],
    "data=torchvision": ["data.name=CIFAR10"],
    "teacher=run": ["teacher.checkpoint=x"],
    "teacher=timm": ["teacher.name=vit_tiny_patch16_224"],
}
NAMED = {"timm": "resnet26"}
"""Students whose name is not that of the option that chooses them."""
BY_PRIMARY = {
    ("pretrain", "views"): ["crops.global.num", "crops.local.num"],
    ("linear", "views"): ["crops.local.num"],
    ("finetune", "views"): ["crops.local.num"],
}
"""Values that a primary file sets itself, whatever the option says."""


def options_of(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def load(group: str, option: str) -> dict[str, Any]:
    """Values that an option file sets, less those left to the command line by it or this test."""
    values = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"), resolve=False)
    assert isinstance(values, dict)
    left = {"defaults", "root", "checkpoint"} | {
        key for key, value in values.items() if value == "???"
    }
    return {str(key): value for key, value in values.items() if key not in left}


SEVERAL_PARTS = ("experiments", "recipe", "scale")
"""Groups whose options set several parts of the config."""


def groups_of(command: str) -> list[str]:
    """The config groups that a primary file lists."""
    defaults = OmegaConf.load(CONF / f"{command}.yaml").defaults
    groups = [str(next(iter(entry))) for entry in defaults if isinstance(entry, DictConfig)]
    return [
        group
        for group in groups
        if not group.startswith(("override", "optional")) and group not in SEVERAL_PARTS
    ]


def choices() -> Iterator[Any]:
    """Every option with every command that lists its group.

    A group has the same schema in all commands: by default, each option is tried with one command,
    and each command with one option of each of its groups. Most teachers of timm differ in names
    only.
    """
    tried = set[tuple[str, str]]()
    for command in SCHEMAS:
        for group in groups_of(command):
            first = True
            for option in options_of(group):
                sources = EVALUATIONS[command].sources if command in EVALUATIONS else None
                if group == "data" and option not in (sources or (option,)):
                    continue  # images without objects or masks: an error
                alike = option in TIMM_TEACHERS and not option.endswith("_s")
                new = first or not ((group, option) in tried or alike)
                marks = () if new else pytest.mark.slow
                yield pytest.param(command, group, option, marks=marks)
                tried.add((group, option))
                first = False


def test_every_command_has_a_primary_file_and_every_group_a_command() -> None:
    assert {file.stem for file in CONF.glob("*.yaml")} == SCHEMAS.keys()
    folders = {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {
        "hydra",
        "crops",
        *SEVERAL_PARTS,
    }
    assert {group for command in SCHEMAS for group in groups_of(command)} == folders
    assert config_home() == CONF.parent


@pytest.mark.parametrize(("command", "group", "option"), list(choices()), ids=lambda value: value)
def test_every_option_composes_and_types_with_every_command_that_lists_its_group(
    command: str, group: str, option: str
) -> None:
    choice = f"{group}={option}"
    config = compose(
        command, [*REQUIRED.get(command, []), choice, "data.root=/x", *NEEDS.get(choice, [])]
    )
    assert type(config) is SCHEMAS[command]
    file = flatten(load(group, option))
    for key in BY_PRIMARY.get((command, group), []):
        file.pop(key, None)
    owner = {
        "student": lambda: config.students[NAMED.get(option, option)],
        "bench": lambda: config,
    }.get(group, lambda: getattr(config, group))
    chosen = flatten(to_plain(owner()))
    assert {key: chosen[key] for key in file} == file


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_composes_and_types_with_the_command_in_its_first_lines(
    file: Path,
) -> None:
    line = re.search(rf"python -m seed_exp\.(\w+) experiments={file.stem}\b", file.read_text())
    assert line is not None
    config = compose(line[1], [f"experiments={file.stem}"])
    assert flatten(to_plain(config)) != flatten(to_plain(compose(line[1])))
    teacher = getattr(config, "teacher", None)
    brought = None if teacher is None else TEACHERS[teacher.network].teacher_ssl
    assert brought is None or config.teacher_ssl.name == brought
    assert compose(line[1], [f"experiments={file.stem}", "seed=7"]).seed == 7


@pytest.mark.parametrize(
    ("group", "registry"),
    [
        ("student", STUDENTS),
        ("teacher", TEACHERS),
        ("teacher_ssl", TEACHER_SSL),
        ("optimizer", OPTIMIZERS),
        ("objective", OBJECTIVES),
        ("tracker", TRACKERS),
        ("data", SOURCES),
        ("bench", BENCHES),
    ],
)
def test_option_files_and_registry_keys_are_the_same_set(
    group: str, registry: dict[str, Any]
) -> None:
    key = {"student": "network", "teacher": "network", "data": "source", "bench": "bench"}.get(
        group, "name"
    )
    found = {name: load(group, name).get(key) for name in options_of(group)}
    if group in ("student", "teacher"):
        assert found.pop("custom") is None  # left to the command line
    if group == "student":  # some are a network of timm under a shorter name
        found = {
            name: network
            for name, network in found.items()
            if name == "timm" or network != "timm" or not load(group, name)["name"]
        }
    assert found == {name: name for name in registry}


@pytest.mark.parametrize("name", options_of("student"))
def test_each_student_file_puts_itself_under_its_own_name(name: str) -> None:
    assert (CONF / "student" / f"{name}.yaml").read_text().splitlines()[
        0
    ] == f"# @package students.{name}"


@pytest.mark.parametrize("name", [name for name, spec in TEACHERS.items() if spec.teacher_ssl])
def test_a_teacher_brings_its_convention_and_the_command_line_wins(name: str) -> None:
    brought = TEACHERS[name].teacher_ssl
    assert compose("distill", [f"teacher={name}"]).teacher_ssl.name == brought
    if name not in ("resnet50", "swav_r50w2"):  # the order does not depend on the teacher
        return
    other = next(convention for convention in TEACHER_SSL if convention != brought)
    for overrides in (
        [f"teacher={name}", f"teacher_ssl={other}"],
        [f"teacher_ssl={other}", f"teacher={name}"],
    ):
        config = compose("distill", overrides)
        assert (config.teacher.network, config.teacher_ssl.name) == (name, other)


def test_a_list_of_students_gives_all_of_them() -> None:
    config = compose(
        "distill", ["student=[resnet18,efficientnet_b0]", "students.resnet18.hidden_dim=2048"]
    )
    assert config.students == {
        "resnet18": StudentConfig("resnet18", hidden_dim=2048, deep_head=False),
        "efficientnet_b0": StudentConfig("efficientnet_b0", deep_head=False),
    }


def test_the_main_command_has_the_values_of_the_paper() -> None:
    config = compose("distill", ["student=efficientnet_b1", "teacher=swav_r50"])
    assert config.students == {
        "efficientnet_b1": StudentConfig(
            "efficientnet_b1", hidden_dim=None, deep_head=False, init=None
        )
    }
    assert (config.teacher.network, config.teacher_ssl.name) == ("swav_r50", "swav")
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (
        "sgd",
        0.03,
        0.9,
        1e-4,
    )
    assert (optimizer.schedule, optimizer.warmup_epochs) == (ScheduleName.cosine, 5)
    objective = config.objective
    assert (objective.name, objective.queue_size, objective.tau_student, objective.tau_teacher) == (
        "seed",
        "auto",
        0.2,
        0.01,
    )
    assert (config.batch_size, config.epochs, config.steps, config.accumulation) == (
        256,
        200,
        None,
        1,
    )
    views = config.views
    assert views.crops == {"global": CropConfig(224, 1, [0.2, 1.0])}
    assert (views.jitter, views.jitter_prob) == ([0.4, 0.4, 0.4, 0.1], 0.8)
    assert (views.grayscale_prob, views.blur_prob, views.blur_sigma, views.flip_prob) == (
        0.2,
        0.5,
        [0.1, 2.0],
        0.5,
    )
    assert (views.mean, views.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert config.data.source == "imagenet"


@pytest.mark.parametrize("words", [[], ["scale=small"], ["experiments=table1"]])
def test_the_patient_recipe_wins_over_scale_and_experiment(words: list[str]) -> None:
    config = compose("distill", ["recipe=patient", "student=resnet18", *words])
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 2e-4, 1e-6)
    assert (optimizer.clip_grad_norm, config.epochs, config.views.mixup) == (1, 800, True)


@pytest.mark.parametrize("command", ["distill", "pretrain"])
def test_a_smaller_scale_keeps_the_rate_of_adamw_and_the_command_line_wins(command: str) -> None:
    optimizer = compose(command, ["optimizer=adamw", "scale=small"]).optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup_epochs) == (5e-4, 0.04, 10)
    assert compose(command, ["scale=small"]).optimizer.lr == 0.03
    words = ["optimizer=adamw", "scale=small", "optimizer.lr=0.001"]
    assert compose(command, words).optimizer.lr == 0.001


def test_multi_crop_adds_six_local_views() -> None:
    views = compose("distill", ["views=swav_multicrop"]).views
    assert views.crops == {
        "global": CropConfig(224, 1, [0.14, 1.0]),
        "local": CropConfig(96, 6, [0.05, 0.14]),
    }


def test_linear_evaluation_has_the_protocol_of_moco() -> None:
    config = compose("linear", ["run=x"])
    optimizer = config.optimizer
    assert 30 in config.lrs
    assert (config.epochs, config.batch_size, optimizer.name, optimizer.momentum) == (
        100,
        256,
        "sgd",
        0.9,
    )
    assert (optimizer.weight_decay, optimizer.warmup_epochs) == (0, 0)
    assert (optimizer.schedule, optimizer.milestones, optimizer.gamma) == (
        ScheduleName.step,
        [60, 80],
        0.1,
    )
    assert config.views.crops["global"] == CropConfig(224, 1, [0.08, 1.0])
    assert config.views.crops["local"].num == 0
    assert (config.views.eval_resize, config.views.eval_size, config.views.flip_prob) == (
        256,
        224,
        0.5,
    )


def test_pretrain_takes_two_global_views_of_every_recipe() -> None:
    assert compose("pretrain").views.crops["global"].num == 2
    with pytest.raises(
        ValueError, match=r"pretrain needs two global views .* views\.crops\.global\.num is 3"
    ):
        compose("pretrain", ["views.crops.global.num=3"])


def test_imagenet_is_the_folder_in_the_environment_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEED_DATA", "/somewhere")
    assert compose("distill").data.root == "/somewhere"
    assert compose("distill", ["data.root=/elsewhere"]).data.root == "/elsewhere"
    monkeypatch.delenv("SEED_DATA")
    assert compose("distill").data.root is None


@pytest.mark.parametrize("command", ["linear", "knn"])
def test_an_evaluation_without_its_run_is_refused(command: str) -> None:
    with pytest.raises(ValueError, match="missing option run: add run=VALUE"):
        compose(command)


@pytest.mark.parametrize(
    "override",
    ["+foo=1", "+optimizer.foo=1", "+views.crops.global.foo=1", "+students.resnet18.foo=1"],
)
def test_an_option_that_nothing_reads_is_refused_wherever_it_is_added(override: str) -> None:
    key = override.removeprefix("+").removesuffix("=1")
    with pytest.raises(ValueError, match=f"no option '{key}'"):
        compose("distill", [override])


# Refusals of schema.py. Numbers: by option, how to make the config, where the accepted range
# begins and ends.

CROPS = {"global": CropConfig()}
Make = Callable[..., Any]


def views(**options: Any) -> ViewsConfig:
    return ViewsConfig(**{"name": "x", "crops": CROPS, **options})


def optimizer(**options: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"name": "sgd", "lr": 1.0, **options})


def pretrain(**options: Any) -> PretrainConfig:
    two = views(crops={"global": CropConfig(num=2)})
    return PretrainConfig(**{"students": {"a": StudentConfig("resnet18")}, "views": two, **options})


def linear(**options: Any) -> LinearConfig:
    return LinearConfig(**{"lrs": [1.0], **options})


FLOATS: list[
    tuple[Make, str, float, float, str]
] = [  # make, option, lower end, upper end, which ends belong to the range
    (views, "jitter_prob", 0, 1, "[]"),
    (views, "grayscale_prob", 0, 1, "[]"),
    (views, "blur_prob", 0, 1, "[]"),
    (views, "flip_prob", 0, 1, "[]"),
    (DataConfig, "val_fraction", 0, 1, "[)"),
    (optimizer, "lr", 0, math.inf, "(]"),
    (optimizer, "momentum", 0, 1, "[)"),
    (optimizer, "weight_decay", 0, math.inf, "[]"),
    (optimizer, "trust_coefficient", 0, math.inf, "(]"),
    (optimizer, "clip_grad_norm", 0, math.inf, "(]"),
    (optimizer, "warmup_epochs", 0, math.inf, "[]"),
    (optimizer, "gamma", 0, math.inf, "(]"),
    (pretrain, "ema_decay", 0, 1, "()"),
    (SeedConfig, "tau_student", 0, math.inf, "(]"),
    (SeedConfig, "tau_teacher", 0, math.inf, "(]"),
    (MocoConfig, "temperature", 0, math.inf, "(]"),
    (MocoConfig, "momentum", 0, 1, "[]"),
    (FitConfig, "eval_every", 0, math.inf, "[]"),
    (KnnConfig, "temperature", 0, math.inf, "(]"),
    (DataConfig, "max_bad", 0, 1, "[]"),
]

INTEGERS: list[tuple[Make, str, int]] = [  # make, option, smallest accepted value
    (CropConfig, "size", 2),
    (CropConfig, "num", 0),
    (StudentConfig, "hidden_dim", 0),
    (DataConfig, "num_workers", 0),
    (SeedConfig, "queue_size", 1),
    (MocoConfig, "queue_size", 1),
    (FitConfig, "epochs", 1),
    (FitConfig, "steps", 1),
    (FitConfig, "batch_size", 1),
    (FitConfig, "accumulation", 1),
    (FitConfig, "log_every", 1),
    (FitConfig, "checkpoint_every", 1),
    (FitConfig, "keep_every", 1),
    (FitConfig, "max_skipped", 0),
    (StudentConfig, "epochs", 1),
    (pretrain, "knn_bank_size", 1),
    (pretrain, "knn_query_size", 1),
    (pretrain, "embedding_dim", 1),
    (KnnConfig, "batch_size", 1),
    (PreviewConfig, "epoch", 0),
    (PreviewConfig, "num_images", 1),
    (QuickstartConfig, "steps", 1),
]


def refusal(make: Make, **options: Any) -> str:
    """The message with which the options are refused; empty when they are accepted."""
    try:
        make(**options)
    except ValueError as error:
        return str(error)
    return ""


def assert_refused(make: Make, option: str, value: Any, expected: bool) -> None:
    """Checks that a value is refused if expected, with a message that names option and value."""
    message = refusal(make, **{option: value})
    assert bool(message) == expected
    if expected:
        assert {"size": "crop size", "num": "number of views", "scale": "crop scale"}.get(
            option, option
        ) in message
        assert str(value) in message


@pytest.mark.parametrize(
    ("make", "option", "low", "high", "ends"),
    FLOATS,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@given(data=st.data())
def test_a_float_is_accepted_exactly_inside_its_range(
    make: Make, option: str, low: float, high: float, ends: str, data: st.DataObject
) -> None:
    near_ends = st.sampled_from(
        [
            low,
            -low,
            math.nextafter(low, -1),
            math.nextafter(low, 1),
            high,
            math.nextafter(high, 2),
            math.nan,
        ]
    )
    value = data.draw(st.floats() | st.floats(-2, 2) | near_ends)
    above = value > low or (value == low and ends[0] == "[")
    below = value < high or (value == high and ends[1] == "]")
    assert_refused(make, option, value, not (above and below))


@pytest.mark.parametrize(
    ("make", "option", "smallest"),
    INTEGERS,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@given(value=st.integers(-(2**62), 2**62) | st.integers(-3, 3))
def test_an_integer_is_accepted_exactly_from_its_smallest_value_on(
    make: Make, option: str, smallest: int, value: int
) -> None:
    assert_refused(make, option, value, value < smallest)


@given(scale=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=3))
def test_a_crop_scale_is_two_ordered_shares_of_the_area(scale: list[float]) -> None:
    good = len(scale) == 2 and scale[0] > 0 and scale[0] <= scale[1] and scale[1] <= 1
    assert_refused(CropConfig, "scale", scale, not good)


@pytest.mark.parametrize("option", ["blur_sigma", "aspect_ratio"])
@given(ends=st.lists(st.floats(-1, 3), min_size=1, max_size=3))
def test_a_range_is_two_ordered_numbers_above_zero(option: str, ends: list[float]) -> None:
    good = len(ends) == 2 and ends[0] > 0 and ends[1] >= ends[0]
    assert_refused(views, option, ends, not good)


@given(jitter=st.lists(st.floats(-0.1, 1), min_size=3, max_size=5))
def test_jitter_is_four_strengths_with_at_most_half_a_turn_of_hue(jitter: list[float]) -> None:
    good = len(jitter) == 4 and all(value >= 0 for value in jitter) and jitter[3] <= 0.5
    assert_refused(views, "jitter", jitter, not good)


@given(eval_size=st.integers(-2, 6), eval_resize=st.integers(-2, 6))
def test_the_evaluation_crop_fits_into_the_resized_image(eval_size: int, eval_resize: int) -> None:
    message = refusal(views, eval_size=eval_size, eval_resize=eval_resize)
    assert bool(message) == (eval_size <= 0 or eval_resize < eval_size)
    assert not message or f"got {eval_size} and {eval_resize}" in message


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (views, {"crops": {}}, "at least one global view"),
        (
            views,
            {"crops": {"local": CropConfig()}},
            r"at least one global view; views.crops has \['local'\]",
        ),
        (views, {"crops": {"global": CropConfig(num=0)}}, "at least one global view"),
        (views, {"mean": [0.5]}, "need 3 finite values each"),
        (views, {"std": [0.5, 0.5, 0.0]}, "std > 0"),
        (optimizer, {"betas": [0.9]}, r"betas must be two numbers in \[0, 1\), got \[0.9\]"),
        (optimizer, {"betas": [0.9, 1.0]}, r"betas must be two numbers in \[0, 1\)"),
        (pretrain, {"students": {}}, "no student to train; choose one, e.g. student=resnet18"),
        (linear, {"lrs": []}, r"positive learning rates, got \[\]"),
        (linear, {"lrs": [1.0, 0.0]}, r"positive learning rates, got \[1.0, 0.0\]"),
        (linear, {"networks": []}, "names no student"),
        (QuickstartConfig, {"seeds": []}, "at least one seed"),
        (KnnConfig, {"networks": []}, "names no student"),
        (KnnConfig, {"ks": []}, r"numbers of neighbours above 0, got \[\]"),
        (KnnConfig, {"ks": [10, 0]}, r"numbers of neighbours above 0, got \[10, 0\]"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    make: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


SCHEMA_CLASSES = [kind for _, kind in inspect.getmembers(schema, dataclasses.is_dataclass)]


@pytest.mark.parametrize("kind", SCHEMA_CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_of_the_schema_has_its_meaning_under_it(kind: type[Any]) -> None:
    definition = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(below, ast.Expr), ast.unparse(field)
            assert len(ast.literal_eval(below.value)) > 5, ast.unparse(field)


# The jobs of a sweep.


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", [""]),
        ("seed=3 student=resnet34", ["seed=3 student=resnet34"]),
        ("seed=0,1", ["seed=0", "seed=1"]),
        (
            "student=resnet18,resnet34 epochs=3 seed=range(0,2)",
            [
                f"student={student} epochs=3 seed={seed}"
                for student in ("resnet18", "resnet34")
                for seed in (0, 1)
            ],
        ),
        (
            "student=[resnet18,resnet34],convnet_w2",
            ["student=[resnet18,resnet34]", "student=convnet_w2"],
        ),
        (
            "experiments=table1_moco_v2_r50 seed=0,1",
            [f"experiments=table1_moco_v2_r50 seed={seed}" for seed in (0, 1)],
        ),
        ("seed=0,1 hydra.job.num=3", ["hydra.job.num=3 seed=0", "hydra.job.num=3 seed=1"]),
    ],
)
def test_a_command_line_has_a_job_for_each_combination_of_its_values(
    overrides: str, expected: list[str]
) -> None:
    found = jobs("distill", overrides.split())
    assert [" ".join(job) for job in found] == expected
    for job in found:
        assert type(compose("distill", job)) is SCHEMAS["distill"]


@pytest.fixture
def swept_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment `ablation` that is itself a sweep."""
    (tmp_path / "conf").symlink_to(CONF)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "ablation.yaml").write_text(
        "# @package _global_\nepochs: 7\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,1\n"
        "      objective.tau_teacher: 0.1,0.01\n"
    )
    for module in ("compose", "sweep"):
        monkeypatch.setattr(f"seed_exp.config.{module}.config_home", lambda: tmp_path)


def test_a_folder_beside_experiments_is_no_config_group(
    swept_experiment: None, tmp_path: Path
) -> None:
    for folder in ("runs", "seed", "output", "data", "epochs", "experiment"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "runs.yaml").write_text("epochs: 1\n")
    (tmp_path / "report.yaml").write_text("title: another\n")
    assert compose("report", ["runs=[runs]", "output=runs"]).runs == ["runs"]
    assert compose("report", ["output=runs"]).title == "Self-supervised distillation"
    config = compose("distill", ["epochs=3", "seed=4", "data=digits"])
    assert (config.epochs, config.seed, config.data.source) == (3, 4, "digits")
    with pytest.raises(HydraException, match="experiments/ablaton"):
        compose("distill", ["experiments=ablaton"])


def test_an_experiment_may_be_a_sweep_and_the_command_line_wins(swept_experiment: None) -> None:
    found = jobs("distill", ["experiments=ablation"])
    assert [job[:2] for job in found] == [
        [f"seed={seed}", f"objective.tau_teacher={tau}"]
        for seed in (0, 1)
        for tau in ("0.1", "0.01")
    ]
    configs = [compose("distill", job) for job in found]
    assert [(config.epochs, config.seed, config.objective.tau_teacher) for config in configs] == [
        (7, 0, 0.1),
        (7, 0, 0.01),
        (7, 1, 0.1),
        (7, 1, 0.01),
    ]
    found = jobs("distill", ["experiments=ablation", "seed=5", "student=resnet18,resnet34"])
    configs = [compose("distill", job) for job in found]
    assert [
        (config.seed, config.objective.tau_teacher, *config.students) for config in configs
    ] == [(5, tau, student) for tau in (0.1, 0.01) for student in ("resnet18", "resnet34")]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("experiments=table", "no option 'table' in config group 'experiments'"),
        ("seed=interval(0,1)", "BasicSweeper does not support sweep type"),
        ("hydra.job.num=1,2", "Sweeping over Hydra's configuration is not supported"),
        ("seed", "cannot read 'seed'"),
        ("studnt=resnet18", "no option 'studnt'; did you mean 'student'?"),
        ("objective.tau_techer=3", "did you mean objective.tau_teacher?"),
    ],
)
def test_what_hydra_would_refuse_to_sweep_is_refused(override: str, expected: str) -> None:
    with pytest.raises(HydraException) as refused:
        jobs("distill", [override, "epochs=3"])
    assert expected in explain(refused.value)


def test_an_experiment_of_another_command_is_refused_with_what_this_one_does_not_have() -> None:
    with pytest.raises(HydraException) as refused:
        jobs("knn", ["experiments=table1", "run=x"])
    assert "no config group 'student', which experiments/table1 chooses" in explain(refused.value)
    composing = "In 'experiments/mine': ConfigKeyError raised while composing config:"
    error = HydraException(f"{composing}\nKey 'moco' not in 'DistillConfig'\n    full_key: moco")
    assert explain(error) == f"{composing} Key 'moco' not in 'DistillConfig'"


GENERAL = ["teacher=timm", "teacher.name=resnet18"], ["teacher=dinov2_s"], ["teacher=eupe_t"]


@pytest.mark.parametrize("teacher", GENERAL, ids=lambda words: words[0])
def test_a_teacher_without_a_head_brings_its_objective_and_the_command_line_wins(
    teacher: list[str],
) -> None:
    assert compose("distill", teacher).objective.name == "seed_general"
    assert compose("distill", [*teacher, "objective=seed"]).objective.name == "seed"
    assert compose("distill", ["objective=coss", *teacher]).objective.name == "coss"
    assert compose("distill", ["teacher=swav_r50"]).objective.name == "seed"
    with pytest.raises(ValueError, match=r"tau_teacher=0\.01 and .*=10 both choose"):
        compose("distill", [*teacher, "objective.tau_teacher=0.01"])
    free = ["objective.tau_teacher=0.01", "objective.effective_neighbours=null"]
    assert compose("distill", [*teacher, *free]).objective.tau_teacher == 0.01


@pytest.mark.parametrize("scale", ["full", "small"])
def test_the_recipe_of_few_steps_keeps_its_rate_at_each_scale(scale: str) -> None:
    optimizer = compose("distill", ["recipe=few_steps", f"scale={scale}"]).optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 8e-3, 0.05)
