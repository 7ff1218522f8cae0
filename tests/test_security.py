"""No file from outside can run code or write where it likes.

What we write can be read by those whom the user lets, and holds no secrets.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from contextlib import redirect_stderr, suppress
from pathlib import Path

import pytest
from PIL import Image
from test_layers import MODULES, calls, imports, name_of, parse

from seed_exp.base.files import atomic_write
from seed_exp.config.compose import compose
from seed_exp.config.options import flatten, to_plain
from seed_exp.config.schema import (
    EVALUATIONS,
    SCHEMAS,
    WITHOUT_SCHEMA,
    DataFormat,
    TrackerConfig,
    TrackerMode,
)
from seed_exp.config.words import word
from seed_exp.data.shards import ShardsSource
from seed_exp.data.sources import load_source
from seed_exp.data.writers import convert
from seed_exp.engine.tracking import RunFacts, WandbTracker

CONF = Path(__file__).parents[1] / "conf"

RUNS_CODE = {
    *(
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "marshal.load",
        "marshal.loads",
        "shelve.open",
        "joblib.load",
    ),
    *(
        "dill.load",
        "dill.loads",
        "cloudpickle.load",
        "cloudpickle.loads",
        "pandas.read_pickle",
        "torch.jit.load",
        "torch.hub.load",
    ),
    *(
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "eval",
        "exec",
        "compile",
        "__import__",
    ),
    *(
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "hydra.utils.instantiate",
        "hydra.utils.call",
    ),
    # These widen what torch.load(weights_only=True) takes.
    *(
        "torch.serialization.add_safe_globals",
        "torch.serialization.safe_globals",
        "torch.package.PackageImporter",
    ),
}
"""Functions that run code which stands in their arguments."""
HARMLESS = {"torch.serialization.safe_globals([argparse.Namespace])"}
"""A bag of values: weights_only=True checks its contents too."""
WRITES_ANYWHERE = {"shutil.unpack_archive", "tempfile.mktemp"}
UNPACKS = {"extract", "extractall"}
"""Methods of tarfile and zipfile that write where the archive says; members may be read instead."""


def dangers(tree: ast.AST) -> list[str]:
    """Dangerous calls, and imports that hide them.

    A dangerous call lets a file, an address or an option run code or write outside its folder.
    """
    return [
        ast.unparse(call) for function, call in calls(tree) if is_dangerous(function, call)
    ] + sorted(hidden(tree))


def is_dangerous(function: str, call: ast.Call) -> bool:
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    return (
        function in RUNS_CODE | WRITES_ANYWHERE
        or (function == "torch.load" and options.get("weights_only") != "True")
        or options.get("allow_pickle", "False") != "False"
        or options.get("shell", "False") != "False"
        or options.get("verify", "True") == "False"
        or (isinstance(call.func, ast.Attribute) and call.func.attr in UNPACKS)
    )


def hidden(tree: ast.AST) -> set[str]:
    """Dangerous functions imported by their own name, and their libraries under another name."""
    functions = {
        name for name in RUNS_CODE | WRITES_ANYWHERE | {"torch.load", "numpy.load"} if "." in name
    }
    libraries = {name.rpartition(".")[0] for name in functions} - {"numpy"}
    aliases = [
        alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    ]
    return (
        functions & set(imports(tree))
        | {alias.name for alias in aliases if alias.asname} & libraries
    )


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_nothing_that_is_read_can_run_code_or_write_outside_its_folder(file: Path) -> None:
    assert sorted(set(dangers(parse(file))) - HARMLESS) == []


def test_no_option_file_names_code_to_be_called() -> None:
    files = [*CONF.rglob("*.yaml"), *(CONF.parent / "experiments").glob("*.yaml")]
    assert len(files) > 20
    assert [
        file for file in files if "_target_" in file.read_text() and "launcher" not in file.parts
    ] == []


# These tests can fail.


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "torch.serialization.add_safe_globals([Namespace])",
        "pickle.loads(data)",
        "pickle.Unpickler(file).load()",
        "from pickle import load",
        "from torch import load",
        "import pickle as p",
        "import torch as t",
        "from hydra.utils import instantiate",
        "numpy.load(path, allow_pickle=True)",
        "np.lib.format.read_array(file, allow_pickle=trusted)",
        "from numpy import load",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "os.system(line)",
        "subprocess.run(line, shell=True)",
        "from os import popen",
        "tarfile.open(path).extractall(folder)",
        "archive.extract(member, folder)",
        "shutil.unpack_archive(path)",
        "requests.get(url, verify=False)",
    ],
)
def test_every_danger_is_found(source: str) -> None:
    assert len(dangers(ast.parse(source))) == 1


def test_what_is_safe_is_let_through() -> None:
    safe = """
