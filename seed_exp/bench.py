"""How fast the suite is beside the plain way to do the same, both measured in turn in this one run.

  python -m seed_exp.bench views data=tsv data.root=images.tsv views=swav_multicrop   views per second and core
  python -m seed_exp.bench loss rows=1536                                              value and gradient of the objective
  python -m seed_exp.bench step student=efficientnet_b0 batch_size=16                  a training step
  python -m seed_exp.bench fleet 'student=[resnet18,efficientnet_b0]'                  several students in one run or one each
  python -m seed_exp.bench knn bank_size=200000                                        nearest neighbours of features
  python -m seed_exp.bench linear student=resnet18                                     linear evaluation with five learning rates
  python -m seed_exp.bench scaling processes=2                                         one process and several together

The rates are medians over alternating repetitions, `x plain` the median of their ratios; "bound" rows are parts of the work that
no way can do without. --json prints the same for scripts. Weights are random, no checkpoint is needed.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import BenchConfig


def bench(config: BenchConfig) -> None:
    """Measures and prints."""
    from seed_exp.tools.bench import (
        bench as run,
    )  # late: --help and errors of options need no torch

    run(config)


main = command("bench", bench, __doc__, word="bench")

if __name__ == "__main__":
    main()
