"""Upload of an exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from pathlib import Path

from seed_exp.base.optional import optional
from seed_exp.base.redaction import redact

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_repository(repository: str) -> None:
    """Raises ValueError unless `repository` has the form OWNER/NAME."""
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise ValueError(
            f"push={repository} names no repository of the Hugging Face hub; expected OWNER/NAME, "
            "such as me/resnet18-seed"
        )


def push(folder: Path, repository: str, names: Collection[str]) -> str:
    """Uploads the files of `folder`, with the token that `hf auth login` or HF_TOKEN gave.

    A new repository is private; its owner can publish it on its page.

    Args:
        folder: Folder that was exported.
        repository: OWNER/NAME.
        names: Names of the files that an export may write. Those that the repository has and
            `folder` does not are deleted.

    Returns:
        Address of the repository.

    Raises:
        ValueError: the hub refuses or cannot be reached. The message does not contain the token.
    """
    with optional("push"):
        from huggingface_hub import HfApi
    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        # Files of an earlier export that this one does not replace would hold other weights.
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Export of seed_exp",
            delete_patterns=sorted(names),
        )
    # Several HTTP libraries raise here, and their messages name addresses and headers.
    except Exception as error:
        reason = redact(str(error).strip().partition("\n")[0])
        raise ValueError(
            f"{folder} is written, but cannot be pushed to {repository}: {type(error).__name__}: "
            f"{reason}; to try it again: hf upload {repository} {shlex.quote(str(folder))}"
        ) from None
    return address
