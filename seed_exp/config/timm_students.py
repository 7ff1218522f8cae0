"""Students of timm by the name of their network: `student=timm/NAME`, several of them as a list."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from seed_exp.config.plugins import plugin_folders
from seed_exp.config.schema import StudentConfig

if TYPE_CHECKING:
    from hydra.core.object_type import ObjectType

GROUP = "student/timm"
"""Config group with an option for every network of timm."""


def option_folders(conf: Path) -> list[Path]:
    """The folders with options of the config group `student`: ours in `conf`, and plug-ins'."""
    return [home / "student" for home in (conf, *plugin_folders(conf.parent).values())]


def student_name(network: str, folders: Sequence[Path]) -> str:
    """The name of a student with this network of timm, fit for files and for students.NAME.

    Args:
        network: Name in timm, or a place where timm finds the network: hf-hub:ORG/MODEL.
        folders: Those of `option_folders`. An option of the same name may be another network, as
            efficientnet_b0 is, or the same one, as convnext_atto is.
    """
    name = re.sub(r"\W+", "_", network)
    files = [folder / f"{name}.yaml" for folder in folders]
    is_another = any(
        OmegaConf.select(OmegaConf.load(file), "name") != network for file in files if file.exists()
    )
    return f"timm_{name}" if is_another else name


def named_by_network(
    students: Mapping[str, StudentConfig], folders: Sequence[Path]
) -> dict[str, StudentConfig]:
    """The students, with the one called `timm` under the name of its network.

    Args:
        students: By name.
        folders: Those of `option_folders`.

    Raises:
        ValueError: two students would have the same name.
    """
    named: dict[str, StudentConfig] = {}
    for key, student in students.items():
        is_unnamed = key == "timm" and student.network == "timm" and student.name is not None
        name = student_name(student.name or "", folders) if is_unnamed else key
        if name in named or (is_unnamed and name in students):
            raise ValueError(
                f"two students are called {name}: students.{name} and students.timm with "
                f"students.timm.name={student.name}; leave one of them out"
            )
        named[name] = student
    return named


class TimmStudents(ConfigSource):
    """Config files that nobody wrote: `student/timm/NAME` for every NAME.

    Whether timm has the network is checked when the student is built: that import takes seconds.
    """

    @staticmethod
    def scheme() -> str:
        """The beginning of the source's address, timm://CONF; CONF is the folder conf/."""
        return "timm"

    def load_config(self, config_path: str) -> ConfigResult:
        """Content of the file."""
        network = config_path.removeprefix(f"{GROUP}/")
        name = student_name(network, option_folders(Path(self.path)))
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create({"network": "timm", "name": network}),
            header={"package": f"students.{name}"},
        )

    def available(self) -> bool:
        """Whether the source can be used."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether the path is the group."""
        return config_path.strip("/") == GROUP

    def is_config(self, config_path: str) -> bool:
        """Whether the path is that of a file in the group."""
        return config_path.startswith(f"{GROUP}/") and config_path.rstrip("/") != GROUP

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:  # noqa: ARG002
        """No names: timm has a thousand."""
        return []
