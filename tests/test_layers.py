"""The rooms of the house and the arrows between them, read from the import statements.

No module of a room is imported here.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from seed_exp import CALLS

PACKAGE = Path(__file__).parents[1] / "seed_exp"
MODULES = sorted(PACKAGE.rglob("*.py"))

FOR_EVERYONE = {"", "base", "config.schema", "config.options", "config.identity"}
"""The package itself (its version), leaves that import nothing of it, and the options."""

ROOMS = {
    "base": set(),
    "config": {"config"},
    "models": {"models"},
    "data": {"data"},
    "views": {"views"},
    "methods": {
        "models",
        "data",
        "views",
        "methods.grouped",
        "methods.losses",
        "methods.clustering",
        "methods.collapse",
        "methods.dense",
        "methods.momentum",
        "methods.objectives",
        "methods.queue",
        "methods.temperature",
        "methods.streaming",
        "methods.teacher_cache",
        "engine.distributed",
        "engine.method",
    },
    "engine": {
        "engine",
        "data.bad_samples",
        "data.loader",
        "data.order",
        "data.sources",
        "data.transfer",
        "views.recipe",
    },
    "evaluation": {"evaluation", "engine", "methods", "models", "data", "views"},
    "reporting": {"reporting", "evaluation", "methods", "models", "data", "views"},
    "exporting": {"exporting", "reporting", "evaluation", "engine", "models", "data", "views"},
    "benchmarks": {
        "benchmarks",
        "exporting",
        "reporting",
        "evaluation",
        "engine",
        "methods",
        "models",
        "data",
        "views",
    },
    "cluster": {"cluster", "config"},
    "protocols": {
        "protocols",
        "config",
        "reporting",
        "evaluation",
        "engine",
        "methods",
        "models",
        "data",
        "views",
    },
}
ROOMS["training"] = ROOMS["protocols"] | {"training"}
ROOMS["tools"] = ROOMS["training"] | {"tools", "benchmarks", "cluster", "exporting"}
ROOMS["python"] = ROOMS["tools"] | {"python", "tools"}
"""Rooms that each room may import besides those for everyone: itself and those below it.

`engine.distributed` is the door to torch.distributed, and `engine.method` says what a method is;
both stand below the methods. The rest of the engine trains any method and knows none.
"""

WITHIN = {
    "config.schema": {"config.schema"},
    "config.options": {"config.schema"},
    "config.identity": {"config.options", "config.schema", "base"},
    "base": {"base"},
    # Its walk is that of Seed, with pairs of images.
    "methods.bags": FOR_EVERYONE | ROOMS["methods"] | {"methods.seed"},
    "python.callable_module": {"python.calls"},
}
"""The only modules that these may import."""
DOORS = {file.stem for file in MODULES if file.parent == PACKAGE} - {"__init__"}
NOT_COMPOSED = {"plan", "sweep", "zoo", "__main__"}
"""Commands without an options file of their own.

The first two take the options of the command that they plan for or submit; the last lists all.
"""


def name_of(file: Path) -> str:
    """`engine.fit` for seed_exp/engine/fit.py; an __init__.py is its folder."""
    return (
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .removesuffix(".")
    )


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all imports, wherever the statement stands.

    For example `torch.nn.functional`, `seed_exp.base.files.write_json`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names
            )


def modules_of(tree: ast.AST) -> Iterator[str]:
    """Imported modules of this package, without its name.

    For example `base.files`, `engine.fit`, "" for the package.
    """
    known = {name_of(file) for file in MODULES}
    for imported in imports(tree):
        package, _, name = imported.partition(".")
        if package == "seed_exp":
            yield name if name in known else name.rpartition(".")[0]


def within(name: str, places: set[str]) -> bool:
    return any(name == place or (place and name.startswith(f"{place}.")) for place in places)


def allowed(name: str) -> set[str]:
    """Modules of this package that module `name` may import."""
    for place, below in WITHIN.items():
        if within(name, {place}):
            return below
    return FOR_EVERYONE | ROOMS.get(
        name.partition(".")[0], {"config", "training", "protocols", "tools", "python"}
    )


def forbidden_imports(name: str, tree: ast.AST) -> list[str]:
    return [imported for imported in modules_of(tree) if not within(imported, allowed(name))]


def dotted(node: ast.AST) -> str:
    """`torch.nn.parallel` for that expression; empty for what is no dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    owner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if isinstance(node, ast.Attribute) and owner else ""


def uses(tree: ast.AST, library: str) -> bool:
    """Whether the library is imported, or reached through an imported one.

    For example `torch.distributed.init_process_group()`.
    """
    return any(name == library or name.startswith(f"{library}.") for name in names_in(tree))