import numpy as np, torch, tarfile, pickle, yaml, subprocess
torch.load(path, weights_only=True); json.load(file); pickle.UnpicklingError
np.load(path, mmap_mode="r"); yaml.safe_load(text); tarfile.open(path).extractfile(member)
subprocess.run(["nvidia-smi"]); network.eval(); torch.compile(f)
re.compile(pattern)
"""
    assert dangers(ast.parse(safe)) == []


# Archives.

_FILE = io.BytesIO()
Image.new("RGB", (3, 2)).save(_FILE, "PNG")
PICTURE = _FILE.getvalue()
PLACES = [
    "../outside.png",
    "a/../../outside.png",
    "{}/outside.png",
    "..",
    "a/../../../outside.png",
    "link/outside.png",
]


@pytest.mark.parametrize("to", [DataFormat.image_folder, DataFormat.shards])
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("label", [False, True])
def test_an_archive_cannot_write_outside_its_folder(
    tmp_path: Path, name: str, label: bool, to: DataFormat
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "train-0.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        archive.addfile(link)
        for file, content in (
            (name.format(outside), PICTURE),
            (f"{name.format(outside)[:-4]}.cls", b"0"),
        ):
            member = tarfile.TarInfo(file)
            member.size = len(content)
            if label or not file.endswith(".cls"):
                archive.addfile(member, io.BytesIO(content))
    before = contents(tmp_path)
    with suppress(ValueError):
        source = ShardsSource([tmp_path / "in" / "train-0.tar"])
        convert(source, "train", to, tmp_path / "a" / "b" / "out", shard_size=10, on_bad=None)
    made = contents(tmp_path) - before
    assert {path for path in made if not path.is_relative_to(tmp_path / "a" / "b" / "out")} <= {
        tmp_path / "a",
        tmp_path / "a" / "b",
    }
    assert contents(outside) == set()


def contents(folder: Path) -> set[Path]:
    """All below `folder`, less the index that is written beside a source."""
    return {path for path in folder.rglob("*") if not path.name.endswith(".index.npy")}


# Permissions.

WRITES = """
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from seed_exp import knn, pretrain, preview
from seed_exp.config.compose import compose
from seed_exp.data.tsv import TsvSource

