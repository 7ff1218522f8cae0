"""Segment images by linear classifiers on the feature maps of a run's students.

  python -m seed_exp.segment run=runs/distill/NAME data=ade20k \\
      data.root=ADEChallengeData2016
  python -m seed_exp.segment run=runs/distill/NAME data=voc_masks \\
      data.root=VOCdevkit
  python -m seed_exp.segment run=runs/distill/NAME data=mask_folder \\
      data.root=mine data.val_fraction=0.2 crop_size=224 epochs=20 steps=null

The protocol is DINOv2's linear one (arXiv:2304.07193): the encoder is frozen;
batch norm and a 1 x 1 convolution on its last map say the class of each pixel.
All students of the run learn the same crops side by side. Interrupted, the same
command goes on where it was. All masks are read once before training starts.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import SegmentConfig
from seed_exp.python.callable_module import make_callable


def segment(config: SegmentConfig) -> dict[str, dict[str, float]]:
    """Trains and evaluates pixel classifiers; returns {student: {measure: percent}}."""
    # Late: --help and errors of options need no torch.
    from seed_exp.protocols.segment import segment as run

    return run(config)


main = command("segment", segment, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
