"""Number formats on CPUs with bfloat16 units: what a run has begun with, it keeps on any CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from ranks import Ranks
from torch import nn

from seed_exp import distill, pretrain
from seed_exp.config.compose import compose
from seed_exp.engine.fleet import Fleet
from seed_exp.models import cpu_precision
from seed_exp.models.students import load_students

COMMON = ["data=digits", "data.num_workers=0", "device=cpu", "views=digits", "tracker=files"]
COMMON += ["steps=4", "batch_size=32", "log_every=1", "checkpoint_every=2", "eval_every=0"]
COMMON += ["knn_bank_size=50", "knn_query_size=50", "optimizer.warmup_epochs=0"]
MOCO = ["views.crops.global.num=2", "moco.queue_size=64"]
PRETRAIN = [*COMMON, *MOCO, "student=convnet_w2"]
FLEET = ["student=[convnet_w2,timm/test_efficientnet]"]
DISTILL = [*COMMON, *FLEET, "teacher=run", "teacher.checkpoint=teacher", "objective.queue_size=64"]
HALF = {"teacher": "bfloat16", "students.convnet_w2": "bfloat16"}
BFLOAT, FLOAT = torch.bfloat16, torch.float32


def on_a_cpu(patch: pytest.MonkeyPatch, *, units: bool) -> None:
    """This machine has bfloat16 units or none, and no views are too small for them."""
    patch.setattr(cpu_precision, "has_bfloat16_units", lambda: units)
    patch.setattr(cpu_precision, "SMALLEST_VIEW", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a fleet that began on a CPU with units."""
    home = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        on_a_cpu(patch, units=False)
        pretrain.pretrain(compose("pretrain", [*PRETRAIN, "run_dir=teacher"]))
        on_a_cpu(patch, units=True)
        distill.distill(compose("distill", [*DISTILL, "run_dir=with"]))
    return home


@pytest.fixture(autouse=True)
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    shutil.copytree(trained, home)
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """Formats of what the first layer of each network of the fleet gives in a step, by name."""
    found: dict[str, set[torch.dtype]] = {}
    step = Fleet.step

    def watched(fleet: Fleet, *args: object, **named: object) -> object:
        networks: dict[str, nn.Module] = dict(fleet.method.trainable)
        if hasattr(fleet.method, "teacher"):
            networks["teacher"] = fleet.method.teacher
        if (contrast := getattr(fleet.method, "contrast", None)) is not None:
            networks |= {f"keys of {name}": one for name, one in contrast.encoders.items()}
        hooks = []
        for name, network in networks.items():
            first = next(one for one in network.modules() if isinstance(one, nn.Conv2d))
            formats = found.setdefault(name, set())
            hooks.append(
                first.register_forward_hook(lambda _, __, out, to=formats: to.add(out.dtype))
            )
        try:
            return step(fleet, *args, **named)  # type: ignore[arg-type]
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(Fleet, "step", watched)
    return found


def recorded(folder: str) -> dict[str, str]:
    content = json.loads((Path(folder) / "config.json").read_text())
    found: dict[str, str] = content.get("cpu_precision", {})
    return found


def interrupt(folder: str) -> None:
    """Makes the run one that was killed before its first checkpoint."""
    for part in ("checkpoints", "students"):
        shutil.rmtree(Path(folder) / part)
    (Path(folder) / "done.json").unlink()
    (Path(folder) / "metrics.jsonl").unlink()


def metrics(folder: str) -> list[str]:
    return (Path(folder) / "metrics.jsonl").read_text().splitlines()


def assert_same_students(one: str, other: str) -> None:
    for (ours, _), (theirs, _) in zip(
        load_students(Path(one)).values(), load_students(Path(other)).values(), strict=True
    ):
        tiny.assert_same(ours.state_dict(), theirs.state_dict())


