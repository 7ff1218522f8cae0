"""Evaluate the students of a run by k-NN, without training.

  python -m seed_exp.knn run=runs/distill/NAME
      # images and views: those of the run
  python -m seed_exp.knn run=runs/distill/NAME data=torchvision \\
      data.name=CIFAR10
  python -m seed_exp.knn run=student.safetensors data=tsv data.root=images.tsv \\
      data.val_fraction=0.2

Each validation image is classified by its k nearest training images.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import KnnConfig
from seed_exp.python.callable_module import make_callable


def knn(config: KnnConfig) -> dict[str, dict[str, float]]:
    """Evaluates a run's students by k-NN; returns {student: {measure: percent}}."""
    # Late: --help and errors of options need no torch.
    from seed_exp.protocols.knn import knn as run

    return run(config)


main = command("knn", knn, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
