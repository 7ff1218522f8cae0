"""Export the students of a run for use without this package.

  python -m seed_exp.export run=runs/distill/NAME
      # all formats, in runs/distill/NAME/export
  python -m seed_exp.export run=runs/distill/NAME 'formats=[timm,onnx]' \\
      output=exported data=tsv data.root=images.tsv
  python -m seed_exp.export run=runs/distill/NAME 'networks=[resnet18]' \\
      push=ME/resnet18-seed

Writes files that timm, torchvision, ONNX Runtime and torch.export load by
themselves, and a model card. Before a file gets its name, a fresh Python that
does not know this package reads it and compares its features of the images of
`data` (those of the run, unless you choose others) with the network's own. A
network's folder is whole or absent. ONNX needs pip install 'seed_exp[export]'.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import ExportConfig
from seed_exp.python.callable_module import make_callable


def export(config: ExportConfig) -> dict[str, dict[str, float]]:
    """Writes a folder for each network; returns {student: {format: relative error}}."""
    # Late: --help and errors of options need no torch.
    from seed_exp.tools.export import export as run

    return run(config)


main = command("export", export, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
