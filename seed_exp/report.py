"""Show runs as tables, curves and one page, beside published numbers.

  python -m seed_exp.report
      # all runs below runs/
  python -m seed_exp.report 'runs=[runs,/mnt/cluster/runs]' output=report
  python -m seed_exp.report table1,table1_baseline seed=0,1,2
      # a table of experiments/, and what is missing of it
  python -m seed_exp.report small_table1,small_table1_baseline scale=small
      # options as distill's -m takes them

Runs may be half-finished. Writes index.html (one file that needs no network),
table.md, table.tex and table.csv into the folder `output`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from seed_exp.config.command import command
from seed_exp.config.report_line import as_overrides
from seed_exp.config.schema import ReportConfig
from seed_exp.python.callable_module import make_callable


def report(config: ReportConfig) -> Path:
    """Writes the page and the tables; returns the path of the page."""
    # Late: --help and errors of options need no torch.
    from seed_exp.tools.report import report as run

    return run(config)


_main = command("report", report, __doc__)


def main() -> None:
    """Reads the command line."""
    sys.argv[1:] = as_overrides(sys.argv[1:])
    _main()


make_callable(__name__)

if __name__ == "__main__":
    main()
