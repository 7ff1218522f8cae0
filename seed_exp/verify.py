"""Decode every image in parallel and list those that cannot be read.

  python -m seed_exp.verify data=tsv data.root=imagenet
      # all images
  python -m seed_exp.verify data=image_folder data.root=photos split=train \\
      output=report.jsonl

Also reports sizes, classes, copies, the fingerprint by which runs know the
images, and a hash of all content. Exits with status 1 if any image is bad.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import VerifyConfig


def verify(config: VerifyConfig) -> None:
    """Lists the bad images."""
    # Late: --help and errors of options need no torch.
    from seed_exp.tools.verify import verify as run

    run(config)


main = command("verify", verify, __doc__)

if __name__ == "__main__":
    main()
