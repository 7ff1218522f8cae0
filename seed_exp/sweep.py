"""Run every cell of a grid as a job that outlives the terminal.

  python -m seed_exp.sweep submit table1 seed=0,1,2
      # a file of experiments/, and options as distill's -m takes them
  python -m seed_exp.sweep submit table1 seed=0,1,2 --dry-run --plan
      # prints the script and what it will cost
  python -m seed_exp.sweep status table1 seed=0,1,2 --watch
      # without options: every sweep
  python -m seed_exp.sweep retry table1 seed=0,1,2
      # starts failed, cancelled and lost cells again, where they were
  python -m seed_exp.sweep cancel table1 seed=0,1,2 --cell 1
  python -m seed_exp.sweep collect table1 seed=0,1,2 --output table1.csv

A job is SLURM's or this machine's, and runs from a copy of the code. Submitted
sweeps are listed in runs/sweeps. A cell that is finished, queued or running is
never submitted again; sweeps that share a cell share its job. Options that a
cluster asks for: hydra.launcher.partition=gpu and so on, or the variables of
conf/hydra/launcher.
"""

from __future__ import annotations


def main() -> None:
    """Reads the command line and acts."""
    # Late: whoever lists the commands needs none of it.
    from seed_exp.tools.sweep import main as run

    run(__doc__)


if __name__ == "__main__":
    main()
