"""Reads weights from files that may be anything, and says what does not fit."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from seed_exp.base.archives import check_sums, is_zip, lacks_memory

# Bytes of a safetensors header. A tensor takes about 90, and a network of a billion weights has
# some hundreds of tensors.
_MAX_HEADER = 1 << 22
_SAFETENSORS_MAX_HEADER = 100_000_000  # bytes; the safetensors library itself refuses longer ones


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary in a `.safetensors` or `torch.save` file, on the CPU.

    Never executes code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `path` is a folder, or the file is broken, holds no dictionary, or needs code to
            be unpickled; or memory is short, which the message tells apart.
    """
    if path.is_dir():
        run = ""
        if (path / "config.json").exists():
            run = f"; for a run of this package give teacher=run teacher.checkpoint={path}"
        raise ValueError(
            f"{path} is a folder; expected a checkpoint file (.pth, .pth.tar, .safetensors){run}"
        )
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            refuse_long_header(path)
            return dict(load_file(path))
        if zipped := is_zip(path):
            check_sums(path)
        # DINO and others keep the options of their command line beside the weights: harmless
        # values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Older files, such as MoCo's, are no zip archives and cannot be memory-mapped.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except LongHeaderError:
        raise
    except Exception as error:  # broken bytes make the readers raise errors of nearly every kind
        raise ValueError(_why_unreadable(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}; "
            "expected a checkpoint, i.e. a dictionary of tensors"
        )
    return checkpoint


class LongHeaderError(ValueError):
    """A safetensors file names more tensors than any network has."""


def refuse_long_header(path: Path) -> None:
    """Refuses a safetensors file whose header alone would take minutes and gigabytes to read.

    Other files pass, whatever their first bytes are.

    Raises:
        LongHeaderError: the header is too long.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if _MAX_HEADER < size <= _SAFETENSORS_MAX_HEADER:
        raise LongHeaderError(
            f"{path} has a header of {size:,} bytes, about {size // 90:,} tensors; at most "
            f"{_MAX_HEADER:,} bytes are read, and no encoder known here needs a tenth of them: "
            "save only the tensors of the encoder"
        )


def mismatch(expected: Mapping[str, Tensor], given: Mapping[str, Any]) -> str:
    """Why `given` cannot be loaded in place of `expected`, with the first keys; empty if it can."""
    problems = []
    if missing := [key for key in expected if key not in given]:
        problems.append(f"missing {first_keys(missing)}")
    if unexpected := [key for key in given if key not in expected]:
        problems.append(f"unexpected {first_keys(unexpected)}")
    for key in [key for key in expected if key in given]:
        if not isinstance(given[key], Tensor):
            problems.append(f"{key} is a {type(given[key]).__name__}, expected a tensor")
            break
        if expected[key].is_floating_point() and not given[key].is_floating_point():
            problems.append(f"{key} is {given[key].dtype}, expected {expected[key].dtype}")
            break
        if given[key].shape != expected[key].shape:
            problems.append(
                f"{key} is {list(given[key].shape)}, expected {list(expected[key].shape)}"
            )
            break
    return "; ".join(problems)


def with_counters(expected: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with a 0 added for each missing batch counter of batch norm.

    Files from before torch 0.4.1 and from other frameworks have no counters; evaluation reads none.
    """
    absent = [key for key in expected if key.endswith("num_batches_tracked") and key not in given]
    return {**given, **{key: torch.zeros((), dtype=torch.int64) for key in absent}}


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, of tensors on the CPU with their names, shapes and types."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {list(tensors[key].shape)} {tensors[key].dtype}".encode())
        digest.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_keys(keys: Collection[Any], num: int = 3) -> str:
    """The first `num` of `keys`, which may be of any type, and their number if there are more."""
    names = [str(key)[:100] for key in list(keys)[:num]]
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names)
    return f"{shown}, ... ({len(keys)} keys)" if len(keys) > num else shown


def first_line(error: Exception) -> str:
    """The first line of the error's message; the name of its type if the message is empty."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


def _why_unreadable(path: Path, error: Exception) -> str:
    if lacks_memory(error):
        return (
            f"there is too little memory to read {path}, which may be whole ({first_line(error)}); "
            "free or ask for more memory"
        )
    if code := re.search(r"(?:GLOBAL|class|function) (\S+?\.\w+)", str(error)):
        return (
            f"{path} needs code ({code[1]}) to be unpickled, "
            "which is refused because such a file can run anything; "
            "where you trust it, load it once and torch.save only its dictionary of tensors"
        )
    # Leaves out torch's advice to load the file all the same.
    reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". In PyTorch")[0]
    return (
        f"{path} cannot be read: broken, incomplete or no checkpoint ({reason}); "
        "copy or download it again"
    )