@functools.cache
def names_in(tree: ast.AST) -> frozenset[str]:
    """Names of what is imported, and of what is reached with dots."""
    return frozenset([*imports(tree), *map(dotted, ast.walk(tree))])


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    return ((dotted(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


@functools.cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_arrows_point_down_only(file: Path) -> None:
    assert forbidden_imports(name_of(file), parse(file)) == []


def test_every_folder_is_a_room_and_every_module_at_the_top_a_door() -> None:
    assert {file.parent.name for file in PACKAGE.glob("*/__init__.py")} == ROOMS.keys()
    for name in DOORS - NOT_COMPOSED:
        assert (PACKAGE.parent / "conf" / f"{name}.yaml").exists(), name
        assert (
            f'main = command("{name}", {name}, __doc__' in (PACKAGE / f"{name}.py").read_text()
        ), name
    for name in DOORS:
        text = (PACKAGE / f"{name}.py").read_text()
        assert ("make_callable(__name__)" in text) == (name in CALLS), name
        lines = text.splitlines()
        assert len(lines) <= 60, name


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("hydra", {"config"}),
        ("omegaconf", {"config"}),
        ("wandb", {"engine.wandb_process"}),
        ("tensorboard", {"engine.tensorboard_process"}),
        ("mlflow", {"engine.mlflow_process"}),
        ("torch.distributed", {"engine.distributed"}),
        ("torch.nn.parallel", {"engine.distributed"}),
        ("nn.parallel", {"engine.distributed"}),
        ("submitit", set()),
        (
            "importlib",
            {"", "__main__", "base.optional", "base.places", "base.plugins", "config.search"},
        ),
        ("pandas", {"python"}),
        ("onnx", {"exporting"}),
        ("onnxruntime", {"exporting"}),
        ("openvino", {"exporting"}),
        ("pyarrow", {"exporting", "data.hf_columns", "data.hugging_face"}),
        ("huggingface_hub", {"exporting", "models.hub_weights", "data.hugging_face"}),
        # torchvision has a module of this name too.
        ("datasets", {"data.hf_columns", "data.hugging_face", "data.torchvision_sets"}),
        (
            "pycocotools",
            {"data.detection_sets", "evaluation.average_precision", "protocols.detect"},
        ),
    ],
)
def test_a_library_is_known_only_where_it_belongs(library: str, places: set[str]) -> None:
    users = {name_of(file) for file in MODULES if uses(parse(file), library)}
    assert {name for name in users if not within(name, places)} == set()


@pytest.mark.parametrize(
    "file", [file for file in MODULES if within(name_of(file), {"config.schema"})], ids=name_of
)
def test_the_schema_takes_nothing_but_missing_of_omegaconf(file: Path) -> None:
    edge = [name for name in imports(parse(file)) if name.startswith(("omegaconf", "hydra"))]
    assert edge in ([], ["omegaconf.MISSING"])


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_are_absolute_and_never_computed(file: Path) -> None:
    tree = parse(file)
    assert [name for name in imports(tree) if name.startswith(".")] == []
    assert [
        function for function, _ in calls(tree) if function in ("__import__", "exec", "eval")
    ] == []


# These tests can fail.


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("models.new", "from seed_exp.data.loader import load_batches"),
        ("views.new", "from seed_exp.models import students"),
        ("data.new", "import seed_exp.engine.distributed"),
        ("methods.new", "from seed_exp.methods.seed import Seed"),
        ("methods.new", "from seed_exp.engine.fit import fit"),
        ("engine.new", "from seed_exp.evaluation.votes import nearest"),
        ("engine.new", "from seed_exp.methods import losses"),
        ("engine.new", "def late():\n    from seed_exp.data import tsv"),
        ("evaluation.new", "from seed_exp.reporting import image_grids"),
        ("evaluation.new", "from seed_exp.training.encoders import train_encoders"),
        ("protocols.new", "from seed_exp.training.encoders import train_encoders"),
        ("training.new", "from seed_exp.tools import report"),
        ("engine.new", "from seed_exp.config.compose import compose"),
        ("evaluation.new", "from seed_exp.benchmarks import measure"),
        ("benchmarks.new", "from seed_exp.training.encoders import build_students"),
        ("cluster.new", "from seed_exp.engine.run_folder import open_run"),
        ("base.new", "from seed_exp.config.schema import FitConfig"),
        ("config.schema.new", "from seed_exp.base import files"),
        ("config.options", "from seed_exp.config.compose import compose"),
        ("knn", "from seed_exp.linear import linear"),
        ("knn", "from seed_exp.evaluation.votes import nearest"),
    ],
)
def test_an_arrow_that_points_up_or_sideways_is_found(name: str, source: str) -> None:
    assert len(forbidden_imports(name, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("methods.new", "from seed_exp.methods.losses import seed_loss"),
        ("methods.new", "from seed_exp.engine import distributed"),
        ("models.new", "from seed_exp.config.schema import StudentConfig"),
        ("engine.new", "from seed_exp import __version__"),
        ("evaluation.new", "from seed_exp.engine import distributed"),
        ("knn", "from seed_exp.protocols.knn import knn"),
        ("benchmarks.new", "from seed_exp.engine.fleet import Fleet"),
        ("quickstart", "from seed_exp.tools import quickstart"),
    ],
)
def test_an_arrow_that_points_down_is_let_through(name: str, source: str) -> None:
    assert forbidden_imports(name, ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_every_way_to_reach_a_library_is_found(source: str) -> None:
    assert uses(ast.parse(source), "torch.distributed")
    assert not uses(ast.parse(source), "torch.distributions")
