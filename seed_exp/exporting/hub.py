"""To the Hugging Face hub, when asked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from pathlib import Path

from seed_exp.base.redaction import redact
from seed_exp.exporting.optional import optional

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_repository(repository: str) -> None:
    """Raises ValueError unless it reads OWNER/NAME."""
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise ValueError(
            f"push={repository} names no repository of the Hugging Face hub; expected OWNER/NAME, such as me/resnet18-seed"
        )


def push(folder: Path, repository: str, names: Collection[str]) -> str:
    """Uploads the files of `folder` with the token that `hf auth login` or HF_TOKEN gave; returns the address.

    A repository that does not exist yet becomes a private one: what is published is for its owner to decide, on its page. Files
    with one of `names` that are there and not in `folder` are deleted.

    Raises:
        ValueError: the hub refuses, or is not reached; without the token.
    """
    with optional("push"):
        from huggingface_hub import HfApi
    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        # What an earlier export left there and this one does not have would be of other weights.
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Export of seed_exp",
            delete_patterns=sorted(names),
        )
    except (
        Exception
    ) as error:  # of several libraries for HTTP, and their messages name addresses and headers
        reason = redact(str(error).strip().partition("\n")[0])
        raise ValueError(
            f"{folder} is written, but cannot be pushed to {repository}: {type(error).__name__}: {reason}; "
            f"to try it again: hf upload {repository} {shlex.quote(str(folder))}"
        ) from None
    return address
