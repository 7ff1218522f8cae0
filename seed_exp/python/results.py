"""Results of the calls: paths and numbers, and tables for pandas."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_exp.base.files import json_lines

if TYPE_CHECKING:
    from pandas import DataFrame

    from seed_exp.python.encoder import Encoder


@dataclass(frozen=True)
class TrainedRun:
    """A run of `distill` or `pretrain`. It may stand wherever a run folder is asked for."""

    folder: Path
    """The run folder."""

    def __fspath__(self) -> str:
        return str(self.folder)

    def load(self, student: str | None = None, *, device: str = "auto") -> Encoder:
        """A trained encoder, as `seed_exp.load` returns it."""
        from seed_exp.python.encoder import load

        return load(self.folder, student, device=device)

    @property
    def students(self) -> dict[str, Path]:
        """The trained networks by name: files for `load`, `knn`, `export` and other commands.

        With `ema_decay` the average of each is among them, as NAME_ema.
        """
        return {
            path.stem: path for path in sorted((self.folder / "students").glob("*.safetensors"))
        }

    @property
    def options(self) -> dict[str, Any]:
        """All options of the training, nested, as its config.json has them."""
        options: dict[str, Any] = json.loads((self.folder / "config.json").read_text())["options"]
        return options

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: step, losses, k-NN accuracy during training ..."""
        return json_lines((self.folder / "metrics.jsonl").read_text())

    def dataframe(self) -> DataFrame:
        """The metrics, a row for each step that was logged."""
        return _dataframe(self.metrics).set_index("step")


@dataclass(frozen=True)
class Evaluation:
    """Numbers that `knn`, `retrieval`, `linear`, `finetune`, `detect` or `segment` measured."""

    command: str
    """The evaluation."""
    numbers: dict[str, dict[str, float]]
    """Percent, by measure, by network; `linear` and `finetune` also list <network>/lr<rate>."""
    file: Path
    """The results file, which has the whole protocol."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that the numbers depend on."""
        protocol: dict[str, Any] = json.loads(self.file.read_text())["protocol"]
        return protocol

    def dataframe(self) -> DataFrame:
        """The numbers, a row for each network."""
        rows = [{"network": name, **values} for name, values in self.numbers.items()]
        return _dataframe(rows).set_index("network")


@dataclass(frozen=True)
class EmbeddedImages:
    """Files that `embed` wrote."""

    file: Path
    """Features with the names of their images, .parquet or .npz."""
    gallery: Path | None
    """Page of images with their neighbours, if it was asked for."""
    duplicates: Path | None
    """List of near-duplicates, if it was asked for."""

    def dataframe(self) -> DataFrame:
        """A row for each image: name `key`, `label` (NaN = unlabelled), a vector per network."""
        pandas = _pandas()
        if self.file.suffix == ".parquet":
            frame: DataFrame = pandas.read_parquet(self.file)
            return frame
        import numpy as np

        with np.load(self.file) as arrays:
            labels = pandas.Series(arrays["labels"])
            columns = {"key": arrays["keys"], "label": labels.where(labels >= 0)}
            columns |= {
                name: list(arrays[name])
                for name in arrays.files
                if name not in ("keys", "labels", "metadata")
            }
        return pandas.DataFrame(columns)


@dataclass(frozen=True)
class ExportedNetworks:
    """Folders that `export` wrote."""

    folders: dict[str, Path]
    """The folder of each network, which timm and others load."""
    errors: dict[str, dict[str, float]]
    """Relative error of the features that each format gives, by network."""

    def dataframe(self) -> DataFrame:
        """The errors, a row for each network and a column for each format."""
        rows = [{"network": name, **errors} for name, errors in self.errors.items()]
        return _dataframe(rows).set_index("network")


@dataclass(frozen=True)
class Report:
    """Files that `report` wrote."""

    page: Path
    """The page, one file that needs no network."""
    table: Path
    """The table as CSV; table.md and table.tex are beside it."""

    def dataframe(self) -> DataFrame:
        """The table."""
        with self.table.open(newline="") as file:
            return _dataframe(csv.DictReader(file))


def _dataframe(rows: Iterable[Mapping[str, Any]]) -> DataFrame:
    return _pandas().DataFrame([dict(row) for row in rows])


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError:
        raise ValueError(
            "dataframe() needs pandas, which is not installed; pip install 'seed_exp[notebook]'"
        ) from None
    return pandas
