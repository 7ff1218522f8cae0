"""Values of papers and their released code, where the files of conf/ differ; --help shows them.

docs/fidelity.md lists all differences, with their direction and measured effect.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """The value of an option in a paper or in released code."""

    source: str
    """Whose value it is."""
    value: str
    """The value, as it is written on the command line."""
    remark: str = ""
    """Words that the value needs, to be read after it."""

    def __str__(self) -> str:
        return f"({self.source}: {' '.join(filter(None, [self.value, self.remark]))})"


DEVIATIONS: dict[str, dict[str, Published]] = {
    "distill": {
        # Its five epochs go from lr to lr x batch / 256, which at a batch of 256 is no warm-up.
        "optimizer.warmup_epochs": Published("SEED's code", "0", "in effect"),
    },
    "pretrain": {"optimizer.warmup_epochs": Published("MoCo-V2", "0")},
    "knn": {"ks": Published("SEED", "[10]")},
    "linear": {"lrs": Published("MoCo", "[30]")},
    "finetune": {"lrs": Published("SwAV's code", "[0.01]", "for 10 % of the labels")},
    "detect": {"detector": Published("MoCo", "c4")},
    "objective/seed": {
        "objective.tau_teacher": Published("SEED's code", "1e-4"),
        "objective.queue_size": Published("SEED's code", "65536"),
    },
    "views/simclr": {
        "views.crops.global.scale": Published("SEED's code", "[0.2,1]"),
        "views.jitter": Published("SEED's code", "[0.4,0.4,0.4,0.4]"),
        "views.jitter_prob": Published("SEED's code", "1"),
        "views.grayscale_first": Published("SEED's code", "true"),
        "views.blur_prob": Published("SEED's code", "0"),
    },
}
"""By file of conf/, without its ending: the options that it sets to another value."""


def published(files: list[str]) -> dict[str, Published]:
    """The published values of options, for a config that is composed of these files of conf/."""
    return {option: value for file in files for option, value in DEVIATIONS.get(file, {}).items()}
