"""Decodes every image in parallel and reports what cannot be read, sizes, classes and copies; exits with status 1 if any is bad.

python -m seed_exp.verify data=tsv data.root=imagenet             all images
python -m seed_exp.verify data=image_folder data.root=photos split=train output=report.jsonl
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import VerifyConfig


def verify(config: VerifyConfig) -> None:
    """Lists the bad images."""
    from seed_exp.tools.verify import (
        verify as run,
    )  # late: --help and errors of options need no torch

    run(config)


main = command("verify", verify, __doc__)

if __name__ == "__main__":
    main()
