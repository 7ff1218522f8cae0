"""To the Hugging Face hub, when asked."""

from __future__ import annotations

import re
from pathlib import Path

from seed_exp.exporting.optional import optional
from seed_exp.redaction import redact

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_repository(repository: str) -> None:
    """Raises ValueError unless it reads OWNER/NAME."""
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise ValueError(
            f"push={repository} names no repository of the Hugging Face hub; expected OWNER/NAME, such as me/resnet18-seed"
        )


def push(folder: Path, repository: str) -> str:
    """Uploads the files of `folder` with the token that `hf auth login` or HF_TOKEN gave; returns the address.

    A repository that does not exist yet becomes a private one: what is published is for its owner to decide, on its page.

    Raises:
        ValueError: the hub refuses, or is not reached; without the token.
    """
    with optional("push"):
        from huggingface_hub import HfApi
    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of seed_exp")
    except Exception as error:  # of several libraries for HTTP, and their messages name addresses and headers
        reason = redact(str(error).strip().partition("\n")[0])
        raise ValueError(f"{folder} is written, but cannot be pushed to {repository}: {type(error).__name__}: {reason}") from None
    return address
