from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from omegaconf import OmegaConf
from ranks import Ranks

from seed_exp.base.stopping import Stopped
from seed_exp.config.identity import digest, identity
from seed_exp.config.options import flatten, to_plain
from seed_exp.config.schema import (
    CropConfig,
    DataConfig,
    DistillConfig,
    OptimizerConfig,
    ScheduleName,
    SeedConfig,
    StudentConfig,
    TeacherConfig,
    TeacherSSLConfig,
    TrackerConfig,
    ViewsConfig,
)
from seed_exp.engine import distributed, run, run_folder
from seed_exp.engine.run_folder import log_to, run_lock


def config() -> DistillConfig:
    return DistillConfig(
        students={"a": StudentConfig("resnet18"), "b": StudentConfig("timm", name="test_vit")},
        views=ViewsConfig("mocov2", {"global": CropConfig(), "local": CropConfig(96, 6)}),
        optimizer=OptimizerConfig(
            "sgd", 0.03, schedule=ScheduleName.step, milestones=[100.0, 150.0]
        ),
        data=DataConfig("digits"),
        tracker=TrackerConfig("files"),
        teacher=TeacherConfig("swav_r50"),
        teacher_ssl=TeacherSSLConfig("swav"),
        objective=SeedConfig(),
    )


def changed(option: str) -> DistillConfig:
    """The config with another value of one option, e.g. data.num_workers."""
    out = config()
    *path, name = option.split(".")
    owner: Any = out
    for part in path:
        owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
    value = getattr(owner, name)
    if isinstance(value, bool):
        new: Any = not value
    elif isinstance(value, int | float):
        new = value + 1
    elif isinstance(value, list):
        new = [*value, 7] if option != "tracker.tags" else ["x"]
    elif isinstance(value, Enum):
        new = next(member for member in type(value) if member is not value)
    else:
        new = "another"
    setattr(owner, name, new)
    return out


INPUTS = {"training images": "digits[1500:abc]"}


def open_run(
    command: str, label: str, own: DistillConfig, root: Path, inputs: dict[str, str] = INPUTS
) -> Path:
    folder = run_folder.folder_of(command, label, own, inputs, root)
    run_folder.claim_folder(folder, command, own, inputs)
    return folder


OPTIONS = sorted(set(flatten(to_plain(config()))))


CHANGE_NO_NUMBER = (
    {
        "device",
        "log_every",
        "checkpoint_every",
        "keep_every",
        "resume",
        "teacher_cache",
        "evaluations",
        "command",
    }
    | {"data.num_workers", "data.download", "data.on_error", "data.max_bad"}
    | {option for option in OPTIONS if option.startswith("tracker.")}
)


@pytest.mark.parametrize("option", sorted(CHANGE_NO_NUMBER))
def test_options_that_change_no_number_lead_to_the_same_folder(option: str, tmp_path: Path) -> None:
    folder = open_run("distill", "label", config(), tmp_path)
    assert open_run("distill", "label", changed(option), tmp_path) == folder


@pytest.mark.parametrize("option", sorted(set(OPTIONS) - CHANGE_NO_NUMBER - {"run_dir"}))
def test_every_other_option_leads_to_another_folder_and_is_refused_in_the_old_one(
    option: str, tmp_path: Path
) -> None:
    folder = open_run("distill", "label", config(), tmp_path)
    other = changed(option)
    assert open_run("distill", "label", other, tmp_path) != folder
    other.run_dir = str(folder)
    old, new = flatten(to_plain(config()))[option], flatten(to_plain(other))[option]
    with pytest.raises(ValueError, match="holds a run with other options") as error:
        open_run("distill", "label", other, tmp_path)
    assert str(error.value).count(" was ") == 1
    assert f"{option} was {old}, now {new}." in str(error.value)
    assert "choose another run_dir" in str(error.value)


def test_the_name_begins_with_the_label_and_stays_the_same(tmp_path: Path) -> None:
    folder = open_run("distill", "resnet18-swav_r50", config(), tmp_path)
    assert folder.parent == tmp_path
    assert folder.name.startswith("resnet18-swav_r50-")
    assert open_run("distill", "resnet18-swav_r50", config(), tmp_path) == folder
    assert (
        open_run("distill", "resnet18-swav_r50", config(), tmp_path / "elsewhere").name
        == folder.name
    )


