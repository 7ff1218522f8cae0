"""Whatever bytes a file of weights holds: tensors, or an error that names the file.

Never code, never much memory.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from fuzzing import assert_ours, damaged, fuzz
from hypothesis import strategies as st
from safetensors.torch import save

from seed_exp.config.schema import StudentConfig
from seed_exp.engine.checkpoint import CheckpointWriter, load_checkpoint
from seed_exp.models.students import build_student, load_students, save_student
from seed_exp.models.teacher_ssl import TEACHER_SSL, load_weights
from seed_exp.models.weights import read_checkpoint
from seed_exp.models.wide_resnet import WideResNet

STATE = {
    "step": 3,
    "networks": {"a": {"weight": torch.arange(6.0).view(2, 3), "num": torch.tensor(5)}},
    "names": ["a", None, 0.5],
}


def torch_file(state: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def with_pickle(edit: Callable[[bytes], bytes]) -> bytes:
    """A zip as torch.save writes it, checksums and all, whose pickle is another."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIP)) as given, zipfile.ZipFile(buffer, "w") as written:
        for entry in given.infolist():
            content = given.read(entry)
            written.writestr(
                entry.filename, edit(content) if entry.filename.endswith("/data.pkl") else content
            )
    return buffer.getvalue()


ZIP, LEGACY = torch_file(STATE), torch_file(STATE, zipped=False)
PICKLE = zipfile.ZipFile(io.BytesIO(ZIP)).read("archive/data.pkl")
SAFE = save(
    {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
    {"note": "x"},
)


def check_read(content: bytes, name: str) -> dict[str, Any] | None:
    """Reads this content with `read_checkpoint`; raises errors of other kinds than ours."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            assert_ours(error, str(path))
            return None
        assert type(checkpoint) is dict
        return checkpoint


@fuzz(120, content=damaged(ZIP) | damaged(LEGACY) | st.binary(max_size=60))
def test_a_damaged_torch_file_is_a_dictionary_or_our_error(content: bytes) -> None:
    check_read(content, "weights.pth")


@fuzz(120, content=damaged(SAFE) | st.binary(max_size=60))
def test_a_damaged_safetensors_file_is_tensors_or_our_error(content: bytes) -> None:
    for tensor in (check_read(content, "weights.safetensors") or {}).values():
        assert isinstance(tensor, torch.Tensor)


@fuzz(120, content=damaged(PICKLE))
def test_a_zip_with_another_pickle_is_a_dictionary_or_our_error(content: bytes) -> None:
    check_read(with_pickle(lambda _: content), "weights.pth")


def check_load(newest: bytes, before: bytes | None) -> dict[str, Any] | None:
    """Loads the checkpoint of a run with these files."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "step_00000007.pt").write_bytes(newest)
        if before is not None:
            (folder / "checkpoints" / "step_00000003.pt").write_bytes(before)
        try:
            return load_checkpoint(folder)
        except ValueError as error:
            assert_ours(error, str(folder))
            return None


def run_checkpoint() -> bytes:
    with TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), keep=lambda _: False, before_write=lambda _: None)
        writer.submit(STATE)
        writer.close(finished=True)
        (path,) = (Path(folder) / "checkpoints").glob("step_*.pt")
        return path.read_bytes()


RUN = run_checkpoint()


@fuzz(100, newest=damaged(RUN))
def test_behind_a_damaged_checkpoint_the_one_before_is_found(newest: bytes) -> None:
    state = check_load(newest, RUN)
    assert state is not None
    assert torch.equal(state["networks"]["a"]["weight"], STATE["networks"]["a"]["weight"])


@fuzz(
    60,
    newest=damaged(RUN)
    | damaged(PICKLE).map(lambda content: with_pickle(lambda _: content))
    | st.binary(max_size=60),
)
def test_only_a_damaged_checkpoint_is_a_state_or_our_error(newest: bytes) -> None:
    check_load(newest, None)


# Student files.


def student_file() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        config = StudentConfig("convnet_w2")
        save_student(
            path, build_student(config, 4), config, {"eval_views": {"mean": [0.5] * 3}, "step": 3}
        )
        return path.read_bytes()


STUDENT = student_file()


def with_header(edit: Callable[[Any], Any]) -> bytes:
    """A student file whose header is another."""
    length = int.from_bytes(STUDENT[:8], "little")
    entries = json.loads(STUDENT[8 : 8 + length])
    entries["__metadata__"]["seed_exp"] = edit(entries["__metadata__"]["seed_exp"])
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + STUDENT[8 + length :]


