"""Fine-tune the students of a run on few labels or other images.

  python -m seed_exp.finetune run=runs/distill/NAME data.fraction=0.1
      # semi-supervised: 10 % of the labels of the run's images
  python -m seed_exp.finetune run=runs/distill/NAME data.subset=1percent.txt
      # semi-supervised: the images that a list names
  python -m seed_exp.finetune run=runs/distill/NAME data=torchvision \\
      data.name=CIFAR10
      # transfer

The whole student is trained, with a new classifier in place of its projection
head. Each learning rate trains a copy of the student; all copies learn side by
side in one pass over the images. Interrupted, the same command goes on where it
was.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import FinetuneConfig
from seed_exp.python.callable_module import make_callable


def finetune(config: FinetuneConfig) -> dict[str, dict[str, float]]:
    """Fine-tunes and evaluates a run's students; returns {student: {measure: percent}}."""
    # Late: --help and errors of options need no torch.
    from seed_exp.protocols.finetune import finetune as run

    return run(config)


main = command("finetune", finetune, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
