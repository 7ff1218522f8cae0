"""Runs outlive changes of options: what has its first value neither names a run nor stops it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from seed_exp.config import identity as module
from seed_exp.config.compose import compose
from seed_exp.config.identity import (
    CHANGED_DEFAULTS,
    ChangedDefault,
    Removed,
    differences,
    digest,
    effective_options,
    first_values,
    identity,
)
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.config.schema import (
    EVALUATIONS,
    SCHEMAS,
    TRAINING,
    CropConfig,
    MocoConfig,
    PretrainConfig,
    StudentConfig,
)

WITH_RUN_FOLDERS = (*TRAINING, *(name for name, kind in EVALUATIONS.items() if kind.trains))
FIRST_VALUES = Path(__file__).with_name("first_values.json")
INPUTS = {"data": "digits[1500:abc]"}


@pytest.fixture(scope="module")
def composed() -> PretrainConfig:
    words = ["data=digits", "views=digits", "student=[convnet_w2,convnet_w32]", "seed=3"]
    config: PretrainConfig = compose("pretrain", words)
    return config


@pytest.fixture
def config(composed: PretrainConfig) -> PretrainConfig:
    return dataclasses.replace(composed)


def recorded(config: Any) -> dict[str, Any]:
    """The content of config.json, read back."""
    content: dict[str, Any] = json.loads(
        json.dumps({"options": to_plain(config), "inputs": INPUTS})
    )
    return content


def with_field(config: Any, name: str, default: Any, value: Any = ...) -> Any:
    """The config in a version whose schema has one more field."""
    kind: Any = type(default)
    field = (name, kind, dataclasses.field(default_factory=lambda: default))
    schema = dataclasses.make_dataclass(type(config).__name__, [field], bases=(type(config),))
    return schema(**vars(config), **({} if value is ... else {name: value}))


def assert_same_run(old: Any, new: Any) -> None:
    assert identity(new, INPUTS) == identity(old, INPUTS)
    assert differences(recorded(old), new, INPUTS) == []


def assert_other_run(old: Any, new: Any, *lines: str) -> None:
    assert identity(new, INPUTS) != identity(old, INPUTS)
    assert differences(recorded(old), new, INPUTS) == list(lines)


# --- a new option -------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [False, 0.5, "name", [1, 2]])
def test_a_new_option_with_its_default_changes_no_run(config: PretrainConfig, default: Any) -> None:
    assert_same_run(config, with_field(config, "new", default))


def test_a_new_option_with_another_value_is_another_run(config: PretrainConfig) -> None:
    assert_other_run(config, with_field(config, "new", 0.5, 0.7), "new was 0.5, now 0.7")


def test_a_new_option_of_a_group_changes_a_run_by_another_value_only(
    config: PretrainConfig,
) -> None:
    same = dataclasses.replace(config, moco=with_field(config.moco, "new", 1))
    assert_same_run(config, same)
    other = dataclasses.replace(config, moco=with_field(config.moco, "new", 1, 2))
    assert_other_run(config, other, "moco.new was 1, now 2")


def test_a_new_option_of_a_student_changes_a_run_by_another_value_only(
    config: PretrainConfig,
) -> None:
    def student(value: int) -> dict[str, StudentConfig]:
        return {
            **config.students,
            "convnet_w2": with_field(config.students["convnet_w2"], "new", 1, value),
        }

    assert_same_run(config, dataclasses.replace(config, students=student(1)))
    other = dataclasses.replace(config, students=student(2))
    assert_other_run(config, other, "students.convnet_w2.new was 1, now 2")


def test_narrower_schemas_of_one_field_are_told_apart_by_their_defaults(
    config: PretrainConfig,
) -> None:
    """The objectives are schemas that differ in their default name."""
    one, two = (
        dataclasses.make_dataclass(name, [("queue_size", int, size)], bases=(MocoConfig,))()
        for name, size in (("One", 7), ("Two", 8))
    )
    first, second = (dataclasses.replace(config, moco=moco) for moco in (one, two))
    assert_other_run(first, second, "moco.queue_size was 7, now 8")


def test_a_new_option_whose_default_does_not_reproduce_old_runs_is_another_run_unless_given(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHANGED_DEFAULTS, "PretrainConfig.new", ChangedDefault("0.2.0", 0))
    assert_other_run(config, with_field(config, "new", 7), "new was 0, now 7")
    assert_same_run(config, with_field(config, "new", 7, 0))


def test_an_option_that_must_be_given_is_in_every_identity(config: PretrainConfig) -> None:
    assert {"optimizer.name", "optimizer.lr", "data.source"} <= identity(config, INPUTS).keys()
    content = recorded(config)
    del content["options"]["optimizer"]["lr"]
    (line,) = differences(content, config, INPUTS)
    assert line == f"optimizer.lr was absent, now {config.optimizer.lr}"


# --- a changed default --------------------------------------------------------------------------


def version_with_another_default(config: PretrainConfig, **given: Any) -> PretrainConfig:
    """The config as a version composes it in which knn_query_size is 4000 unless given."""
    field = ("knn_query_size", int, 4000)
    schema = dataclasses.make_dataclass("PretrainConfig", [field], bases=(PretrainConfig,))
    values = {key: value for key, value in vars(config).items() if key != "knn_query_size"}
    newer: PretrainConfig = schema(**values, **given)
    return newer


def test_a_changed_default_renames_new_runs_and_keeps_old_ones(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = config.knn_query_size
    change = ChangedDefault("0.2.0", old)
    monkeypatch.setitem(CHANGED_DEFAULTS, "EncoderFitConfig.knn_query_size", change)
    new = version_with_another_default(config)
    assert_other_run(config, new, f"knn_query_size was {old}, now 4000")
    assert_same_run(config, version_with_another_default(config, knn_query_size=old))


def test_a_changed_default_that_nobody_entered_is_refused_in_old_runs(
    config: PretrainConfig,
) -> None:
    new = version_with_another_default(config)
    (line,) = differences(recorded(config), new, INPUTS)
    assert line == f"knn_query_size was {config.knn_query_size}, now 4000"


@pytest.mark.parametrize("command", ["distill", "pretrain"])
def test_an_automatic_queue_on_many_images_is_the_run_of_earlier_versions(command: str) -> None:
    part = {"distill": "objective", "pretrain": "moco"}[command]
    words = ["data=digits", "student=convnet_w2"]
    old = compose(command, [*words, f"{part}.queue_size=65536"])
    many, few = (compose(command, words).sized_for(num) for num in (1_281_167, 5000))
    assert_same_run(old, many)
    content = recorded(many)
    assert content["options"][part].pop("queue_size") == 65536
    assert differences(content, many, INPUTS) == [], "one that does not name it had 65536"
    assert_other_run(old, few, f"{part}.queue_size was 65536, now 2048")
    assert_same_run(compose(command, [*words, f"{part}.queue_size=2048"]), few)


# --- a removed option ---------------------------------------------------------------------------


def test_a_removed_option_is_ignored_where_it_made_no_difference(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = with_field(config, "gone", 1)
    assert differences(recorded(old), config, INPUTS) == ["gone was 1, now absent"]
    monkeypatch.setitem(module.REMOVED, "gone", Removed("0.2.0", (0, 1)))
    assert_same_run(old, config)
    other = with_field(config, "gone", 1, 2)
    assert_other_run(other, config, "gone was 2, now absent")
    monkeypatch.setitem(module.REMOVED, "gone", Removed("0.2.0", None))
    assert differences(recorded(other), config, INPUTS) == []


def test_a_removed_option_of_every_student_is_found(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = {
        name: with_field(student, "gone", 1, number)
        for number, (name, student) in enumerate(config.students.items())
    }
    old = dataclasses.replace(config, students=students)
    monkeypatch.setitem(module.REMOVED, "students.*.gone", Removed("0.2.0", (0,)))
    (line,) = differences(recorded(old), config, INPUTS)
    assert line == "students.convnet_w32.gone was 1, now absent"


def test_an_entry_for_a_removed_option_does_not_free_the_one_that_is_there(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.REMOVED, "seed", Removed("0.2.0", None))
    other = dataclasses.replace(config, seed=4)
    assert_other_run(config, other, "seed was 3, now 4")


# --- names that users choose --------------------------------------------------------------------


def test_a_crop_with_defaults_only_is_another_run(config: PretrainConfig) -> None:
    crops = {**config.views.crops, "other": CropConfig()}
    other = dataclasses.replace(config)
    other.views = dataclasses.replace(config.views, crops=crops)  # one that pretrain refuses
    line = "views.crops.* was ['global', 'local'], now ['global', 'local', 'other']"
    assert_other_run(config, other, line)


def test_a_student_less_is_another_run(config: PretrainConfig) -> None:
    other = dataclasses.replace(config, students={"convnet_w2": config.students["convnet_w2"]})
    lines = differences(recorded(config), other, INPUTS)
    assert lines[0] == "students.* was ['convnet_w2', 'convnet_w32'], now ['convnet_w2']"
    assert "students.convnet_w32.network was convnet_w32, now absent" in lines


# --- the rest -----------------------------------------------------------------------------------


def test_the_identity_has_no_more_than_what_was_chosen(config: PretrainConfig) -> None:
    chosen = identity(config, INPUTS)
    assert chosen["seed"] == 3
    assert chosen["content of data"] == INPUTS["data"]
    assert not chosen.keys() & {"accumulation", "precision", "moco.momentum", "tracker.name"}


def test_the_digest_depends_on_the_command_and_on_nothing_but_the_identity(
    config: PretrainConfig,
) -> None:
    chosen = identity(config, INPUTS)
    assert digest("pretrain", dict(reversed(chosen.items()))) == digest("pretrain", chosen)
    assert digest("distill", chosen) != digest("pretrain", chosen)


def test_an_address_signed_anew_is_the_same_run(config: PretrainConfig) -> None:
    def signed(signature: str) -> PretrainConfig:
        root = f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={signature}"
        return dataclasses.replace(config, data=dataclasses.replace(config.data, root=root))

    assert_same_run(signed("a1"), signed("b2"))


@pytest.mark.parametrize("nested", [True, False])
def test_effective_options_are_what_this_version_would_have_recorded(
    config: PretrainConfig, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = to_plain(config)
    full = decisive_options(options)
    assert effective_options("pretrain", options if nested else full) == full
    del options["accumulation"], options["students"]["convnet_w2"]["epochs"], options["moco"]
    options["gone"], options["kept"] = 1, 2
    monkeypatch.setitem(module.REMOVED, "gone", Removed("0.2.0", (1,)))
    old = options if nested else decisive_options(options)
    # A version without the options of batch norm's groups had none, and its queue had a size.
    expected = {**full, "moco.bn_group_size": None, "moco.queue_size": 65536, "kept": 2}
    assert effective_options("pretrain", old) == expected


def test_a_released_student_goes_on_with_timms_rule_and_other_networks_without_a_word() -> None:
    """Versions before the rule had timm's weights, and no option that says so."""
    words = ["data=digits", "views=digits", "student=[resnet18,convnet_w2]"]
    old = recorded(compose("pretrain", words))
    del old["options"]["students"]["resnet18"]["init_rule"]
    del old["options"]["students"]["convnet_w2"]["init_rule"]
    now: PretrainConfig = compose("pretrain", words)
    assert differences(old, now, INPUTS) == ["students.resnet18.init_rule was timm, now released"]
    before: PretrainConfig = compose("pretrain", [*words, "students.resnet18.init_rule=timm"])
    assert differences(old, before, INPUTS) == []


