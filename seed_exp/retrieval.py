"""Evaluate the students of a run by retrieval, without training.

  python -m seed_exp.retrieval run=runs/distill/NAME
      # images and views: those of the run
  python -m seed_exp.retrieval run=runs/distill/NAME gallery=val 'ks=[1,10,100]'
  python -m seed_exp.retrieval run=student.safetensors data=image_folder \\
      data.root=products data.val_fraction=0.2

Each validation image is a query. The gallery, the training images or
(gallery=val) all other validation images, is sorted by similarity. mAP says how
high the images of the query's class stand, recall@k how many queries find one
among the k nearest.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import RetrievalConfig
from seed_exp.python.callable_module import make_callable


def retrieval(config: RetrievalConfig) -> dict[str, dict[str, float]]:
    """Evaluates a run's students by retrieval; returns {student: {measure: percent}}."""
    # Late: --help and errors of options need no torch.
    from seed_exp.protocols.retrieval import retrieval as run

    return run(config)


main = command("retrieval", retrieval, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