def test_other_content_of_what_the_run_reads_leads_to_another_folder_and_is_refused_in_the_old_one(
    tmp_path: Path,
) -> None:
    folder = open_run("distill", "label", config(), tmp_path)
    other = {"training images": "digits[1500:def]"}
    assert open_run("distill", "label", config(), tmp_path, other) != folder
    own = dataclasses.replace(config(), run_dir=str(folder))
    message = r"content of training images was digits\[1500:abc\], now digits\[1500:def\]"
    with pytest.raises(ValueError, match=message):
        open_run("distill", "label", own, tmp_path, other)


def test_an_option_that_the_record_lacks_has_its_first_value_and_one_it_has_alone_is_named(
    tmp_path: Path,
) -> None:
    folder = open_run("distill", "label", config(), tmp_path)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    del content["options"]["seed"]
    file.write_text(json.dumps(content))
    assert open_run("distill", "label", config(), tmp_path) == folder
    own = dataclasses.replace(changed("seed"), run_dir=str(folder))
    with pytest.raises(ValueError, match=r"other options: seed was 0, now 1\."):
        open_run("distill", "label", own, tmp_path)
    content["options"]["students"]["c"] = {"network": "resnet34"}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"students\.c\.network was resnet34, now absent"):
        open_run("distill", "label", config(), tmp_path)


def test_the_folder_of_another_command_is_refused(tmp_path: Path) -> None:
    own = dataclasses.replace(config(), run_dir=str(tmp_path / "run"))
    open_run("distill", "label", own, tmp_path)
    with pytest.raises(
        ValueError, match="is a run of distill, not of linear; choose another run_dir"
    ):
        open_run("linear", "label", own, tmp_path)


def test_the_given_folder_is_used(tmp_path: Path) -> None:
    own = dataclasses.replace(config(), run_dir=str(tmp_path / "deep" / "run"))
    assert open_run("distill", "label", own, tmp_path / "root") == tmp_path / "deep" / "run"
    assert not (tmp_path / "root").exists()


def test_the_recorded_options_give_the_config_back(tmp_path: Path) -> None:
    folder = open_run("distill", "label", config(), tmp_path)
    content = json.loads((folder / "config.json").read_text())
    assert content["command"] == "distill"
    assert content["options"] == to_plain(config())
    schema = OmegaConf.structured(DistillConfig)
    schema.objective = type(config().objective)  # as conf/objective does
    merged = OmegaConf.merge(schema, content["options"])
    assert OmegaConf.to_object(merged) == config()


def test_the_first_record_stays(tmp_path: Path) -> None:
    folder = open_run("distill", "label", config(), tmp_path)
    before = (folder / "config.json").read_bytes()
    open_run("distill", "label", changed("log_every"), tmp_path)
    assert (folder / "config.json").read_bytes() == before


def test_flatten_names_options_as_the_command_line_does() -> None:
    assert flatten({"a": 1, "b": {"c": [2, 3], "d": {"e": None}}, "f": {}}) == {
        "a": 1,
        "b.c": [2, 3],
        "b.d.e": None,
    }


def open_here(root: str) -> str:
    with distributed.rank0_first():
        return str(open_run("distill", "label", config(), Path(root)))


