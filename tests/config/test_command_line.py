from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from seed_exp import __main__, distill
from seed_exp.config.command import command, flags_to_overrides
from seed_exp.config.compose import compose, groups
from seed_exp.config.deviations import DEVIATIONS
from seed_exp.config.options import flatten, to_plain
from seed_exp.config.schema import EVALUATIONS, SCHEMAS
from seed_exp.config.words import word

COMMANDS = {name: importlib.import_module(f"seed_exp.{name}") for name in SCHEMAS}
REQUIRED = {
    **{name: ["run=x"] for name in (*EVALUATIONS, "export", "embed")},
    **{"bench": ["bench=loss"], "convert": ["to=tsv", "output=x"]},
}
DIGITS = ["data=digits", "views=digits", "data.num_workers=0"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Changes to another working directory, and removes the variables that matter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # a command sets it: this way it is put back
    monkeypatch.delenv("SEED_DATA", raising=False)


def type_line(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    COMMANDS[name].main()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "distill student=resnt18",
            "no option 'resnt18' in config group 'student'; did you mean 'resnet18'?",
        ),
        ("distill student=[resnet18,resnt34]", "did you mean 'resnet34'?"),
        ("distill -m student=resnet18,resnt34", "did you mean 'resnet34'?"),
        ("distill teacher=swav_r50x2", "did you mean 'swav_r50w2'?"),
        (
            "distill student=mobilenetv3_small_050",
            'student=timm/NAME; python -c "import timm; '
            "print(timm.list_models('*mobilenetv3_small_050*'))\" lists names",
        ),
        ("distill teacher=dinov2", "teacher=timm teacher.name=NAME"),
        ("distill", "data=photos data.root=FOLDER for a folder of photographs"),
        ("distill studnt=resnet18", "no option 'studnt'; did you mean 'student'?"),
        ("distill experimnets=table1", "no option 'experimnets'; did you mean 'experiments'?"),
        ("distill experiments=table1_moco_r50", "did you mean 'table1_moco_v2_r50'?"),
        ("distill objective.tau_techer=1", "did you mean objective.tau_teacher?"),
        (
            "distill objective=l2 objective.tau_student=1",
            "objective has: deep_head, dense_weight, hidden_dim, name, queue_init, queue_size",
        ),
        ("distill teacher=/tmp", "For a run of this package: teacher=run teacher.checkpoint=/tmp."),
        ("distill objective.name=l2", "choose the objective with objective=l2"),
        ("distill students.resnet18.hiden_dim=1", "did you mean students.resnet18.hidden_dim?"),
        ("distill students.resnet81.hidden_dim=1", "did you mean students.resnet18?"),
        ("preview views.crops.globl.size=3", "did you mean views.crops.global?"),
        ("distill +foo=1", "no option 'foo'"),
        ("distill +optimizer.foo=1", "no option 'optimizer.foo'"),
        ("distill epochs=many", "epochs: Value 'many'"),
        ("distill optimizer.schedule=cosin", "expected one of [cosine, step, constant]"),
        ("distill optimizer.lr=0", "optimizer.lr must be positive, got 0.0"),
        ("distill views.blur_prob=1.5", "views.blur_prob must be a probability, got 1.5"),
        ("distill epochs", "cannot read 'epochs'; options are written KEY=VALUE"),
        ("distill student=[resnet18", "cannot read 'student=[resnet18'"),
        ("distill data.root=a(b)", "brackets: 'data.root=\"a(b)\"'"),
        ("knn run=a,b", """as one text it is 'run="a,b"', as a list 'run=[a,b]'"""),
        ("knn -m run={x}y,b", "cannot read 'run={x}y,b'; options are written KEY=VALUE"),
        (
            "distill student=resnet18,resnet34",
            "for a fleet in one run, which share the teacher's work, type "
            "'student=[resnet18,resnet34]'; for a run of each, one after the other, "
            "-m student=resnet18,resnet34",
        ),
        ("distill teacher=swav_r50,timm", "for a run with each, one after the other: -m teacher="),
        ("distill --batch-size 128", "options are written without dashes: batch_size=VALUE"),
        ("verify data=[0]", "data=[0] chooses 0, which is no name in config group 'data'"),
        (
            "distill student=[resnet18,[a]]",
            "chooses ['a'], which is no name in config group 'student'",
        ),
        (
            "distill student=[true]",
            "student=[true] chooses True, which is no name in config group 'student'",
        ),
        (
            "distill -m student=resnet18,[1]",
            "chooses 1, which is no name in config group 'student'",
        ),
        ("distill student={x:1}", "chooses {'x': 1}, which is no name in config group 'student'"),
        (
            "distill student=[]",
            "student=[] chooses nothing, which is no name in config group 'student'",
        ),
        ("distill --student=resnet18", "options are written without dashes: student=resnet18"),
        ("linear run=x optimizer=lars", "this command has no config group 'optimizer'"),
        ("preview data=3", "data=3 chooses 3, which is no name in config group 'data'"),
        ("knn", "missing option run: add run=VALUE"),
        ("knn run=nowhere data=digits", "no run folder or student file nowhere"),
        ("distill", "neither SEED_DATA (environment) nor data.root=PATH is set"),
        ("distill data=tsv", "data source 'tsv' needs data.root=PATH"),
        ("distill data=digits teacher=run", "teacher=run needs teacher.checkpoint=PATH"),
        ("pretrain data=digits students.resnet18.network=resnet81", "did you mean 'resnet18'?"),
        ("pretrain data=digits student=timm", "student=timm/resnet26"),
        (
            "pretrain data=digits student=timm students.timm.name=[vit_tiny,vit_small]",
            "several networks of timm are 'student=[timm/NAME,timm/NAME]'",
        ),
        ("pretrain data=digits device=gpu", "device=gpu is unknown; use auto, cpu or cuda"),
        ("bench", "missing option bench: add bench=VALUE"),
        ("bench vews", "no option 'vews' in config group 'bench'; did you mean 'views'?"),
        ("bench --json seconds=1 vews", "did you mean 'views'?"),
        ("bench loss views", "cannot read 'views'; options are written KEY=VALUE"),
        ("bench views", "neither SEED_DATA (environment) nor data.root=PATH is set"),
        ("bench --seconds 3 views", "options are written without dashes: seconds=VALUE"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_helps(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    line: str,
    expected: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        type_line(monkeypatch, *line.split())
    message = stopped.value.code  # Python prints it on stderr and exits with status 1
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert expected in message
    assert "\n" not in message
    assert capsys.readouterr() == ("", "")
    assert {file.name for file in tmp_path.iterdir()} <= {
        "runs"
    }  # where Hydra keeps a sweep's multirun.yaml


WORDS = [
    *("plain/path-1.0", "a b", "a,b", "a {b}", "`date`", "(x)", "[x]", "{}", "{a: 1}", "null", "3"),
    *(
        "1e5",
        "",
        " x ",
        "it's",
        'a "b"',
        "a\\",
        "C:\\x",
        "a=b",
        "~/photos",
        "ä#é",
        "glob(*)",
        "$HOME",
    ),
    *("*", "a\\'b", 'a\\"b', "true", "x: y", "%41", "!x", "-m", "a;b|c&d"),
    *(3, 0.5, True, None, ["a", "b c", 1.5, "x,y"], []),
]


@pytest.mark.parametrize("value", WORDS)
def test_a_word_is_read_back_after_a_shell_and_hydra(value: Any) -> None:
    line = shlex.join([word("k", value)])
    (argument,) = shlex.split(line)
    override = OverridesParser.create().parse_override(argument)
    read = override.value()
    if isinstance(read, list):
        read = [getattr(one, "text", one) for one in read]
    assert getattr(read, "text", read) == value
    assert not override.is_sweep_override()


def test_a_word_has_quotes_only_where_they_are_needed() -> None:
    assert word("run", "runs/distill/resnet18-a_b.c+d") == "run=runs/distill/resnet18-a_b.c+d"
    assert word("run", "a b") == "run=a b"
    assert word("run", "a,b") == 'run="a,b"'


def test_a_sweep_in_each_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        SystemExit,
        match=r"start the processes of one run, "
        r".*sweep submit --command pretrain --launcher local --gpus N",
    ):
        type_line(monkeypatch, "pretrain", "-m", "seed=0,1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit, match="no option 'sed'"):
        type_line(monkeypatch, "pretrain", "-m", "sed=0,1")


@pytest.mark.parametrize("output", ["file/preview.png", "folder"])
def test_a_file_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match=rf"^error: .*{output.partition('/')[0]}.*$"):
        type_line(monkeypatch, "preview", *DIGITS, "num_images=1", f"output={output}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("loss --json", "bench=loss json=true"),
        ("--json rows=8 loss seconds=1", "json=true rows=8 bench=loss seconds=1"),
        ("bench=loss json=true", "bench=loss json=true"),
        ("--cfg job", "--cfg job"),
        ("loss --cfg job", "bench=loss --cfg job"),
        ("-m loss", "-m loss"),
        ("", ""),
    ],
)
def test_a_leading_word_and_flags_stand_for_options(arguments: str, expected: str) -> None:
    assert flags_to_overrides(arguments.split(), "bench", "bench") == expected.split()
    assert flags_to_overrides(arguments.split(), "knn", None) == arguments.split()


def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_type(*_: Any) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr("seed_exp.tools.preview.load_source", wrong_type)
    with pytest.raises(TypeError, match="a defect"):
        type_line(monkeypatch, "preview", *DIGITS)
    # The type is that of messages for users, but a library raised it: its words mean nothing to
    # a user.
    monkeypatch.setattr("seed_exp.tools.preview.load_source", lambda *_: json.loads("no JSON"))
    with pytest.raises(json.JSONDecodeError):
        type_line(monkeypatch, "preview", *DIGITS)


@pytest.mark.parametrize(
    "arguments", [["student=resnt18"], ["epochs=0"], ["data=digits", "teacher=run"]]
)
def test_hydra_full_error_lets_every_error_through(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["distill.py", *arguments])
    with pytest.raises(
        Exception, match=r"resnt18|epochs|teacher\.checkpoint"
    ):  # SystemExit is no Exception
        command("distill", distill.distill, None)()


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m seed_exp.<arguments>` in a process of its own, in the working directory."""
    env = {
        key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"
    } | environment
    name, *rest = arguments
    return subprocess.run(
        [sys.executable, "-m", f"seed_exp.{name}", *rest],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )


def test_in_a_process_of_its_own_it_is_one_line_on_stderr_and_status_1(tmp_path: Path) -> None:
    done = call("distill", "optimizer.lr=-1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: optimizer.lr must be positive, got -1.0\n"
    assert list(tmp_path.iterdir()) == []


def test_in_a_process_of_its_own_hydra_full_error_shows_the_traceback() -> None:
    done = call("distill", "student=resnt18", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert "student/resnt18" in done.stderr


OPTIONS_HEADING = "Options (KEY=VALUE, here the defaults; in brackets: published values):"


@pytest.mark.parametrize(
    ("flag", "name"), [*(("--help", name) for name in COMMANDS), ("-h", "distill")]
)
def test_help_says_what_there_is_and_what_it_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, flag: str
) -> None:
    type_line(monkeypatch, name, flag)
    text = capsys.readouterr().out
    description = COMMANDS[name].__doc__
    assert description is not None
    assert text.startswith(description.strip())
    assert f"python -m seed_exp.{name}" in description

    lines = text.splitlines()
    first_group = lines.index("Config groups (GROUP=OPTION; a star marks the chosen one):") + 1
    first_option = lines.index(OPTIONS_HEADING) + 1
    shown: dict[str, list[str]] = {}
    for line in lines[first_group : first_option - 2]:
        words = line.split()
        if not line.startswith(" " * 3):
            group = words.pop(0)
        shown.setdefault(group, []).extend(word.rstrip("*") for word in words)
    config = compose(name, REQUIRED.get(name))
    possible = {"students": "student", "experiments": "experiments"}
    expected = {possible.get(key, key) for key in vars(config)} & groups().keys()
    own_values = {
        "linear": {"optimizer"},
        "finetune": {"optimizer"},
        "detect": {"optimizer", "views"},
        "segment": {"optimizer", "views"},
    }.get(name, set())
    assert shown.keys() - {"experiments", "recipe", "scale"} == expected - own_values
    assert all(options == groups()[group] for group, options in shown.items())

    keys: list[str] = []
    headings: list[str] = []
    for line in lines[first_option:-2]:
        if line.startswith(" " * 8):
            assert len(line.strip()) > 0
        elif heading := re.match(r"(\w+): \S", line):
            headings.append(heading[1])
        elif key := re.match(r"  (\w\S*?)=", line):
            assert headings
            assert "." not in key[1] or key[1].startswith(f"{headings[-1]}.")
            keys.append(key[1])
    assert sorted(keys) == sorted(flatten(to_plain(config)))
    nested = [key for key, value in to_plain(config).items() if isinstance(value, dict)]
    assert headings == [name, *nested]
    own = [key for key in flatten(to_plain(config)) if "." not in key]
    assert keys[: len(own)] == own


def test_help_shows_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_line(monkeypatch, "linear", "--help")
    text = capsys.readouterr().out
    for shown in (
        "\n  run=???\n",
        "\n  steps=null\n",
        "\n  optimizer.schedule=step\n",
        "\n  optimizer.milestones=[60.0, 80.0]\n",
        "\n  data.download=false\n",
    ):
        assert shown in text
    assert " linear* " in text
    assert "One of auto, float32, bfloat16." in text
    assert "One of cosine, step, constant." in " ".join(text.split())  # wrapped


@pytest.mark.parametrize("columns", [60, 80, 100, 300])
@pytest.mark.parametrize("name", ["distill", "embed"])
def test_help_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    type_line(monkeypatch, name, "--help")
    _, groups_and_options = capsys.readouterr().out.split("Config groups")
    longest = max(map(len, groups_and_options.splitlines()))
    assert min(columns, 100) - 15 < longest <= min(columns, 100)


@pytest.mark.parametrize("name", [*COMMANDS, "plan", "sweep", "zoo"])
def test_a_description_fits_eighty_columns(name: str) -> None:
    description = importlib.import_module(f"seed_exp.{name}").__doc__
    assert description is not None
    assert max(map(len, description.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("distill objective=disco -m seed=0,1", ["disco*", "objective.name=disco"]),
        (
            "distill student=[resnet34,convnet_w2]",
            ["resnet34*", "convnet_w2*", "students.resnet34."],
        ),
        ("distill -m student=resnet18,resnet34", ["resnet18*"]),
        ("bench loss", ["loss*", "bench=loss"]),
        ("report small_table1", ["output=report"]),
    ],
)
def test_help_is_about_the_options_that_are_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, shown: list[str]
) -> None:
    type_line(monkeypatch, *line.split(), "--help")
    text = capsys.readouterr().out
    for expected in shown:
        assert expected in text


def test_help_shows_published_values_beside_those_that_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_line(monkeypatch, "distill", "--help")
    assert "\n  objective.tau_teacher=0.01 (SEED's code: 1e-4)\n" in capsys.readouterr().out
    type_line(monkeypatch, "distill", "objective=compress", "--help")
    assert "1e-4)" not in capsys.readouterr().out
    type_line(monkeypatch, "linear", "--help")
    assert "\n  lrs=[0.3, 1.0, 3.0, 10.0, 30.0] (MoCo: [30])\n" in capsys.readouterr().out


DIFFERENT = [
    (file, option, published.value)
    for file, options in DEVIATIONS.items()
    for option, published in options.items()
]


@pytest.mark.parametrize(("file", "option", "value"), DIFFERENT)
def test_each_published_value_can_be_set_and_differs(file: str, option: str, value: str) -> None:
    group, _, choice = file.partition("/")
    name, words = ("distill", [f"{group}={choice}"]) if choice else (file, REQUIRED.get(file, []))
    default = flatten(to_plain(compose(name, words)))
    changed = flatten(to_plain(compose(name, [*words, f"{option}={value}"])))
    assert {key for key in default if changed[key] != default[key]} == {option}


def test_without_a_command_all_of_them_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["seed-exp"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    __main__.main()
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert set(listed) == {*SCHEMAS, "plan", "sweep", "zoo"}
    assert listed["distill"].startswith("Distil a self-supervised teacher")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: [1\nsteps: 3", "expected ',' or ']'"),
        ("seed: !!python/name:os.system", "for the tag"),
    ],
)
def test_a_yaml_file_that_cannot_be_read_is_one_line(
    text: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(SystemExit) as stopped:
        type_line(monkeypatch, "distill", "--config-dir", str(tmp_path), "experiments=mine")
    (line,) = str(stopped.value.code).splitlines()
    assert line.startswith("error: an option file cannot be read: ")
    assert reason in line
    assert "experiments/mine.yaml" in line


@pytest.mark.parametrize("library", ["Python", "torch"])
def test_short_memory_is_one_line(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: Any) -> None:
        import torch

        # More than an address can name: the system refuses it, whatever the machine has.
        bytearray(1 << 60) if library == "Python" else torch.empty(1 << 60)

    monkeypatch.setattr(sys, "argv", ["knn.py", "run=x"])
    with pytest.raises(SystemExit, match=r"^error: too little memory \(.*\); free or ask for more"):
        command("knn", work, None)()


def test_short_memory_of_the_interpreter_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: Any) -> None:
        # Python's own words where there was no memory for the exception; nothing provokes them
        # dependably.
        raise SystemError("error return without exception set")

    monkeypatch.setattr(sys, "argv", ["knn.py", "run=x"])
    with pytest.raises(SystemExit, match=r"^error: too little memory \(.*\); free or ask for more"):
        command("knn", work, None)()
