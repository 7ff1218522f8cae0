"""The wheel, away from the checkout, holds conf/ and experiments/.

Every command composes from any working directory.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from seed_exp.config.schema import SCHEMAS

REPOSITORY = Path(__file__).parents[1]
COMPOSE_ALL = """
import importlib, re, sys
import seed_exp
from seed_exp.config.compose import compose, config_home, groups
from seed_exp.config.schema import EVALUATIONS, SCHEMAS
print(seed_exp.__file__)
print(config_home())
for name, schema in SCHEMAS.items():
    importlib.import_module(f"seed_exp.{name}")
    needs_run = (*EVALUATIONS, "export", "embed")
    required = {name: ["run=x"] for name in needs_run}
    required |= {"bench": ["bench=loss"], "convert": ["to=tsv", "output=x"]}
    assert type(compose(name, required.get(name, []))) is schema
    print(name)
for experiment in groups()["experiments"]:
    file = config_home() / "experiments" / f"{experiment}.yaml"
    text = file.read_text()
    command = re.search(rf"python -m seed_exp\\.(\\w+) experiments={experiment}\\b", text)[1]
    compose(command, [f"experiments={experiment}"])
    print(experiment)
"""

pytestmark = pytest.mark.slow


def call(*arguments: str, folder: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = path
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with the backend at hand or else with a downloaded one."""
    out = tmp_path_factory.mktemp("dist")
    isolation = [] if importlib.util.find_spec("hatchling") is None else ["--no-isolation"]
    done = call(
        "-m", "build", "--wheel", *isolation, "--outdir", str(out), str(REPOSITORY), folder=out
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    done = call(
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
        str(wheel),
        folder=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_the_package_conf_and_experiments_and_nothing_else(wheel: Path) -> None:
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (
        path
        for suffix in ("py", "css", "js")
        for path in (REPOSITORY / "seed_exp").rglob(f"*.{suffix}")
    )
    package = {f"seed_exp/{path.relative_to(REPOSITORY / 'seed_exp')}" for path in files}
    package.add("seed_exp/py.typed")
    config = {
        f"seed_exp/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "conf").rglob("*.yaml")
    }
    experiments = {
        f"seed_exp/{path.relative_to(REPOSITORY)}"
        for path in (REPOSITORY / "experiments").rglob("[!.]*")
        if path.is_file()
    }
    assert "seed_exp/experiments/published.csv" in experiments
    assert found - {"seed_exp/experiments/.keep"} == package | config | experiments


def test_the_wheel_carries_the_licence_and_what_it_requires(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (licence,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
    assert archive.read(licence).decode() == (REPOSITORY / "LICENSE").read_text()
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    required = [
        line
        for line in archive.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist:")
    ]
    assert any(line.startswith("Requires-Dist: hydra-core") for line in required)


def test_every_command_and_experiment_composes_from_the_wheel_in_another_folder(
    installed: Path, tmp_path: Path
) -> None:
    done = call("-c", COMPOSE_ALL, folder=tmp_path, path=str(installed))
    assert done.returncode == 0, done.stderr
    file, home, *composed = done.stdout.splitlines()
    assert Path(file) == installed / "seed_exp" / "__init__.py"
    assert Path(home) == installed / "seed_exp"
    assert set(composed) >= SCHEMAS.keys()
    assert set(composed) - SCHEMAS.keys() == {
        path.stem for path in (REPOSITORY / "experiments").glob("*.yaml")
    }


def test_the_wheel_s_console_script_runs_the_commands(installed: Path, tmp_path: Path) -> None:
    script = str(installed / "bin" / "seed-exp")
    done = call(script, "distill", "--cfg", "job", folder=tmp_path, path=str(installed))
    same = call("-m", "seed_exp.distill", "--cfg", "job", folder=tmp_path, path=str(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout == same.stdout


def test_a_command_of_the_wheel_runs_and_writes_into_the_folder_it_is_called_from(
    installed: Path, tmp_path: Path
) -> None:
    line = ["-m", "seed_exp.preview", "data=digits", "views=digits", "num_images=1"]
    done = call(*line, folder=tmp_path, path=str(installed))
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
    wrong = call(*line, "views=digit", folder=tmp_path, path=str(installed))
    assert wrong.returncode == 1
    assert wrong.stderr.startswith(
        "error: no option 'digit' in config group 'views'; did you mean 'digits'?"
    )