HOLD = """
import sys, time
from pathlib import Path
from seed_exp.engine.run_folder import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_in_the_folder_is_refused_until_the_first_one_is_dead(
    tmp_path: Path,
) -> None:
    first = forks.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(
                ValueError, match=rf"is in use by process {first.pid} on .*choose another run_dir"
            ),
            run_lock(tmp_path),
        ):
            pass
    finally:
        first.kill()  # SIGKILL: it cannot clean up
        first.wait()
    for _ in range(2):
        with run_lock(tmp_path):
            assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with run_lock(tmp_path):
        assert any("WARNING" in line and "cannot be locked" in line for line in logged)


def test_all_ranks_open_the_same_folder(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(open_here, str(tmp_path))
    assert first == second
    assert (Path(first) / "config.json").exists()


def test_the_log_goes_to_the_terminal_and_with_the_time_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logged: list[str]
) -> None:
    log = logging.getLogger("seed_exp")
    # The second run of a sweep does not write into the folder of the first.
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with log_to(tmp_path / name):
            log.info("hello from %s", name)
            log.debug("detail")
    first, second = ((tmp_path / name / "log.txt").read_text() for name in ("first", "second"))
    assert "hello from first" in first
    assert "second" not in first
    assert [line[24:] for line in second.splitlines()] == [
        f"run folder: {tmp_path / 'second'}",
        "hello from second",
        "detail",
    ]
    shown = capsys.readouterr().err.splitlines()
    assert shown.count("hello from second") == 1
    assert "detail" not in shown


def test_a_run_inside_of_another_one_gives_the_log_back_when_it_ends(
    tmp_path: Path, logged: list[str]
) -> None:
    log = logging.getLogger("seed_exp")
    before = log.level, log.propagate, list(log.handlers)
    for name in ("outer", "inner"):
        (tmp_path / name).mkdir()
    with log_to(tmp_path / "outer"):
        log.info("one")
        with log_to(tmp_path / "inner"):
            log.info("two")
        log.info("three")
    lines = {
        name: [line[24:] for line in (tmp_path / name / "log.txt").read_text().splitlines()[1:]]
        for name in ("outer", "inner")
    }
    assert lines == {"outer": ["one", "three"], "inner": ["two"]}
    assert (log.level, log.propagate, list(log.handlers)) == before


def test_what_is_said_after_a_signal_stands_in_the_log_of_the_outer_run(
    tmp_path: Path, logged: list[str]
) -> None:
    log = logging.getLogger("seed_exp")
    for name in ("outer", "inner"):
        (tmp_path / name).mkdir()
    with (
        pytest.raises(Stopped),
        log_to(tmp_path / "outer"),
        log_to(tmp_path / "inner"),
    ):
        raise Stopped(signal.SIGUSR2)
    log.info("requeued")
    assert "requeued" in (tmp_path / "outer" / "log.txt").read_text()
    assert "requeued" not in (tmp_path / "inner" / "log.txt").read_text()


def open_together(folder: str, seed: int, barrier: Any, refused: Any) -> None:
    own = dataclasses.replace(config(), run_dir=folder, seed=seed)
    barrier.wait()
    try:
        with run.open_run("distill", "x", own, INPUTS, torch.device("cpu")):
            barrier.wait()
    except ValueError as error:
        refused.put((seed, str(error)))
        barrier.wait()


@pytest.mark.parametrize("repeat", range(5))
def test_of_two_commands_with_different_options_that_begin_together_one_has_the_folder(
    repeat: int, tmp_path: Path
) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, refused = fork.Barrier(2, timeout=30), fork.SimpleQueue()
    folder = tmp_path / "run"
    both = [
        fork.Process(target=open_together, args=(str(folder), seed, barrier, refused))
        for seed in (1, 2)
    ]
    for process in both:
        process.start()
    loser, message = refused.get()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert "is in use by" in message  # "another process" until its name is written
    assert json.loads((folder / "config.json").read_text())["options"]["seed"] == 3 - loser


SAMPLED = {"data": "image_folder:photos:40:0123456789abcdef+fedcba9876543210"}
OTHERS = {"data": "image_folder:photos:40:0123456789abcdef+fedcba9876543211"}
MOVED = {"data": "image_folder:elsewhere:40:0123456789abcdef+fedcba9876543210"}
BEFORE = {"data": "image_folder:photos:40:0123456789abcdef"}


def at(place: str, run_dir: Path | None = None) -> DistillConfig:
    data = dataclasses.replace(config().data, root=place)
    return dataclasses.replace(config(), data=data, run_dir=run_dir and str(run_dir))


def test_moved_images_continue_a_run_and_changed_ones_begin_another(tmp_path: Path) -> None:
    folder = open_run("distill", "label", at("/a/photos"), tmp_path, SAMPLED)
    assert open_run("distill", "label", at("/b/elsewhere"), tmp_path, MOVED) == folder
    assert open_run("distill", "label", at("/a/photos"), tmp_path, OTHERS) != folder
    open_run("distill", "label", at("/b/elsewhere", folder), tmp_path, MOVED)
    with pytest.raises(ValueError, match=r"content of data was .*3210, now .*3211"):
        open_run("distill", "label", at("/a/photos", folder), tmp_path, OTHERS)


def test_a_run_of_a_version_that_knew_names_only_goes_on(tmp_path: Path) -> None:
    options = identity(at("/a/photos"), BEFORE)
    folder = tmp_path / f"label-{digest('distill', options)}"  # its name in that version
    assert options["data.root"] == "/a/photos"
    folder.mkdir()
    run_folder.claim_folder(folder, "distill", at("/a/photos"), BEFORE)
    assert open_run("distill", "label", at("/a/photos"), tmp_path, SAMPLED) == folder
    assert open_run("distill", "label", at("/b/photos"), tmp_path, SAMPLED) != folder
    with pytest.raises(ValueError, match=r"data\.root was /a/photos, now /b/photos"):
        open_run("distill", "label", at("/b/photos", folder), tmp_path, SAMPLED)
