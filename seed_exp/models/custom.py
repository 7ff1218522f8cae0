"""Networks from code of the user's: factories on the import path, named as module:function.

An option may name one, because whoever types a command answers for it. A student file may name one
too, and may come from anyone: its factory is imported only if the user has named the same place.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seed_exp.base.places import function_at
from seed_exp.models.trial import features_of_empty_image
from seed_exp.models.weights import first_line

VARIABLE = "SEED_CUSTOM"
"""Environment variable with places that student files may name, separated by commas."""
_GIVEN: set[str] = set()
"""Places that options of this process named: what it trained, it evaluates."""
_SIZE = 224


def custom_encoder(place: str, args: Mapping[str, Any], option: str) -> nn.Module:
    """The network that a factory returns, with the attribute `num_features`, on the CPU.

    A network without that attribute is tried with an empty image of 224 px.

    Args:
        place: The factory, module:function.
        args: Its arguments.
        option: Option that names the place, for errors.

    Raises:
        ValueError: there is no such module or function, it raises, or it returns no network.
    """
    _GIVEN.add(place)
    given = f"{option}={place}"
    factory = function_at(place, given)
    try:
        with torch.device("cpu"):  # a caller may only want shapes; code of others needs values
            encoder = factory(**args)
    except Exception as error:  # whatever the code of others raises
        raise ValueError(
            f"{given} raises {type(error).__name__}: {first_line(error)} (called with {dict(args)})"
        ) from error
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"{given} returns a {type(encoder).__name__}; expected a torch.nn.Module")
    width: Any = getattr(encoder, "num_features", None)
    if width is None:
        with torch.device("cpu"):
            width = features_of_empty_image(encoder, _SIZE, given, None).shape[1]
        encoder.num_features = width
    if type(width) is not int or width < 1:
        raise ValueError(
            f"{given} returns a network with num_features={width}; expected the width of its output"
        )
    return encoder


def source_hash(place: str, encoder: nn.Module) -> str:
    """SHA-256, hexadecimal, of the code of a custom network.

    The code is the file of the factory's module, and those of the layers' classes in the same
    package. Libraries outside of that package are not part of it.

    Raises:
        ValueError: a module has no source file.
    """
    module = place.partition(":")[0]
    package = module.partition(".")[0]
    names = {module, *(type(layer).__module__ for layer in encoder.modules())}
    digest = hashlib.sha256()
    for name in sorted(name for name in names if name.partition(".")[0] == package):
        try:
            source = Path(inspect.getsourcefile(sys.modules[name]) or "").read_bytes()
        except (OSError, TypeError):
            raise ValueError(
                f"{place} is of a module without a source file ({name}), so a run cannot tell "
                "whether it changes; put the factory into a file on the import path"
            ) from None
        digest.update(f"{name} {len(source)} ".encode() + source)
    return digest.hexdigest()


def refuse_untrusted(place: str, file: Path) -> None:
    """Refuses a place that a file names and the user does not.

    Raises:
        ValueError: no option of this process named it, and SEED_CUSTOM does not.
    """
    listed = {each.strip() for each in os.environ.get(VARIABLE, "").split(",")}
    if place not in _GIVEN | listed:
        raise ValueError(
            f"{file} holds a network of {place}, code that is no part of this package. Files do "
            "not choose what is imported and run: where you trust that code, and have it on the "
            f"import path, set {VARIABLE}={place}"
        )
