"""Published weights: what is known of each teacher and of each student that SEED released, whether it is here and intact.

  python -m seed_exp.zoo list                          all, with licence, hash and state in the cache
  python -m seed_exp.zoo show swav_r50w2               all of one: addresses, sources, how to use it
  python -m seed_exp.zoo fetch swav_r50 moco_v2_r50    into the cache; goes on where an earlier call was interrupted
  python -m seed_exp.zoo verify --all                  hash, loads, gives finite embeddings: all that are in the cache
  python -m seed_exp.zoo verify swav_r50 --file PATH   a file that you have

With --json each prints JSON. The cache is $SEED_CACHE or ~/.cache/seed_exp. $SEED_MIRROR lists addresses of folders with such
files that are asked first: https://HOST/FOLDER, or file:///FOLDER where there is no network.
"""

from __future__ import annotations


def main() -> None:
    """Reads the command line and acts."""
    from seed_exp.tools.zoo import main as run  # late: whoever lists the commands needs none of it

    run(__doc__)


if __name__ == "__main__":
    main()