def test_every_first_value_is_written_down() -> None:
    """A changed default would rename old runs, or mix them with new ones, if nobody noticed."""
    found = {}
    for command in WITH_RUN_FOLDERS:
        found |= first_values(SCHEMAS[command])
    written = json.loads(FIRST_VALUES.read_text())
    hint = "see the rules in seed_exp/config/identity.py, then correct first_values.json"
    assert found == written, hint


@pytest.mark.parametrize("entry", CHANGED_DEFAULTS)
def test_an_entry_names_an_option_whose_default_is_another_value(entry: str) -> None:
    schema, _, name = entry.partition(".")
    owner = getattr(__import__("seed_exp.config.schema", fromlist=[schema]), schema)
    (field,) = (field for field in dataclasses.fields(owner) if field.name == name)
    assert to_plain(field.default) != CHANGED_DEFAULTS[entry].before


def test_options_of_an_architecture_tell_runs_apart_once_and_none_is_what_versions_before_did(
    config: PretrainConfig,
) -> None:
    def students(**args: Any) -> dict[str, StudentConfig]:
        return {"vit": StudentConfig("timm", "test_vit", args=args)}

    plain, other = (
        dataclasses.replace(config, students=students(**args))
        for args in ({}, {"drop_path_rate": 0.1, "depth": 3})
    )
    old = recorded(plain)
    del old["options"]["students"]["vit"]["args"]
    assert differences(old, plain, INPUTS) == []
    assert not any(".args" in key for key in identity(plain, INPUTS))
    assert {key for key in identity(other, INPUTS) if ".args" in key} == {
        "students.vit.args.depth",
        "students.vit.args.drop_path_rate",
    }
    assert_other_run(
        plain,
        other,
        "students.vit.args.depth was absent, now 3",
        "students.vit.args.drop_path_rate was absent, now 0.1",
    )
    full = decisive_options(to_plain(other))
    assert effective_options("pretrain", full) == full
    assert differences(recorded(other), other, INPUTS) == []
