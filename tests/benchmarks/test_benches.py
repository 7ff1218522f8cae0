"""Every bench at the smallest size: what they print, never how fast it was."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from ranks import other_children
from torch.utils.flop_counter import FlopCounterMode

from seed_exp import bench
from seed_exp.benchmarks.bench_step import TimedStep
from seed_exp.config.compose import compose
from seed_exp.config.schema import Precision, StudentConfig
from seed_exp.models.students import build_student, save_student

QUICK = ["seconds=0", "device=cpu"]
LOSS = ["rows=8", "objective.queue_size=64"]
SECONDS = {"median_s", "low_s", "high_s", "p95_s"}
ROW = {"name", "runs", *SECONDS, "rate", "peak_memory", "ratio"}


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """PyTorch's number of threads is put back; images are found only where a test says."""
    monkeypatch.delenv("SEED_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options for a training of the digits' networks."""
    torch.manual_seed(0)
    config = StudentConfig("convnet_w2")
    facts = {"eval_views": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    save_student(tmp_path / "teacher.safetensors", build_student(config, 16), config, facts)
    teacher = [
        "teacher=run",
        f"teacher.checkpoint={tmp_path}/teacher.safetensors",
        "objective.queue_size=64",
    ]
    return [*QUICK, *teacher, "views=digits", "batch_size=3"]


def measured(name: str, *options: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON that the bench prints, with rows and bounds by name."""
    bench.bench(compose("bench", [f"bench={name}", "json=true", *options]))
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    for row in printed["rows"] + printed["bounds"]:
        assert row.keys() == ROW
        assert row["rate"] > 0
    names = {key: [row["name"] for row in printed[key]] for key in ("rows", "bounds")}
    assert printed["reference"] in names["rows"]
    assert {"device", "CPU threads", "torch", "date"} <= printed["facts"].keys()
    return printed | names


def test_the_command_prints_json_and_nothing_else(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "seed_exp.bench",
        "loss",
        *LOSS,
        "seconds=0.1",
        "device=cpu",
        "--json",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    done = forks.run(
        line, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["name"] for row in json.loads(done.stdout)["rows"]] == ["plain", "ours"]
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    bench.bench(compose("bench", ["bench=loss", *LOSS, *QUICK]))
    printed = capsys.readouterr().out
    assert printed.startswith("| loss, value and gradient")
    assert "\n| bound: matrix products" in printed


def test_loss(capsys: pytest.CaptureFixture[str]) -> None:
    printed = measured("loss", *LOSS, *QUICK, "objective.tau_teacher=0.1", capsys=capsys)
    assert (printed["rows"], printed["bounds"]) == (["plain", "ours"], ["matrix products"])
    assert printed["facts"]["rows x queue x dim"] == "8 x 64 x 128"
    for way in ("ours", "plain"):
        value, gradient = (
            float(word) for word in printed["facts"][f"error of {way}"].split() if word[0].isdigit()
        )
        assert 0 <= value < 1e-5
        assert 0 <= gradient < 1e-5


OURS = ["ours, host half", "ours, device half (cpu)", "ours, both halves"]


def test_views_of_any_source(capsys: pytest.CaptureFixture[str]) -> None:
    printed = measured(
        "views", *QUICK, "data=digits", "views=digits", "batch_size=3", capsys=capsys
    )
    assert printed["rows"][:4] == ["plain", *OURS]
    assert printed["bounds"] == ["read and decode"]
    assert printed["facts"]["CPU threads"] == "1"
    assert printed["facts"]["views"] == "digits: 1 x 32"


def test_views_of_a_tsv_file(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tsv = tmp_path / "images.tsv"
    tsv.write_bytes(
        b"".join((shared / "data" / "cifar10_val.tsv").read_bytes().splitlines(keepends=True)[:4])
    )
    sizes = ["views=swav_multicrop", "views.crops.global.size=32", "views.crops.local.size=16"]
    printed = measured(
        "views", *QUICK, "data=tsv", f"data.root={tsv}", "batch_size=4", *sizes, capsys=capsys
    )
    assert printed["rows"][:4] == ["plain", *OURS]
    assert printed["bounds"] == ["read and decode", "decode", "read and base64, plain"]
    assert printed["facts"]["views"] == "swav_multicrop: 1 x 32 + 6 x 16"


def test_step(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = measured("step", *small, "student=convnet_w2", capsys=capsys)
    assert printed["rows"] == ["plain", "ours"]
    assert printed["bounds"] == [
        "teacher forward",
        "student forward and backward",
        "as many operations in matrix products",
    ]
    assert printed["facts"]["batch"] == "3 images, views [3, 3, 32, 32]"


def test_step_of_several_resolutions(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    multicrop = ["views=swav_multicrop", "views.crops.global.size=32", "views.crops.local.size=16"]
    printed = measured("step", *small, *multicrop, "student=convnet_w2", capsys=capsys)
    assert printed["facts"]["batch"] == "3 images, views [3, 3, 32, 32], [18, 3, 16, 16]"


def test_fleet(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = measured("fleet", *small, "student=[convnet_w2,convnet_w32]", capsys=capsys)
    assert printed["rows"] == ["ours, one run each", "ours, one run of all", "plain, one run each"]
    assert printed["reference"] == "ours, one run each"
    assert printed["facts"]["cost of one run of all"].endswith(" of 2 runs")


def test_a_fleet_is_by_default_the_students_of_table_1() -> None:
    five = compose("distill", ["experiments=table1_moco_v2_r50"]).students
    assert compose("bench", ["bench=fleet"]).students == five
    assert len(five) == 5


def test_the_operations_are_one_forward_pass_of_the_teacher_and_three_of_the_student(
    small: list[str],
) -> None:
    two = ["views.crops.global.num=2", "student=convnet_w2"]
    training = TimedStep(compose("bench", ["bench=step", *small, *two]))
    convolutions = 9 * (3 * 2 * 32**2 + 2 * 4 * 16**2 + 4 * 8 * 8**2 + 8 * 16 * 4**2)
    expected = 2 * (1 + 3) * 2 * (convolutions + 16 * 16 + 16 * 16)
    assert training.operations("convnet_w2") == {Precision.float32: expected}


def test_matrix_products_are_as_many_operations_as_asked_for(small: list[str]) -> None:
    run = TimedStep(compose("bench", ["bench=step", *small, "student=convnet_w2"])).products(
        {Precision.float32: 4 * 2 * 1024**3, Precision.bfloat16: 3 * 2 * 1024**3}
    )
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 7 * 2 * 1024**3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            ["bench=views", "data=digits", "views=digits", "batch_size=10000"],
            "batch_size=10000 exceeds the 1437 images",
        ),
        (["bench=views"], "no images given"),
        (
            ["bench=step", "student=[resnet18,resnet34]"],
            "bench=step measures one student, got resnet18, resnet34",
        ),
        (["bench=fleet", "student=resnet18"], "a fleet is several students, got resnet18"),
    ],
)
def test_what_cannot_be_measured_is_said(line: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        bench.bench(compose("bench", line))


def test_knn(capsys: pytest.CaptureFixture[str]) -> None:
    printed = measured(
        "knn", *QUICK, "bank_size=50", "query_size=7", "feature_dim=8", "k=3", capsys=capsys
    )
    assert printed["rows"][:3] == ["plain", "ours", "scikit-learn, brute force"]
    assert printed["bounds"] == ["matrix products"]
    with pytest.raises(ValueError, match="k=3 exceeds bank_size=2"):
        bench.bench(compose("bench", ["bench=knn", "bank_size=2", "k=3"]))


def test_linear(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*QUICK, "student=convnet_w2", "views=linear_digits", "batch_size=4"]
    printed = measured("linear", *options, capsys=capsys)
    assert (printed["rows"], printed["bounds"]) == (
        ["one evaluation per rate", "ours, all rates at once"],
        ["features"],
    )


def test_latency_of_a_trained_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    config = StudentConfig("convnet_w2")
    views = {"eval_size": 32, "eval_resize": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    for name in ("a", "b"):
        facts = {"command": "distill", "step": 1, "eval_views": views}
        path = tmp_path / "run" / "students" / f"{name}.safetensors"
        save_student(path, build_student(config, 16), config, facts)
    with pytest.raises(ValueError, match=r"measures one network, got a, b; .*networks=\[a\]"):
        bench.bench(compose("bench", ["bench=latency", "run=run"]))
    options = ["run=run", "networks=[b]", "threads=1", "compile=false", "batch_size=3"]
    printed = measured("latency", *QUICK, *options, capsys=capsys)
    ways = {name.partition(", 1 thread")[0] for name in printed["rows"]}
    assert ways - {"OpenVINO", "OpenVINO, int8"} == {
        "torch, eager",
        "onnxruntime",
        "onnxruntime, int8",
    }
    for way in ways:
        assert [f"{way}, 1 thread, batch {num}" in printed["rows"] for num in (1, 3)] == [True] * 2
    assert printed["reference"] == "onnxruntime, 1 thread, batch 1"
    assert printed["facts"]["images"] == "3 x 32 x 32"


def test_latency_is_measured_on_a_cpu_only() -> None:
    with pytest.raises(ValueError, match="measures on the CPU; got device=cuda"):
        bench.bench(compose("bench", ["bench=latency", "device=cuda"]))


@pytest.mark.slow  # it starts two more processes
def test_scaling(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = measured("scaling", *small, "student=[convnet_w2,convnet_w32]", capsys=capsys)
    assert printed["rows"] == ["one process", "2 processes"]
    assert other_children() == []
    # 4 bytes of each parameter of both students, and of each of 3 embeddings of the teacher.
    num_parameters = sum(
        parameter.numel()
        for name in ("convnet_w2", "convnet_w32")
        for parameter in build_student(StudentConfig(name), 16).parameters()
    )
    sent = printed["facts"]["each process sends per step"]
    assert f"{4 * num_parameters / 1e6:.3g} MB of gradients" in sent
    assert f"{4 * 3 * 16 / 1e6:.3g} MB for the queue" in sent
