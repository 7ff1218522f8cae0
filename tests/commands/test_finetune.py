"""`finetune` on the embedded digits; other evaluations on part of the labels, on other images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter

from seed_exp import __version__, finetune, knn, linear, pretrain
from seed_exp.base.files import file_hash
from seed_exp.config.compose import compose
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.data.digits import DigitsSource
from seed_exp.data.sources import load_source
from seed_exp.engine import distributed
from seed_exp.protocols import finetune as finetune_protocol
from seed_exp.protocols import linear as linear_protocol
from seed_exp.protocols.supervised import Measures, with_shared_batch_norm

DATA = ["data=digits", "data.num_workers=0", "device=cpu"]
TRAIN = [
    "views=digits",
    "tracker=files",
    "steps=2",
    "batch_size=16",
    "moco.queue_size=32",
    "run_dir=run",
]
FINETUNE = [
    *DATA,
    "run=run",
    "views=linear_digits",
    "data.fraction=0.05",
    "batch_size=8",
    "epochs=1",
    "lrs=[0.1,0.3]",
]

PROTOCOLS: dict[str, Any] = {"linear": linear_protocol, "finetune": finetune_protocol}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        pretrain.pretrain(compose("pretrain", [*DATA, *TRAIN, "student=[convnet_w2,convnet_w32]"]))
    return home


@pytest.fixture(autouse=True)
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> Path:
    home = tmp_path / "home"
    shutil.copytree(trained, home)
    monkeypatch.chdir(home)
    return home


def results_of(folder: Path, command: str) -> dict[str, Any]:
    (path,) = (folder / "results").glob(f"{command}-*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_finetune_trains_copies_of_every_student_and_writes_its_protocol(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in (home / "run" / "students").iterdir()}
    config = compose("finetune", FINETUNE)
    results = finetune.finetune(config)
    printed = capsys.readouterr().out
    content = results_of(home / "run", "finetune")
    assert content["results"] == results
    for name in ("convnet_w2", "convnet_w32"):
        rates = [results[f"{name}/lr{lr}"] for lr in (0.1, 0.3)]
        assert results[name] == max(rates, key=lambda accuracy: accuracy["top1"])
        assert all(0 <= accuracy["top1"] <= accuracy["top5"] <= 100 for accuracy in rates)
        assert f"| {name}/lr0.3 " in printed
    assert len(results) == 6
    protocol = content["protocol"]
    options = decisive_options(to_plain(config))
    assert options.pop("run") == "run"
    assert protocol["options"] == options
    assert options["seed"] == 0
    assert (protocol["batch_size"], protocol["batch_size_per_rank"]) == (8, 8)
    assert (
        protocol["train"]
        == load_source(config.data, "train").fingerprint()
        != DigitsSource("train").fingerprint()
    )
    assert protocol["val"] == DigitsSource("val").fingerprint()
    assert content["versions"]["seed_exp"] == __version__
    for name, record in protocol["students"].items():
        assert (record["network"], record["step"]) == (name, 2)
        assert record["sha256"] == file_hash(home / "run" / "students" / f"{name}.safetensors")
    # Typed again, it finds its own run folder inside the run's, and its checkpoint.
    assert finetune.finetune(config) == results
    (folder,) = (home / "run" / "finetune").iterdir()
    assert "resuming after step 8 of 8" in (folder / "log.txt").read_text()
    assert before == {
        path.name: path.read_bytes() for path in (home / "run" / "students").iterdir()
    }


def test_other_labels_and_another_seed_are_other_runs(home: Path) -> None:
    names = [*FINETUNE, "networks=[convnet_w2]", "lrs=[0.1]", "steps=1"]
    for change in ("seed=0", "seed=1", "data.fraction_seed=1", "data.fraction=0.04"):
        finetune.finetune(compose("finetune", [*names, change]))
    assert len(list((home / "run" / "finetune").iterdir())) == 4
    assert len(list((home / "run" / "results").iterdir())) == 4


def test_it_evaluates_every_so_many_epochs(home: Path) -> None:
    finetune.finetune(
        compose(
            "finetune",
            [*FINETUNE, "networks=[convnet_w2]", "lrs=[0.1]", "epochs=2", "eval_every=1"],
        )
    )
    (folder,) = (home / "run" / "finetune").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "convnet_w2/lr0.1/top1" in row] == [8, 16]


@pytest.mark.parametrize("command", ["linear", "finetune"])
def test_training_is_compiled_and_evaluation_is_not(
    home: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, module = CompileCounter(), PROTOCOLS[command]
    train_and_measure = module.train_and_measure
    during: list[int] = []

    def watching(
        one: Any,
        evaluated: Any,
        method: Any,
        views: Any,
        measure: Callable[..., Measures],
        **named: Any,
    ) -> Any:
        def watched(names: Collection[str]) -> Measures:
            before = counter.frame_count
            results = measure(names)
            during.append(counter.frame_count - before)
            return results

        return train_and_measure(one, evaluated, method, views, watched, **named)

    monkeypatch.setattr(module, "train_and_measure", watching)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    options = ["compile=true", "networks=[convnet_w2]", "lrs=[0.1]", "steps=2"]
    {"linear": linear.linear, "finetune": finetune.finetune}[command](
        compose(command, [*FINETUNE, *options])
    )
    assert counter.frame_count > 0
    assert during == [0]


def test_views_unlike_those_of_the_run_are_said(home: Path) -> None:
    small = ["views.crops.global.size=16", "views.eval_size=16", "views.eval_resize=16"]
    finetune.finetune(
        compose("finetune", [*FINETUNE, *small, "networks=[convnet_w2]", "lrs=[0.1]", "steps=1"])
    )
    (folder,) = (home / "run" / "finetune").iterdir()
    assert "the run was trained for {'eval_size': 32" in (folder / "log.txt").read_text()


def test_few_labels_serve_linear_and_knn_too(home: Path) -> None:
    few = ["data.fraction=0.05", "networks=[convnet_w2]", "run=run"]
    linear.linear(
        compose(
            "linear", [*DATA, *few, "views=linear_digits", "batch_size=8", "steps=1", "lrs=[1]"]
        )
    )
    knn.knn(compose("knn", [*DATA, *few, "ks=[5]"]))
    train = load_source(compose("knn", [*DATA, *few]).data, "train").fingerprint()
    assert results_of(home / "run", "linear")["protocol"]["train"] == train
    assert results_of(home / "run", "knn")["protocol"]["bank"] == train


@pytest.mark.parametrize("command", ["linear", "finetune"])
def test_a_run_is_transferred_to_other_images(home: Path, command: str) -> None:
    digits = DigitsSource("train")
    for split, num in (("train", 12), ("val", 6)):
        for index in range(num):
            folder = home / "other" / split / "abc"[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.image(index).permute(1, 2, 0).numpy()).resize((50, 40)).save(
                folder / f"{index}.png"
            )
    options = [
        "data=image_folder",
        "data.root=other",
        "data.num_workers=0",
        "device=cpu",
        "run=run",
        "networks=[convnet_w2]",
    ]
    options += ["views=linear_digits", "batch_size=4", "steps=2", "lrs=[0.1]"]
    results = {"linear": linear.linear, "finetune": finetune.finetune}[command](
        compose(command, options)
    )
    assert results["convnet_w2"]["top5"] == 100  # of three classes
    assert results_of(home / "run", command)["protocol"]["train"].startswith(
        "image_folder:train:12:"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lrs=[]", "lrs must be one or more positive"),
        ("networks=[]", r"networks=\[\] names no student"),
        ("classifier_lr_factor=0", "classifier_lr_factor must be positive, got 0"),
        (
            "views.crops.global.num=2",
            r"fine-tuning uses one view of an image; views\.crops\.global\.num is 2",
        ),
    ],
)
def test_options_that_finetune_cannot_follow_are_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose("finetune", [*FINETUNE, option])


@pytest.mark.parametrize(
    ("device", "processes", "is_shared"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)]
)
def test_batch_norm_takes_its_statistics_over_all_processes_that_have_gpus(
    device: str, processes: int, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    keys = list(network.state_dict())
    shared = with_shared_batch_norm(network, torch.device(device))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in shared.modules()) == is_shared
    assert list(shared.state_dict()) == keys


def test_every_network_that_is_fine_tuned_is_asked_to_share_its_batch_norm(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[nn.Module] = []

    def share(network: nn.Module, device: torch.device) -> nn.Module:
        asked.append(network)
        return with_shared_batch_norm(network, device)

    monkeypatch.setattr(finetune_protocol, "with_shared_batch_norm", share)
    finetune.finetune(compose("finetune", [*FINETUNE, "networks=[convnet_w2]", "steps=1"]))
    assert len(asked) == 2
    assert len({id(network) for network in asked}) == 2


@pytest.mark.parametrize("command", ["knn", "linear"])
def test_recalibrated_statistics_stand_in_the_protocol_and_give_other_numbers(
    home: Path, command: str
) -> None:
    """The results of both ways lie beside each other; the run's file stays as it is."""
    file = home / "run" / "students" / "convnet_w32.safetensors"
    before = file.read_bytes()
    words = [*DATA, "run=run", "networks=[convnet_w32]"]
    if command == "linear":
        words += ["views=linear_digits", "steps=2", "batch_size=16", "lrs=[1]", "tracker=files"]
    module: Any = {"knn": knn.knn, "linear": linear.linear}[command]
    results = [
        module(compose(command, [*words, f"recalibrate_bn={value}"])) for value in ("false", "true")
    ]
    assert results[0] != results[1]
    paths = sorted((home / "run" / "results").glob(f"{command}-*.json"))
    protocols = [json.loads(path.read_text())["protocol"] for path in paths]
    said = [protocol["recalibrate_bn"] for protocol in protocols if "recalibrate_bn" in protocol]
    assert len(protocols) == 2
    assert len(said) == 1
    assert "of batch norm from 1280 of the images digits" in said[0]
    assert file.read_bytes() == before
