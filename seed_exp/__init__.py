"""Self-supervised distillation (SEED, ICLR 2021) as a suite: strong small vision encoders."""

import sys

__version__ = "0.2.0"

if sys.argv[:1] == ["-m"]:  # python -m seed_exp.COMMAND: Ctrl-C may come while it imports
    from seed_exp.base.stopping import show_interrupt_in_one_line

    sys.excepthook = show_interrupt_in_one_line
