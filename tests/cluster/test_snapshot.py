"""Jobs run from a copy of the code that nothing changes, and the origin of the copy is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seed_exp.cluster.snapshot import git_state, snapshot_name, take_snapshot

HELLO = (
    "import sys, seed_exp\n"
    "if __name__ == '__main__':\n"
    "    print({!r}, seed_exp.__file__, *sys.argv[1:])\n"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working tree with a command that says where it comes from."""
    for folder in ("seed_exp/__pycache__", "conf/data", "experiments"):
        (tmp_path / "tree" / folder).mkdir(parents=True)
    (tmp_path / "tree/seed_exp/__init__.py").touch()
    (tmp_path / "tree/seed_exp/hello.py").write_text(HELLO.format("old"))
    (tmp_path / "tree/seed_exp/__pycache__/hello.pyc").write_bytes(b"compiled")
    (tmp_path / "tree/conf/data/digits.yaml").write_text("source: digits\n")
    (tmp_path / "tree/README.md").write_text("words\n")
    return tmp_path / "tree"


def git(tree: Path, *arguments: str) -> str:
    line = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def test_a_snapshot_holds_code_and_options_and_nothing_else(tree: Path, tmp_path: Path) -> None:
    take_snapshot(tree, tmp_path / "copies" / "a")
    files = {
        str(path.relative_to(tmp_path / "copies/a"))
        for path in (tmp_path / "copies/a").rglob("*")
        if path.is_file()
    }
    assert files == {
        "__main__.py",
        "seed_exp/__init__.py",
        "seed_exp/hello.py",
        "conf/data/digits.yaml",
    }
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["a"]


def test_what_is_edited_afterwards_does_not_change_it_even_where_the_edited_code_lies_in_the_working_directory(  # noqa: E501
    tree: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copies" / "a"
    take_snapshot(tree, copy)
    (tree / "seed_exp/hello.py").write_text(HELLO.format("new"))
    run = [sys.executable, str(copy), "hello", "seed=1", "a b"]
    printed = subprocess.run(run, cwd=tree, check=True, capture_output=True, text=True).stdout
    assert printed == f"old {copy}/seed_exp/__init__.py seed=1 a b\n"


def test_its_name_is_that_of_its_content(tree: Path) -> None:
    before = snapshot_name(tree)
    (tree / "README.md").write_text("other words\n")
    (tree / "seed_exp/__pycache__/hello.pyc").write_bytes(b"compiled again")
    assert snapshot_name(tree) == before
    (tree / "conf/data/digits.yaml").write_text("source: tsv\n")
    edited = snapshot_name(tree)
    (tree / "conf/data/digits.yaml").rename(tree / "conf/data/other.yaml")
    assert len({before, edited, snapshot_name(tree)}) == 3


def test_the_state_of_git_is_the_commit_and_a_hash_of_what_differs_from_it(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree, "add", "seed_exp/__init__.py", "seed_exp/hello.py", "conf")
    git(tree, "commit", "-qm", "first")
    (tree / ".gitignore").write_text("__pycache__\n")
    commit = git(tree, "rev-parse", "HEAD")
    assert git_state(tree) == {"commit": commit, "diff": None}
    states = [git_state(tree)]
    (tree / "seed_exp/hello.py").write_text("edited")
    states.append(git_state(tree))
    (tree / "seed_exp/new.py").write_text("not added")
    states.append(git_state(tree))
    (tree / "seed_exp/new.py").write_text("not added, edited")
    states.append(git_state(tree))
    assert {state["commit"] for state in states} == {commit}
    assert len({state["diff"] for state in states}) == 4


def test_names_of_all_kinds_and_links_to_nowhere_are_no_obstacle(
    tree: Path, tmp_path: Path
) -> None:
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    (tree / "experiments/größe\n2.yaml").write_text("a: 1\n")
    before = git_state(tree)
    (tree / "experiments/größe\n2.yaml").write_text("a: 2\n")
    assert git_state(tree)["diff"] not in (None, before["diff"])
    name = snapshot_name(tree)
    (tree / "seed_exp/.#hello.py").symlink_to(
        "me@machine.123"
    )  # of an editor that has the file open
    assert snapshot_name(tree) == name
    git_state(tree)
    take_snapshot(tree, tmp_path / "copies" / "a")
    assert (tmp_path / "copies/a/experiments/größe\n2.yaml").exists()


def test_outside_of_git_there_is_none(tree: Path, tmp_path: Path) -> None:
    assert git_state(tree) == {"commit": None, "diff": None}
    git(tmp_path, "init", "-q")  # as a virtual environment in somebody's repository
    assert git_state(tree) == {"commit": None, "diff": None}
