"""A student and a teacher of a module outside of the package, through the commands as typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest

pytestmark = pytest.mark.slow

NETS = """
from torch import nn

class Small(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, images):
        return self.maps(images).mean((2, 3))

def student(width=8):
    return Small(width)

def teacher():
    import torch
    torch.manual_seed(5)
    return Small(24)

def map_of(width=8):
    return nn.Conv2d(3, width, 3)
"""
DISTILL = [
    *("distill", "student=custom", "students.custom.network=my_nets:student"),
    *("students.custom.args={width: 12}", "teacher=custom", "teacher.network=my_nets:teacher"),
    *("data=digits", "views=digits", "data.num_workers=0", "tracker=files", "device=cpu"),
    *("steps=3", "batch_size=32", "objective.queue_size=64", "run_dir=run"),
    *("knn_bank_size=100", "knn_query_size=50", "evaluations=[knn]"),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's working directory."""
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEED_CUSTOM", raising=False)
    return tmp_path


def typed(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    package = Path(__file__).parents[2]
    paths = os.environ | {"PYTHONPATH": str(package)} | environment
    return forks.run(
        [sys.executable, "-m", f"seed_exp.{words[0]}", *words[1:]],
        capture_output=True,
        text=True,
        check=False,
        env=paths,
    )


def test_both_are_trained_exported_and_reloaded(home: Path) -> None:
    done = typed(*DISTILL)
    assert done.returncode == 0, done.stderr
    inputs = json.loads((home / "run" / "config.json").read_text())["inputs"]
    assert len(inputs["students.custom.network"]) == 64
    assert " by code " in inputs["teacher"]
    assert list((home / "run" / "results").glob("knn-*.json"))  # in the same process
    assert typed(*DISTILL).returncode == 0  # the same run, which is done

    for command in (["knn", "run=run"], ["export", "run=run", "formats=[torch_export]"]):
        refused = typed(*command)
        assert refused.returncode == 1
        assert "set SEED_CUSTOM=my_nets:student" in refused.stderr
        given = typed(*command, SEED_CUSTOM="my_nets:student")
        assert given.returncode == 0, given.stderr
    card = (home / "run" / "export" / "custom" / "README.md").read_text()
    assert 'The network is `my_nets:student` with `{"width": 12}`: ' in card

    program = """
import torch
from seed_exp import load
encoder = load("run")
images = torch.randn(2, 3, 32, 32)
exported = torch.export.load("run/export/custom/model.pt2").module()
torch.testing.assert_close(exported(images)[0], encoder.encoder(images))
print(encoder.info.network, encoder.info.num_features)
"""
    environment = os.environ | {"SEED_CUSTOM": "my_nets:student"}
    environment["PYTHONPATH"] = os.pathsep.join([str(home), str(Path(__file__).parents[2])])
    loaded = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert loaded.stdout == "my_nets:student 12\n", loaded.stderr

    # Other code of the same networks is another run, and no network of this one's files.
    (home / "my_nets.py").write_text(NETS.replace("ReLU", "GELU"))
    changed = typed(*DISTILL)
    assert changed.returncode == 1
    assert "content of students.custom.network was" in changed.stderr
    assert (
        "trained with other code" in typed("knn", "run=run", SEED_CUSTOM="my_nets:student").stderr
    )


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("my_nets:map_of", "returns, for an image of 224 x 224 pixels, a map [1, 8, 222, 222]"),
        ("my_nets:absent", "my_nets has no function 'absent'; expected module:function"),
        ("my_netz:student", "no module named 'my_netz'; expected module:function"),
    ],
)
def test_a_wrong_factory_ends_the_command_before_training(
    home: Path, network: str, message: str
) -> None:
    words = [word for word in DISTILL if not word.startswith("students.custom.")]
    done = typed(*words, f"students.custom.network={network}")
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (home / "run").exists()
