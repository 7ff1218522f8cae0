"""Measure the suite's speed beside the plain way to do the same.

  python -m seed_exp.bench views data=tsv data.root=images.tsv
      # views per second and core
  python -m seed_exp.bench loss rows=1536
      # value and gradient of the objective
  python -m seed_exp.bench step student=efficientnet_b0 batch_size=16
      # a training step
  python -m seed_exp.bench fleet 'student=[resnet18,efficientnet_b0]'
      # several students in one run, or one run for each
  python -m seed_exp.bench knn bank_size=200000
      # nearest neighbours of features
  python -m seed_exp.bench linear student=resnet18
      # linear evaluation with five learning rates
  python -m seed_exp.bench scaling processes=2
      # one process, and several together
  python -m seed_exp.bench latency run=runs/distill/NAME
      # a trained network on a CPU: torch, onnxruntime, OpenVINO

Both ways are measured in turn in this one run. The rates are medians over
alternating repetitions; `x plain` is the median of their ratios. A "bound" row
is a part of the work that no way can leave out. --json prints the same for
scripts. The weights are random, and no checkpoint is needed: only latency may
be given a run.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import BenchConfig


def bench(config: BenchConfig) -> None:
    """Measures and prints."""
    # Late: --help and errors of options need no torch.
    from seed_exp.tools.bench import bench as run

    run(config)


main = command("bench", bench, __doc__, word="bench")

if __name__ == "__main__":
    main()
