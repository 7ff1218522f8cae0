"""The students of a run as files that timm, torchvision, ONNX Runtime and torch.export load by themselves, with a model card.

python -m seed_exp.export run=runs/distill/NAME                                  all formats, in runs/distill/NAME/export
python -m seed_exp.export run=runs/distill/NAME 'formats=[timm,onnx]' output=exported data=tsv data.root=images.tsv
python -m seed_exp.export run=runs/distill/NAME 'networks=[resnet18]' push=ME/resnet18-seed

Every file is read back by a fresh Python that knows nothing of this package, and must give the network's own features on the
images of `data`, before it gets its name: a folder with a network is whole or absent. ONNX needs pip install 'seed_exp[export]'.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import ExportConfig


def export(config: ExportConfig) -> dict[str, dict[str, float]]:
    """Writes a folder for each network; returns {student: {format: relative error}}."""
    from seed_exp.tools.export import (
        export as run,
    )  # late: --help and errors of options need no torch

    return run(config)


main = command("export", export, __doc__)

if __name__ == "__main__":
    main()