digits = ["data=digits", "data.num_workers=0"]
training = ["student=convnet_w2", "checkpoint_every=1", "tracker=files"]
small = ["views=digits", "device=cpu", "steps=2", "batch_size=16", "moco.queue_size=32"]
small += ["knn_bank_size=50", "knn_query_size=20"]
run = pretrain.pretrain(compose("pretrain", [*training, *digits, *small]))
knn.knn(compose("knn", [f"run={run}", "device=cpu", "ks=[5]", *digits]))
preview.preview(compose("preview", ["views=digits", "num_images=1", *digits]))
Path("images.tsv").write_text("a\\t0\\t\\n")
TsvSource(Path("images.tsv"))
"""


@pytest.mark.slow
def test_files_have_the_permissions_that_the_users_umask_gives(tmp_path: Path) -> None:
    environment = {**os.environ, "SEED_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", WRITES]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        umask=0o027,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")
    }
    names = {Path(name).name for name in modes}
    assert {
        "config.json",
        "log.txt",
        "metrics.jsonl",
        "step_00000002.pt",
        "convnet_w2.safetensors",
        "preview.png",
    } <= names
    assert {name.rpartition(".")[2] for name in names} >= {"npy", "tsv"}
    files = {name: mode for name, mode in modes.items() if (tmp_path / name).is_file()}
    assert {name: oct(mode) for name, mode in files.items() if mode != 0o640} == {}
    assert {
        name: oct(mode) for name, mode in modes.items() if name not in files and mode != 0o750
    } == {}


def test_writing_leaves_the_umask_alone_which_all_threads_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(
                "os.umask",
                lambda _: pytest.fail("another thread's new file would get other permissions"),
            )
            with atomic_write(tmp_path / "x") as file:
                file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


# Secrets.

TOKEN = f"hf_{'cAnArY' * 6}"
PASSWORD = "canary-of-the-environment"
ADDRESS = f"https://me:canary1@h/x.tsv?X-Amz-Signature=canary2&token=canary3&part={TOKEN}"
CANARY = re.compile("canary", re.IGNORECASE)
COMMANDS = {
    name: importlib.import_module(f"seed_exp.{name}") for name in (*SCHEMAS, *WITHOUT_SCHEMA)
}
REQUIRED = {
    **{name: ["run=x"] for name in (*EVALUATIONS, "export", "embed")},
    **{"bench": ["bench=loss"], "convert": ["to=tsv", "output=x"]},
}
MISTAKES = [
    f"nothing={ADDRESS}",
    f"+nothing={ADDRESS}",
    f"data={ADDRESS}",
    f"{ADDRESS}",
    f"--data.root={ADDRESS}",
    f"data.root=({ADDRESS}",
    f"data.root={ADDRESS},b",
    f"data.num_workers={ADDRESS}",
    f"experiments={ADDRESS}",
    f"run={ADDRESS}",
]


def type_line(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> str:
    """What the command ends with: its last words or the traceback that the interpreter prints."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    said = io.StringIO()
    with redirect_stderr(said):
        try:
            COMMANDS[name].main()
        except SystemExit as stopped:
            return said.getvalue() + str(stopped.code)
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
    return said.getvalue()


