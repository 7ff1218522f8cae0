"""Published weights: list, download and check them.

  python -m seed_exp.zoo list
      # all, with licence, hash and state in the cache
  python -m seed_exp.zoo list licence=permissive
      # those with a licence that allows nearly everything (MIT, Apache-2.0)
  python -m seed_exp.zoo show swav_r50w2
      # all of one: addresses, sources, how to use it
  python -m seed_exp.zoo fetch swav_r50 moco_v2_r50
      # into the cache; goes on where an earlier call was interrupted
  python -m seed_exp.zoo verify --all
      # all in the cache: hash, loading, finite embeddings
  python -m seed_exp.zoo verify swav_r50 --file PATH
      # a file that you have

The entries are the teachers, and the students that SEED released. With --json
each action prints JSON. The cache is $SEED_CACHE or ~/.cache/seed_exp; weights
of timm are in the Hugging Face hub's.
$SEED_MIRROR lists addresses of folders with such files, which are asked first:
https://HOST/FOLDER, or file:///FOLDER where there is no network.
"""

from __future__ import annotations


def main() -> None:
    """Reads the command line and acts."""
    # Late: whoever lists the commands needs none of it.
    from seed_exp.tools.zoo import main as run

    run(__doc__)


if __name__ == "__main__":
    main()
