"""Files that may be anything are read or refused in one clear line, and never execute code."""

from __future__ import annotations

import argparse
import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seed_exp.models.student_header import exported_network, read_header
from seed_exp.models.weights import first_keys, mismatch, read_checkpoint, tensors_hash

TENSORS = {"a.weight": torch.arange(6000.0).view(2, 3000), "a.bias": torch.ones(2)}


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_either_format_are_read(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pth.tar"
    torch.save({"epoch": 3, "state_dict": TENSORS}, path, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path)
    assert checkpoint["epoch"] == 3
    assert all(
        torch.equal(checkpoint["state_dict"][key], tensor) for key, tensor in TENSORS.items()
    )


@pytest.mark.parametrize("length", [4, 4000])
def test_zeroed_bytes_in_an_archive_are_not_taken_for_weights(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.pth"
    torch.save({"state_dict": TENSORS}, path)
    content = path.read_bytes()
    position = content.index(TENSORS["a.weight"].numpy().tobytes()) + 400
    path.write_bytes(content[:position] + bytes(length) + content[position + length :])
    torch.load(path, weights_only=True)  # which notices nothing
    with pytest.raises(ValueError, match=r"x\.pth cannot be read: .* checksum of .* differs"):
        read_checkpoint(path)


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    checkpoint = read_checkpoint(tmp_path / "x.safetensors")
    assert all(torch.equal(checkpoint[key], tensor) for key, tensor in TENSORS.items())


class _Code:
    """An attacker's object: unpickling it would make the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save(
        {"state_dict": TENSORS, "args": _Code(tmp_path / "made")},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        ValueError, match=r"x\.pth needs code \(\w+\.mkdir\) to be unpickled"
    ) as raised:
        read_checkpoint(path)
    assert not (tmp_path / "made").exists()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kept", [0, 1, 3, 200, 10000, -1])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, kept: int) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match="cannot be read: broken, incomplete or no checkpoint"
    ) as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8\xff\xe0 a picture",
        b"<html>404</html>",
        b"PK\x03\x04",
        b"\x80\x02}q\x00.",
        os.urandom(5000),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pth cannot be read"):
        read_checkpoint(tmp_path / "x.pth")


def test_what_is_no_dictionary_no_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds a Tensor; expected a checkpoint"):
        read_checkpoint(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*absent\.pth"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="is a folder; expected a checkpoint file"):
        read_checkpoint(tmp_path)


def test_misfit_names_what_is_wrong() -> None:
    assert mismatch(TENSORS, TENSORS) == ""
    given = {"a.weight": torch.ones(4), "b": 1, "c": 2, "d": 3, "e": 4}
    assert (
        mismatch(TENSORS, given)
        == "missing a.bias; unexpected b, c, d, ... (4 keys); a.weight is [4], expected [2, 3000]"
    )
    assert mismatch({"a": torch.ones(1)}, {"a": 5}) == "a is a int, expected a tensor"
    assert (
        mismatch(TENSORS, {**TENSORS, "a.bias": torch.ones(2).int()})
        == "a.bias is torch.int32, expected torch.float32"
    )
    assert mismatch({"num": torch.tensor(3)}, {"num": torch.tensor(3, dtype=torch.int32)}) == ""
    assert first_keys(["a", "b", "c"]) == "a, b, c"
    assert first_keys([0, None, "a\nb", "c"]) == "0, None, 'a\\nb', ... (4 keys)"
    assert len(first_keys(["a" * 10_000])) == 100


def test_options_kept_beside_the_weights_as_dino_does_are_read_and_an_object_in_them_is_not(
    tmp_path: Path,
) -> None:
    torch.save(
        {"teacher": TENSORS, "args": argparse.Namespace(lr=0.1, arch="resnet50")},
        tmp_path / "x.pth",
    )
    checkpoint = read_checkpoint(tmp_path / "x.pth")
    assert torch.equal(checkpoint["teacher"]["a.bias"], TENSORS["a.bias"])
    torch.save({"args": argparse.Namespace(lr=_Code(tmp_path / "made"))}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match=r"y\.pth needs code"):
        read_checkpoint(tmp_path / "y.pth")
    assert not (tmp_path / "made").exists()


def test_the_hash_of_tensors_depends_on_names_values_shapes_and_types_only() -> None:
    expected = tensors_hash(TENSORS)
    assert tensors_hash(dict(reversed(TENSORS.items()))) == expected
    assert tensors_hash({**TENSORS, "a.weight": TENSORS["a.weight"].T.contiguous().T}) == expected
    for other in (
        TENSORS["a.bias"].clone().fill_(2),
        TENSORS["a.bias"].half(),
        TENSORS["a.bias"][:, None],
    ):
        assert tensors_hash({**TENSORS, "a.bias": other}) != expected
    assert tensors_hash({"b.weight": TENSORS["a.weight"], "a.bias": TENSORS["a.bias"]}) != expected
    assert tensors_hash({"x": torch.tensor(3)}) != tensors_hash({"x": torch.tensor(4)})


def test_a_header_of_a_million_tensors_is_refused_at_once(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"k{number}": entry for number in range(80_000)}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    began = time.process_time()
    for read in (read_checkpoint, read_header, exported_network):
        with pytest.raises(ValueError, match=r"x\.safetensors has a header of [\d,]+ bytes, about"):
            read(path)
    assert time.process_time() - began < 0.5