def found_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if CANARY.search(line)]


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("SEED_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["distill", "linear", "report", "sweep", "plan", "zoo"])
def test_no_mistake_in_a_command_line_prints_a_secret(
    secrets: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    first = {"sweep": ["status"], "zoo": ["show"]}.get(name, [])
    for full in ("0", "1") if name == "distill" else ("0",):
        for mistake in MISTAKES if name == "distill" else MISTAKES[:5]:
            monkeypatch.setenv("HYDRA_FULL_ERROR", full)
            ended = type_line(monkeypatch, name, *first, mistake)
            assert ended, mistake
            assert (mistake, found_in(ended), found_in("".join(capfd.readouterr()))) == (
                mistake,
                [],
                [],
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", SCHEMAS if os.environ.get("SEED_EVERY_COMMAND") else ["embed", "convert", "report"]
)
def test_no_option_brings_a_secret_into_a_file_or_a_stream(
    secrets: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    """With SEED_EVERY_COMMAND=1 all commands are tried, which takes half an hour."""
    others = ["student=convnet_w2"] if name in ("distill", "pretrain") else []
    options = flatten(to_plain(compose(name, [*REQUIRED.get(name, []), *others])))
    for option, value in options.items():
        if isinstance(value, bool | float):
            continue
        # The data that exist let the command go on to whatever reads the option.
        words = [*REQUIRED.get(name, []), *others]
        if "data" in {field.name for field in dataclasses.fields(SCHEMAS[name])}:
            words += ["data=digits"] if not option.startswith("data.") else []
        text = f"[{word('x', ADDRESS)[2:]}]" if isinstance(value, list) else ADDRESS
        words = [*words, f"{option}={text}" if isinstance(value, list) else word(option, text)]
        ended = type_line(monkeypatch, name, *(["steps=1"] if "steps" in options else []), *words)
        assert (option, found_in(ended), found_in("".join(capfd.readouterr()))) == (option, [], [])
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or not CANARY.search(path.read_text(errors="replace")), path


@pytest.mark.slow
def test_no_file_of_a_whole_pipeline_holds_a_secret(
    secrets: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    home = tmp_path / TOKEN  # every path that is given has a token in it
    data = load_source(compose("verify", ["data=digits"]).data, "train")
    for index in range(40):
        folder = home / "photos" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.image(index).permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    run, student = home / "run", home / "run" / "students" / "convnet_w2.safetensors"
    images = ["data=image_folder", f"data.root={home}/photos", "data.val_fraction=0.25"]
    images += ["data.num_workers=0"]
    tags = [word("tracker.group", ADDRESS), f'tracker.tags=["{ADDRESS}","{PASSWORD}"]']
    tiny = ["device=cpu", "steps=2", "batch_size=8", "log_every=1", "tracker=files", *tags]
    signed = shlex.quote(word("tracker.group", ADDRESS))
    line = f"linear device=cpu steps=1 batch_size=8 lrs=[1] {signed}"
    training = [*images, *tiny, "views=digits", "student=convnet_w2", "knn_bank_size=8"]
    evaluated = [f"run={run}", f"data.root={home}/photos", "data.num_workers=0", "device=cpu"]
    for name, *words in (
        ("pretrain", *training, "moco.queue_size=16", f"run_dir={run}"),
        (
            *("distill", *training, "teacher=run", f"teacher.checkpoint={run}"),
            *("objective.queue_size=16", f"students.convnet_w2.init={student}"),
            *(f"run_dir={home}/small", f"evaluations=[{word('x', line)[2:]}]"),
            f"teacher_cache={home}/cache",
        ),
        ("knn", *evaluated),
        ("linear", *evaluated, *tiny[1:], "lrs=[1]"),
        ("finetune", *evaluated, *tiny[1:], "lrs=[1]"),
        (
            *("embed", *evaluated, f"output={home}/f.npz", f"gallery={home}/g.html"),
            *(f"query=[{home}/photos/0/0.png]", "duplicates=0.9"),
        ),
        ("export", *evaluated[:2], "formats=[torch_export]", f"output={home}/out"),
        ("verify", *images, f"output={home}/bad.jsonl"),
        ("convert", *images, "to=tsv", f"output={home}/tsv"),
        ("preview", *images, "views=digits", "num_images=1", f"output={home}/p.png"),
        ("report", "runs=[run,small]", f"output={home}/report", word("title", ADDRESS)),
    ):
        if name == "report":
            monkeypatch.chdir(home)  # it shows the paths of runs as they are given
        ended = type_line(monkeypatch, name, *words)
        assert "error" not in ended.lower(), (name, ended)
        assert (name, found_in(ended), found_in("".join(capfd.readouterr()))) == (name, [], [])
    files = [path for path in home.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"evaluated.json", "index.html", "g.html", "f.npz", "README.md", "config.json"} <= names
    assert {path.suffix for path in files} >= {".safetensors", ".pt", ".txt", ".csv", ".tex"}
    assert [path for path in files if CANARY.search(path.read_text(errors="replace"))] == []


@pytest.mark.slow
def test_no_file_of_wandb_holds_a_secret_of_the_runs_path_or_options(
    secrets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home" / name))
    run = tmp_path / TOKEN / "run"
    run.mkdir(parents=True)
    weights = run / "a.safetensors"
    weights.write_bytes(b"weights")
    config = TrackerConfig("wandb", mode=TrackerMode.offline, artifacts=True, group=ADDRESS)
    config.tags = [ADDRESS, PASSWORD]
    facts = RunFacts("distill", "label", ["a"], {"data": {"root": ADDRESS}}, {"a": weights})
    with WandbTracker(run, config, facts) as tracker:
        tracker.PATIENCE_S = 100  # type: ignore[misc]
        tracker.rewind({})
        tracker.log(1, {"a/loss": 1.0})
        tracker.log_table("table", ["column"], [[1.0]])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".wandb", ".log"}
    assert [path for path in files if CANARY.search(path.read_text(errors="replace"))] == []