def check_student(content: bytes) -> bool:
    """Whether it is a student that works; an error of another kind than ours is raised."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(content)
        try:
            ((student, header),) = load_students(path).values()
        except ValueError as error:
            assert_ours(error, str(path))
            return False
        assert isinstance(header, dict)
        assert student.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, header["embedding_dim"])
        return True


@fuzz(60, content=damaged(STUDENT))
def test_a_damaged_student_file_is_a_student_or_our_error(content: bytes) -> None:
    check_student(content)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 4, 10**7, 10**12])
    | st.floats()
    | st.text(max_size=5)
)
JSON = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
HEADER = {
    "network": "convnet_w2",
    "name": None,
    "hidden_dim": None,
    "deep_head": None,
    "init": None,
    "epochs": None,
}


@fuzz(
    120,
    student=st.fixed_dictionaries(
        {}, optional={key: st.just(value) | JSON for key, value in HEADER.items()}
    )
    | JSON,
    embedding_dim=st.just(4) | JSON,
    whole=st.none() | JSON.map(json.dumps) | st.text(max_size=9),
)
def test_a_student_file_with_any_header_is_a_student_or_our_error(
    student: Any, embedding_dim: Any, whole: str | None
) -> None:
    header = json.dumps({"student": student, "embedding_dim": embedding_dim})
    check_student(with_header(lambda _: header if whole is None else whole))


# Weights of teachers, and weights that students start from.

KEYS = st.sampled_from(
    [
        "state_dict",
        "model",
        "module.conv1.weight",
        "module.encoder_q.fc.0.weight",
        "0.weight",
        "module.queue",
    ]
)
ENTRIES = st.recursive(
    st.sampled_from([torch.zeros(2), torch.zeros(2, 3, 3, 3), torch.tensor(1), torch.zeros(0)])
    | VALUES,
    lambda inner: (
        st.dictionaries(KEYS | VALUES.filter(lambda key: key == key), inner, max_size=4)
        | st.lists(inner, max_size=2)
    ),
    max_leaves=6,
)


@fuzz(
    100,
    entries=st.dictionaries(KEYS | st.integers(), ENTRIES, max_size=4),
    convention=st.sampled_from(sorted(TEACHER_SSL)),
)
def test_any_dictionary_is_no_teacher_and_our_error(
    entries: dict[Any, Any], convention: str
) -> None:
    with torch.device("meta"):
        encoder = WideResNet((1, 1, 1, 1))
    with pytest.raises(ValueError, match="does not fit") as raised:
        load_weights(entries, convention, encoder, Path("teacher.pth"))
    assert_ours(raised.value, "teacher.pth")


@fuzz(60, entries=st.dictionaries(KEYS | st.integers(), ENTRIES, max_size=4))
def test_any_dictionary_is_no_beginning_of_a_student_and_our_error(entries: dict[Any, Any]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "init.pth"
        torch.save(entries, path)
        with pytest.raises(ValueError, match=r"init\.pth") as raised:
            build_student(StudentConfig("convnet_w2", init=str(path)), 4)
        assert_ours(raised.value)


# Code.


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def attacks(made: Path) -> dict[str, Any]:
    """Objects whose unpickling would make the file or folder `made`."""
    return {
        "os": Call(os.mkdir, str(made)),
        "system": Call(os.system, f"touch {made}"),
        "eval": Call(eval, f"open({str(made)!r}, 'w')"),
        "exec": Call(exec, f"open({str(made)!r}, 'w')"),
        "open": Call(open, str(made), "w"),
        "getattr": Call(getattr, Call(__import__, "os"), "mkdir"),
        "path": Call(Path.mkdir, made),
        "torch": Call(torch.save, {}, str(made)),
        "storage": Call(torch.UntypedStorage.from_file, str(made), True, 10),
        "numpy": Call(torch.hub.load_state_dict_from_url, f"file://{made}"),
        "nested": {"state_dict": [{"a": (Call(os.mkdir, str(made)),)}]},
        "key": {Call(os.mkdir, str(made)): 1},
    }


ATTACKS = list(attacks(Path("x")))


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain", "protocol 0", "protocol 5"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_with_code_is_refused_and_the_code_not_run(
    tmp_path: Path, attack: str, kind: str
) -> None:
    made = tmp_path / "made"
    content = {"state_dict": {}, "args": attacks(made)[attack]}
    data = {
        "zip": lambda: torch_file(content),
        "legacy": lambda: torch_file(content, zipped=False),
        "plain": lambda: pickle.dumps(content),
        "protocol 0": lambda: with_pickle(lambda _: pickle.dumps(content, 0)),
        "protocol 5": lambda: with_pickle(lambda _: pickle.dumps(content, 5)),
    }[kind]()
    assert check_read(data, "weights.pth") is None
    assert check_read(data, "weights.safetensors") is None
    assert check_load(data, None) is None
    assert not check_student(data)
    assert not made.exists()


def test_the_attacks_would_work_on_a_loader_that_unpickles(tmp_path: Path) -> None:
    for name in ("os", "system", "eval", "exec", "open", "path", "nested", "torch"):
        made = tmp_path / name
        pickle.loads(pickle.dumps(attacks(made)[name]))
        assert made.exists(), name


def test_whole_files_are_read() -> None:
    for content in (ZIP, LEGACY, with_pickle(lambda content: content)):
        checkpoint = check_read(content, "weights.pth")
        assert checkpoint is not None
        assert torch.equal(checkpoint["networks"]["a"]["weight"], STATE["networks"]["a"]["weight"])
    assert check_read(SAFE, "weights.safetensors") is not None
    assert check_load(RUN, None) is not None
    assert check_student(STUDENT)
    assert check_student(with_header(lambda header: header))
