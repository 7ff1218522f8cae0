"""See SEED work, in minutes on a CPU and without downloads.

  python -m seed_exp.quickstart
  python -m seed_exp.quickstart 'seeds=[0,1,2]'
      # means over seeds, and the spread of the gain

The images are scikit-learn's handwritten digits. Trains a teacher, then the
same tiny student twice, for the same steps on the same views: without a teacher
(MoCo-V2) and with it (SEED). Evaluates all three on digits that none of them
has seen. Each step is a command that you can type yourself; it is printed
before it runs.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import QuickstartConfig


def quickstart(config: QuickstartConfig) -> None:
    """Trains and compares a teacher and two students on digits."""
    # Late: --help and errors of options need no torch.
    from seed_exp.tools.quickstart import quickstart as run

    run(config)


main = command("quickstart", quickstart, __doc__)

if __name__ == "__main__":
    main()
