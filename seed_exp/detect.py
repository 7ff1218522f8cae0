"""Detect objects with the students of a run as encoders.

  python -m seed_exp.detect run=runs/distill/NAME data.root=VOCdevkit
      # VOC07+12: train on trainval, test on 2007
  python -m seed_exp.detect run=runs/distill/NAME data.root=VOCdevkit \\
      detector=c4
      # ResNets only
  python -m seed_exp.detect run=runs/distill/NAME data=coco data.root=coco \\
      masks=true
      # COCO 2017, boxes and masks

The protocol is MoCo's (arXiv:1911.05722), with torchvision's detectors.
Encoder and detector are trained together. All students of the run learn the
same images side by side. Interrupted, the same command goes on where it was.
Needs pycocotools: pip install 'seed_exp[detect]'.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import DetectConfig
from seed_exp.python.callable_module import make_callable


def detect(config: DetectConfig) -> dict[str, dict[str, float]]:
    """Trains and evaluates detectors; returns {student: {measure: percent}}."""
    # Late: --help and errors of options need no torch.
    from seed_exp.protocols.detect import detect as run

    return run(config)


main = command("detect", detect, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
