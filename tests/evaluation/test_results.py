from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from seed_exp import __version__
from seed_exp.base.files import file_hash
from seed_exp.evaluation.results import run_home, write_results


def test_a_result_is_kept_with_all_it_depends_on(tmp_path: Path) -> None:
    path = write_results(tmp_path, "knn", {"k": 10}, {"resnet18": 63.0})
    content = json.loads(path.read_text())
    assert path.parent == tmp_path / "results"
    assert path.name.startswith("knn-")
    assert (content["evaluation"], content["protocol"], content["results"]) == (
        "knn",
        {"k": 10},
        {"resnet18": 63.0},
    )
    assert content["versions"].keys() == {"seed_exp", "python", "torch", "torchvision", "timm"}
    assert content["versions"]["seed_exp"] == __version__


def test_the_same_evaluation_overwrites_itself_and_no_other(tmp_path: Path) -> None:
    first = write_results(
        tmp_path, "knn", {"k": 10, "data": {"source": "x", "split": "val"}}, {"a": 1.0}
    )
    again = write_results(
        tmp_path, "knn", {"data": {"split": "val", "source": "x"}, "k": 10}, {"a": 2.0}
    )
    other = write_results(
        tmp_path, "knn", {"k": 20, "data": {"source": "x", "split": "val"}}, {"a": 3.0}
    )
    linear = write_results(
        tmp_path, "linear", {"k": 10, "data": {"source": "x", "split": "val"}}, {"a": 4.0}
    )
    assert again == first
    assert json.loads(first.read_text())["results"] == {"a": 2.0}
    assert len({first, other, linear}) == len(list((tmp_path / "results").iterdir())) == 3


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 3 * 2**20 + 5])
def test_the_hash_is_sha256_of_the_whole_file(size: int, tmp_path: Path) -> None:
    content = bytes(index % 251 for index in range(size))
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_results_go_to_the_run_of_the_student(tmp_path: Path) -> None:
    student = tmp_path / "run" / "students" / "a.safetensors"
    student.parent.mkdir(parents=True)
    student.touch()
    (tmp_path / "exported.safetensors").touch()
    assert run_home(tmp_path / "run") == tmp_path / "run"
    assert run_home(student) == tmp_path / "run"
    assert run_home(tmp_path / "exported.safetensors") == tmp_path
