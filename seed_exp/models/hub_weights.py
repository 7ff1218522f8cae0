"""Weights on the Hugging Face hub, in its own cache, where timm looks for them."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from seed_exp.models.weights import first_line

WEIGHTS = "model.safetensors"


def hub_path(repository: str) -> Path:
    """Path of the weights of a repository in the hub's cache, whether they are there or not."""
    found = try_to_load_from_cache(repository, WEIGHTS, cache_dir=constants.HF_HUB_CACHE)
    folder = f"models--{repository.replace('/', '--')}"
    return Path(found) if isinstance(found, str) else Path(constants.HF_HUB_CACHE, folder, WEIGHTS)


def hub_hash(path: Path) -> str | None:
    """The hash that the hub states for a file in its cache; None for any other file.

    The cache names a large file by its SHA-256, and links to it.
    """
    name = path.resolve().name
    return f"sha256:{name}" if re.fullmatch(r"[0-9a-f]{64}", name) else None


def fetch_from_hub(repository: str) -> Path:
    """The weights of a repository in the hub's cache, downloaded if absent.

    Raises:
        ValueError: they cannot be downloaded.
    """
    try:
        cache = constants.HF_HUB_CACHE
        return Path(hf_hub_download(repository, WEIGHTS, cache_dir=cache))
    except Exception as error:  # from the hub's client or from the network
        raise ValueError(
            f"cannot download {WEIGHTS} of {repository} from the Hugging Face hub "
            f"({first_line(error)}); check the connection. If the repository is gated, accept its "
            f"terms at https://huggingface.co/{repository} and log in with `hf auth login`"
        ) from error
