"""Tensors made before training: kept with the run, and in the cache for runs like it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from seed_exp.base.archives import lacks_memory
from seed_exp.base.files import atomic_write, cache_folder
from seed_exp.models.weights import mismatch, refuse_long_header

log = logging.getLogger("seed_exp")

State = dict[str, Tensor]


def kept_state(path: Path, make: Callable[[], State], read: Callable[[Path], State]) -> State:
    """The state in the run folder: a run that goes on needs the same bits. A new run makes it.

    Args:
        path: The file, directly in the run folder.
        make: Makes the state.
        read: Reads and checks it; raises ValueError if it is damaged.

    Raises:
        ValueError: the run has begun, but its state is gone or damaged; or as `make`.
    """
    if not path.exists():
        if (path.parent / "checkpoints").exists():
            raise ValueError(
                f"{path} is gone, which {path.parent} was trained with; put it back, or choose "
                "another run_dir"
            )
        state = make()
        with atomic_write(path) as file:
            file.write(save(state))
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{error}; put back a good copy, or choose another run_dir") from None


def cached_state(
    kind: str,
    key: Mapping[str, Any],
    make: Callable[[], State],
    read: Callable[[Path], State],
) -> State:
    """The state from the cache, where all runs with this key find it; made if absent or damaged.

    Args:
        kind: Folder in the cache.
        key: Everything that the state depends on.
        make: As in `kept_state`; errors as its own.
        read: As in `kept_state`.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return shared_state(cache_folder() / kind / f"{digest[:16]}.safetensors", make, read)


def shared_state(
    path: Path,
    make: Callable[[], State],
    read: Callable[[Path], State],
    may_keep: Callable[[State], bool] = lambda _: True,
) -> State:
    """The state in a file that several runs use; made if absent or damaged.

    Args:
        path: The file; its name or folder says everything that the state depends on.
        make: As in `kept_state`; errors as its own.
        read: As in `kept_state`.
        may_keep: Whether a state that was made is what every other run would make.
    """
    with suppress(FileNotFoundError):
        try:
            return read(path)
        except ValueError as error:
            log.warning("%s; it is made anew", error)
    state = make()
    if not may_keep(state):
        return state
    try:
        with atomic_write(path) as file:
            file.write(save(state))
    except OSError as error:
        log.warning("%s is not kept for other runs (%s)", path, error)
    return state


def is_finite(state: State) -> bool:
    """Whether no tensor has a number that is not finite."""
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


def read_state(path: Path, expected: Mapping[str, Tensor]) -> State:
    """The tensors of a file in which others may have written.

    Args:
        path: The file.
        expected: Tensors with the names and shapes of those in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no file, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")  # a pipe would be waited for
        refuse_long_header(path)
        state = load_file(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        if lacks_memory(error):
            raise
        raise ValueError(f"{path} is damaged ({error})") from None
    problem = mismatch(expected, state)
    if not problem and not is_finite(state):
        problem = "it has numbers that are not finite"
    if problem:
        raise ValueError(f"{path} is damaged ({problem})")
    return state
