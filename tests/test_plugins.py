"""The plug-in of docs/extending.md, as it stands there, and plug-ins that are wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

import seed_exp
from seed_exp.base import plugins
from seed_exp.base.registry import Registry
from seed_exp.config.compose import compose, groups
from seed_exp.config.schema import OBJECTIVE_CONFIGS

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
FILES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", PAGE.read_text(), re.M | re.S))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the search path of Python, in place of other plug-ins; this process is in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(PAGE.parents[1])]))
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    before, modules = dict(OBJECTIVE_CONFIGS), set(sys.modules)
    plugins._imported.cache_clear()
    yield tmp_path
    plugins._imported.cache_clear()
    for name in OBJECTIVE_CONFIGS.keys() - before:
        del OBJECTIVE_CONFIGS[name]
        del ConfigStore.instance().repo["objective"][f"{name}_schema.yaml"]
    for name in sys.modules.keys() - modules:
        if name.partition(".")[0] in ("more_seed", "wrong"):
            del sys.modules[name]


def install(site: Path, files: dict[str, str], name: str = "more_seed") -> None:
    """Leaves what an installer leaves: files, and the entry point of module `name`."""
    info = f"{name}-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/entry_points.txt": f"[seed_exp.plugins]\n{name} = {name}\n",
    }
    for path, text in (files | metadata).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)


def test_the_page_has_a_file_of_every_kind() -> None:
    text = FILES["more_seed/__init__.py"]
    assert {name for name in (*plugins.REGISTRIES, "CONF") if f"\n{name} = " in text} == {
        *plugins.REGISTRIES,
        "CONF",
    } - {"TEACHER_SSL"}
    assert f'entry-points."{plugins.GROUP}"' in FILES["pyproject.toml"]


def test_one_of_each_kind_distils_and_is_evaluated(site: Path) -> None:
    install(site, FILES)
    run = seed_exp.distill(experiments="trial", objective={"sharpness": 2}, device="cpu")
    config = json.loads((run.folder / "config.json").read_text())
    assert config["plugins"] == {"more_seed": "1.0"}
    assert config["inputs"] == {"data": "stripes:train:64", "teacher": "colours-4x4"}
    assert config["options"]["objective"]["sharpness"] == 2
    assert config["options"]["views"]["operations"] == ["solarize"]
    assert "2,patch_net/loss," in (run.folder / "metrics.csv").read_text()
    assert run.load().info.network == "patch_net"
    assert seed_exp.knn(run, ks=[3]).numbers["patch_net"]["knn3_majority"] >= 0


def test_help_shows_what_a_plug_in_adds_and_imports_no_torch(site: Path) -> None:
    install(site, FILES)
    code = "import sys, runpy; sys.argv[1:] = ['objective=cosine', '--help']\n"
    code += "runpy.run_module('seed_exp.distill', run_name='__main__', alter_sys=True)\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    for found in ("patch_net", "colours", "cosine*", "stripes", "csv", "trial"):
        assert found in done.stdout
    assert "objective.sharpness=1.0\n        Exponent of the distance." in done.stdout


def test_a_module_named_in_the_environment_is_a_plug_in(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site / "more_seed.py").write_text("TRACKERS = {'silent': 'x:y'}")
    assert "silent" not in Registry("TRACKERS", {})
    monkeypatch.setenv("SEED_PLUGINS", "more_seed")
    assert "silent" in Registry("TRACKERS", {})
    with pytest.raises(ValueError, match=r"plug-in more_seed .*TRACKERS\['silent'\], x:y"):
        Registry("TRACKERS", {})["silent"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"wrong.py": "1 / 0"}, "raises when it is imported: ZeroDivisionError"),
        ({"wrong.py": "import not_there"}, "raises .* No module named 'not_there'"),
        ({"wrong.py": "STUDENT = {}"}, "adds nothing; it has none of STUDENTS"),
        ({"wrong.py": "STUDENTS = []"}, "STUDENTS must be a dictionary"),
        ({"wrong.py": "import pathlib\nCONF = pathlib.Path('nowhere')"}, "CONF=nowhere is no"),
        ({"wrong.py": "OBJECTIVE_CONFIGS = {'seed': int}"}, r"\['seed'\] must be a dataclass"),
        (
            {
                "wrong.py": "from seed_exp.config.schema import L2Config\n"
                "class Config(L2Config): ...\nOBJECTIVE_CONFIGS = {'l2': Config}"
            },
            r"adds OBJECTIVE_CONFIGS\['l2'\], which seed_exp has already",
        ),
        (
            {
                "wrong/__init__.py": "from pathlib import Path\nCONF = Path(__file__).parent / 'c'",
                "wrong/c/student/resnet18.yaml": "network: x",
            },
            "adds the option file student/resnet18.yaml, which seed_exp has already",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_plug_in_is_one_line_with_its_name(
    site: Path, files: dict[str, str], message: str
) -> None:
    install(site, files, "wrong")
    with pytest.raises(ValueError, match=rf"^plug-in wrong \(wrong\).*{message}"):
        seed_exp.distill()


def test_a_command_says_it_in_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, {"wrong.py": "1 / 0"}, "wrong")
    monkeypatch.setattr(sys, "argv", ["distill", "--help"])
    with pytest.raises(SystemExit, match=r"^error: plug-in wrong .*ZeroDivisionError"):
        seed_exp.distill.main()  # type: ignore[attr-defined]


def test_an_entry_that_exists_is_refused_with_the_plug_in_s_name(site: Path) -> None:
    install(site, {"wrong.py": "STUDENTS = {'mine': 'x:y'}"}, "wrong")
    with pytest.raises(ValueError, match=r"wrong.* adds STUDENTS\['mine'\], which seed_exp has"):
        Registry("STUDENTS", {"mine": 1})["mine"]


def test_a_registry_is_a_dictionary_of_its_own_entries_where_there_is_no_plug_in(
    site: Path,
) -> None:
    own = Registry("STUDENTS", {"a": 1, "b": 2})
    assert (dict(own), sorted(own), len(own), own.get("c")) == (
        {"a": 1, "b": 2},
        ["a", "b"],
        2,
        None,
    )


def test_two_plug_ins_with_the_same_option_file_are_refused(site: Path) -> None:
    module = "from pathlib import Path\nCONF = Path(__file__).parent / 'c'"
    for name in ("more_seed", "wrong"):
        install(
            site, {f"{name}/__init__.py": module, f"{name}/c/data/mine.yaml": "source: x"}, name
        )
    with pytest.raises(ValueError, match=r"data/mine\.yaml, which plug-in \w+ .* has already"):
        groups()


def test_the_draws_of_an_operation_change_no_other_random_number(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import tiny
    import torch

    from seed_exp.views.draws import uniforms
    from seed_exp.views.operations import VIEW_OPERATIONS, Operation
    from seed_exp.views.photometric import Column
    from seed_exp.views.recipe import TrainViews

    seen: list[torch.Tensor] = []

    def keep(views: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        seen.append(draws)
        return views

    monkeypatch.setitem(VIEW_OPERATIONS, "keep", Operation(keep, num_draws=2))
    images, indices = [tiny.Images().image(index) for index in range(4)], np.arange(4)
    batches = []
    for operations in ([], ["keep"], ["keep", "keep"]):
        views = TrainViews(tiny.views_config(operations=operations), seed=1)
        batch = views.empty(4)
        views.host(images, np.full(4, -1), 0, indices, batch)
        batches.append((batch, views.device(batch)))
    (plain, plain_views), (added, added_views), (twice, _) = batches
    for name, draws in plain.draws.items():
        assert torch.equal(added.draws[name][..., : len(Column)], draws)
        assert torch.equal(plain_views[name], added_views[name])
        assert added.draws[name].shape[-1] == len(Column) + 2
        assert twice.draws[name].shape[-1] == len(Column) + 4
    values = torch.cat(seen).flatten()
    assert len(values.unique()) > 20
    taken = np.concatenate([uniforms(1, 0, indices, stream, 64).ravel() for stream in range(4)])
    assert not np.isin(values.numpy(), taken.astype(np.float32)).any()
    assert 0 <= values.min() < values.max() < 1
    with pytest.raises(ValueError, match="unknown view operation 'blur'"):
        TrainViews(tiny.views_config(operations=["blur"]), seed=1)


def test_another_program_s_hydra_sees_nothing_of_ours(site: Path) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    (site / "mine.yaml").write_text("defaults:\n  - experiments: objectives\n")
    compose("knn", ["run=x", "data=digits"])  # ours is registered
    with (
        initialize_config_dir(str(site), version_base="1.3"),
        pytest.raises(Exception, match="experiments/objectives"),
    ):
        hydra_compose("mine")