def test_a_run_keeps_its_formats_on_a_cpu_without_units(
    monkeypatch: pytest.MonkeyPatch, seen: dict[str, set[torch.dtype]], logged: list[str]
) -> None:
    assert recorded("with") == HALF
    shutil.copytree("with", "again")
    interrupt("again")
    on_a_cpu(monkeypatch, units=False)
    distill.distill(compose("distill", [*DISTILL, "run_dir=again"]))
    assert seen == {"teacher": {BFLOAT}, "convnet_w2": {BFLOAT}, "test_efficientnet": {FLOAT}}
    assert metrics("again") == metrics("with")
    assert_same_students("again", "with")
    log = Path("again/log.txt").read_text()
    assert "precision: teacher computes in bfloat16 (as in this run so far)" in log
    assert "this CPU only emulates" in log


def test_a_run_without_a_record_stays_in_float32_on_a_cpu_with_units(
    monkeypatch: pytest.MonkeyPatch, seen: dict[str, set[torch.dtype]]
) -> None:
    on_a_cpu(monkeypatch, units=False)
    distill.distill(compose("distill", [*DISTILL, "run_dir=without"]))
    assert recorded("without") == {}
    assert "cpu_precision" not in Path("without/config.json").read_text()
    shutil.copytree("without", "again")
    interrupt("again")
    on_a_cpu(monkeypatch, units=True)
    distill.distill(compose("distill", [*DISTILL, "run_dir=again"]))
    assert set().union(*seen.values()) == {FLOAT}
    assert metrics("again") == metrics("without")
    assert metrics("again") != metrics("with")
    assert "test_efficientnet computes in float32" in Path("with/log.txt").read_text()


def test_float32_and_bfloat16_are_for_every_network(
    monkeypatch: pytest.MonkeyPatch, seen: dict[str, set[torch.dtype]]
) -> None:
    on_a_cpu(monkeypatch, units=True)
    for precision, expected in (("float32", FLOAT), ("bfloat16", BFLOAT)):
        seen.clear()
        distill.distill(
            compose("distill", [*DISTILL, f"precision={precision}", f"run_dir={precision}"])
        )
        assert set().union(*seen.values()) == {expected}
        assert recorded(precision) == {}


def test_momentum_encoders_have_formats_of_their_own(
    monkeypatch: pytest.MonkeyPatch, seen: dict[str, set[torch.dtype]]
) -> None:
    on_a_cpu(monkeypatch, units=True)
    pretrain.pretrain(compose("pretrain", [*COMMON, *MOCO, *FLEET, "run_dir=moco"]))
    assert seen == {
        "convnet_w2": {BFLOAT},
        "keys of convnet_w2": {BFLOAT},
        "test_efficientnet": {FLOAT},
        "keys of test_efficientnet": {BFLOAT},
    }


def test_a_cache_holds_embeddings_of_one_format(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = [*DISTILL, "teacher_cache=cache"]
    for units in (False, True):
        on_a_cpu(monkeypatch, units=units)
        distill.distill(compose("distill", [*cached, f"run_dir=units_{units}"]))
    keys = [json.loads(file.read_text()) for file in Path("cache").glob("*/key.json")]
    assert sorted(key["precision"] for key in keys) == ["bfloat16", "float32"]


def begin(folder: str, units: list[bool]) -> dict[str, str]:
    """The formats that this rank trains in, where the ranks' CPUs differ in their units."""
    from seed_exp.engine import distributed

    with pytest.MonkeyPatch.context() as patch:
        on_a_cpu(patch, units=units[distributed.rank()])
        options = [*PRETRAIN, f"run_dir={folder}"]
        found: dict[str, str] = {}
        compute_in = Fleet.__init__

        def watched(fleet: Fleet, method: object, *args: object, **named: object) -> None:
            compute_in(fleet, method, *args, **named)  # type: ignore[arg-type]
            found.update({name: one.value for name, one in fleet.method.formats.items()})

        patch.setattr(Fleet, "__init__", watched)
        pretrain.pretrain(compose("pretrain", options))
    return found


@pytest.mark.parametrize("units", [[True, False], [False, True]])
def test_all_ranks_compute_as_the_first_one_decides(
    units: list[bool], two_ranks: Ranks, tmp_path: Path
) -> None:
    expected = {"convnet_w2": "bfloat16"} if units[0] else {}
    assert two_ranks.run(begin, str(tmp_path / "run"), units) == [expected, expected]
