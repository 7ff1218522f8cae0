"""No file from outside can run code or write where it likes.

What we write can be read by those whom the user lets.
"""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from test_layers import MODULES, calls, imports, name_of, parse

from seed_exp.base.files import atomic_write
from seed_exp.config.schema import DataFormat
from seed_exp.data.shards import ShardsSource
from seed_exp.data.writers import convert

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
