"""Evaluate the students of a run by linear classifiers on their features.

  python -m seed_exp.linear run=runs/distill/NAME
      # images and view sizes: those of the run
  python -m seed_exp.linear run=runs/distill/NAME 'lrs=[30]'
      # the paper's learning rate only
  python -m seed_exp.linear run=runs/distill/NAME data=torchvision \\
      data.name=CIFAR10

The protocol is MoCo's (arXiv:1911.05722): the encoder is frozen. Classifiers
with different learning rates, of all students, are trained side by side in one
pass over the images. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import LinearConfig
from seed_exp.python.callable_module import make_callable


def linear(config: LinearConfig) -> dict[str, dict[str, float]]:
    """Trains and evaluates linear classifiers; returns {student: {measure: percent}}."""
    # Late: --help and errors of options need no torch.
    from seed_exp.protocols.linear import linear as run

    return run(config)


main = command("linear", linear, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
