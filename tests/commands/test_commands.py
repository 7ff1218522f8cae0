"""Every command on the embedded digits, four steps at a time."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from seed_exp import __version__, distill, knn, linear, pretrain, preview, quickstart
from seed_exp.base.files import file_hash
from seed_exp.config.compose import compose
from seed_exp.config.options import MAY_CHANGE, decisive_options, flatten, to_plain
from seed_exp.data.digits import DigitsSource
from seed_exp.data.sources import load_source
from seed_exp.engine.run_folder import folder_of
from seed_exp.evaluation.results import with_best
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.student_header import read_header
from seed_exp.models.students import load_students
from seed_exp.training.encoders import build_students

DATA = ["data=digits", "data.num_workers=0", "device=cpu"]
TRAIN = [*DATA, "views=digits", "tracker=files", "steps=4", "batch_size=32", "log_every=2"]
TRAIN += ["knn_bank_size=200", "knn_query_size=100"]
PRETRAIN = [*TRAIN, "student=convnet_w2", "moco.queue_size=64"]
DISTILL = [*TRAIN, "teacher=run", "teacher.checkpoint=teacher", "objective.queue_size=64"]
FLEET = [*DISTILL, "student=[convnet_w2,convnet_w32]", "run_dir=fleet"]
LINEAR = [*DATA, "run=fleet", "views=linear_digits", "epochs=1", "lrs=[1,3]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a teacher and a fleet of two students."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        pretrain.pretrain(compose("pretrain", [*PRETRAIN, "run_dir=teacher"]))
        distill.distill(compose("distill", FLEET))
    return home


@pytest.fixture(autouse=True)
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> Path:
    """A copy of that working directory for one test; puts the package's logger back afterwards."""
    home = tmp_path / "home"
    shutil.copytree(trained, home)
    monkeypatch.chdir(home)
    return home


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_what_repeats_resumes_and_evaluates_the_run(home: Path) -> None:
    assert files_in(home / "fleet") == {
        "config.json",
        "done.json",
        "lock",
        "log.txt",
        "metrics.jsonl",
        "speed.jsonl",
        "media/index.json",
        "media/views.png",
        "media/convnet_w2/embedding_map.png",
        "media/convnet_w32/embedding_map.png",
        "media/convnet_w2/neighbours.png",
        "media/convnet_w32/neighbours.png",
        "checkpoints/step_00000004.pt",
        "students/convnet_w2.safetensors",
        "students/convnet_w32.safetensors",
    }
    config = json.loads((home / "fleet" / "config.json").read_text())
    inputs = {
        "data": DigitsSource("train").fingerprint(),
        "teacher": file_hash(home / "teacher/students/convnet_w2.safetensors"),
    }
    options = to_plain(compose("distill", FLEET))
    assert config == {
        "command": "distill",
        "version": __version__,
        "options": options,
        "inputs": inputs,
    }
    training = [row for row in metrics(home / "fleet") if "lr" in row]
    assert [row["step"] for row in training] == [2, 4]
    for name in ("convnet_w2", "convnet_w32"):
        assert {f"{name}/{key}" for key in ("loss", "teacher_cosine", "grad_norm")} <= training[
            0
        ].keys()
        assert 0 <= metrics(home / "fleet")[-1][f"{name}/knn10"] <= 100
    assert {"teacher_entropy", "effective_neighbours"} <= training[0].keys()
    log = (home / "fleet" / "log.txt").read_text()
    assert "run folder: fleet" in log
    assert re.search(
        r"student convnet_w2: 4,074 parameters with its head, 0\.\d+ MiB of activations per image",
        log,
    )


def test_a_student_file_says_what_it_is_and_where_it_comes_from(home: Path) -> None:
    for run, command, names in (
        ("teacher", "pretrain", ["convnet_w2"]),
        ("fleet", "distill", ["convnet_w2", "convnet_w32"]),
    ):
        for name in names:
            header = read_header(home / run / "students" / f"{name}.safetensors")
            assert header is not None
            config = json.loads((home / run / "config.json").read_text())
            assert header.pop("options") == decisive_options(config["options"])
            assert header.pop("inputs") == config["inputs"]
            deep_head = False if command == "distill" else None  # the objective says it
            assert header == {
                "student": {
                    "network": name,
                    "name": None,
                    "hidden_dim": None,
                    "deep_head": deep_head,
                    "init": None,
                    "init_rule": "timm",
                    "epochs": None,
                    "pretrained": False,
                    "args": {},
                },
                "embedding_dim": 128,
                "batch_size": 32,
                "command": command,
                "step": 4,
                "eval_views": {
                    "eval_size": 32,
                    "eval_resize": 32,
                    "mean": [0.305] * 3,
                    "std": [0.376] * 3,
                },
            }


def test_a_student_alone_becomes_what_it_became_in_the_fleet(home: Path) -> None:
    alone = distill.distill(compose("distill", [*DISTILL, "student=convnet_w2"]))
    (ours,), (theirs,) = (
        load_students(run, ["convnet_w2"]).values() for run in (alone, home / "fleet")
    )
    for key, value in ours[0].state_dict().items():
        assert torch.equal(value, theirs[0].state_dict()[key]), key


def test_a_diverged_student_is_an_error_when_the_others_are_done(home: Path) -> None:
    broken = {
        key: tensor * torch.nan
        for key, tensor in load_students(home / "teacher")["convnet_w2"][0]
        .encoder.state_dict()
        .items()
    }
    torch.save(broken, "broken.pt")
    with pytest.raises(
        ValueError, match=r"bad: convnet_w2 \(found after step 2\) diverged, as log\.txt says"
    ):
        distill.distill(
            compose(
                "distill",
                [*FLEET, "run_dir=bad", "max_skipped=1", "students.convnet_w2.init=broken.pt"],
            )
        )
    assert files_in(home / "bad") >= {
        "students/convnet_w32.safetensors",
        "checkpoints/step_00000004.pt",
    }
    assert not (home / "bad" / "students" / "convnet_w2.safetensors").exists()
    (ours,), (theirs,) = (
        load_students(run, ["convnet_w32"]).values() for run in (home / "bad", home / "fleet")
    )
    for key, value in ours[0].state_dict().items():
        assert torch.equal(value, theirs[0].state_dict()[key]), key


def test_a_student_whose_features_are_not_finite_stops_no_other_and_no_evaluation(
    home: Path, logged: list[str]
) -> None:
    state = load_students(home / "teacher")["convnet_w2"][0].encoder.state_dict()
    for key in [key for key in state if key.endswith("running_mean")]:
        state[key].fill_(torch.nan)  # which training does not use
    torch.save(state, "broken.pt")
    options = [*FLEET, "run_dir=bad", "students.convnet_w2.init=broken.pt"]
    config = compose("distill", [*options, 'evaluations=["knn ks=[5]"]'])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"bad: convnet_w2 \(found after step 4\) diverged"):
            distill.distill(config)
    assert not (home / "bad" / "done.json").exists()
    (ours,), (theirs,) = (
        load_students(run, ["convnet_w32"]).values() for run in (home / "bad", home / "fleet")
    )
    for key, value in ours[0].state_dict().items():
        assert torch.equal(value, theirs[0].state_dict()[key]), key
    assert metrics(home / "bad")[-1].keys() == {"step", "convnet_w32/knn10"}
    (path,) = (home / "bad" / "results").iterdir()
    assert json.loads(path.read_text())["results"].keys() == {"convnet_w32"}
    assert "knn ks=[5]: done before" in (home / "bad" / "log.txt").read_text()
    assert knn.knn(compose("knn", [*DATA, "run=bad", "ks=[5]"])).keys() == {"convnet_w32"}
    with pytest.raises(ValueError, match="the features of convnet_w2 are not finite: the training"):
        knn.knn(compose("knn", [*DATA, "run=bad", "ks=[5]", "networks=[convnet_w2]"]))


def test_a_student_trained_from_the_teacher_cache_equals_one_trained_with_the_teacher(
    home: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    sizes = ["global.size=32", "local.size=16", "local.num=2"]
    seen_by_teacher = [
        "eval_size=32",
        "eval_resize=32",
        "mean=[0.305,0.305,0.305]",
        "std=[0.376,0.376,0.376]",
    ]
    views = [
        "views=swav_multicrop",
        *(f"views.crops.{size}" for size in sizes),
        *(f"views.{option}" for option in seen_by_teacher),
    ]
    options = [*DISTILL, *views, "accumulation=2", "student=[convnet_w2,convnet_w32]"]
    uncached = distill.distill(compose("distill", [*options, "run_dir=uncached"]))
    filling = distill.distill(
        compose("distill", [*options, "run_dir=filling", "teacher_cache=cache"])
    )

    def refuse(*_: Any) -> None:
        raise AssertionError("the teacher was asked")

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "forward", refuse)
        patch.setattr("seed_exp.training.distillation.cache_costs", lambda *_: "")
        cached = distill.distill(
            compose("distill", [*options, "run_dir=cached", "teacher_cache=cache"])
        )
    for run in (filling, cached):
        assert (run / "metrics.jsonl").read_bytes() == (uncached / "metrics.jsonl").read_bytes()
        for (ours, _), (theirs, _) in zip(
            load_students(run).values(), load_students(uncached).values(), strict=True
        ):
            for key, value in ours.state_dict().items():
                assert torch.equal(value, theirs.state_dict()[key]), key
    note = next(
        line
        for line in (filling / "log.txt").read_text().splitlines()
        if "teacher cache cache" in line
    )
    assert "1,437 images x 1 epochs" in note


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "views.crops.global.num=2",
        "data=image_folder",
        "teacher.checkpoint=fleet/students/convnet_w32.safetensors",
    ],
)
def test_a_teacher_cache_of_something_else_stays_beside_that_of_this_run(
    home: Path, change: str
) -> None:
    options = [*DISTILL, "student=convnet_w2", "teacher_cache=cache"]
    run = distill.distill(compose("distill", options))
    # The student is the same network as the teacher, and its backward pass costs two forward
    # passes.
    assert "saves 25 % of a step's arithmetic" in (run / "log.txt").read_text()
    if change == "data=image_folder":
        options = [*options, f"data.root={home / 'pictures'}", "data.val_fraction=0"]
        (home / "pictures").mkdir()
        for number in range(32):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(home / "pictures" / f"{number}.png")
    (first,) = (home / "cache").iterdir()
    key = json.loads((first / "key.json").read_text())
    assert (key["device"], key["compile"], key["deterministic"]) == ("cpu", False, False)
    before = {path: path.read_bytes() for path in first.iterdir()}
    other = distill.distill(compose("distill", [*options, change, "run_dir=with_cache"]))
    assert len(list((home / "cache").iterdir())) == 2
    assert before == {path: path.read_bytes() for path in first.iterdir()}
    alone = [option for option in options if not option.startswith("teacher_cache=")]
    plain = distill.distill(compose("distill", [*alone, change, "run_dir=without_cache"]))
    assert (other / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()


def test_no_secret_reaches_a_file_and_another_signature_is_the_same_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")

    def options(signature: str) -> list[str]:
        address = f"https://user:hunter22@host/x.tsv?part=1&X-Amz-Signature={signature}&X-Amz-Date={signature}"
        tags = "tracker.tags=[0123456789abcdef0123456789abcdef01234567]"
        return [*DISTILL, "student=convnet_w2", f"data.val_root='{address}'", tags]

    first, again = (
        distill.distill(compose("distill", options(signature)))
        for signature in ("abcdef12", "fedcba98")
    )
    assert first == again
    linear.linear(compose("linear", [*LINEAR, f"run={first}", "lrs=[1]"]))
    for path in first.rglob("*"):
        if path.is_file():
            for secret in (
                b"hunter22",
                b"abcdef12&",
                b"Signature=abcdef12",
                b"0123456789abcdef0123456789abcdef01234567",
            ):
                assert secret not in path.read_bytes(), path
    assert "part=1" in (first / "config.json").read_text()


def test_the_same_command_finds_its_run_and_trains_no_further(home: Path) -> None:
    first = distill.distill(compose("distill", [*DISTILL, "student=convnet_w2"]))
    assert first.parent == Path("runs/distill")
    assert first.name.startswith("convnet_w2-run-digits-digits-")
    before = {name: (first / name).read_bytes() for name in files_in(first) - {"log.txt"}}
    again = distill.distill(compose("distill", [*DISTILL, "student=convnet_w2"]))
    assert again == first
    assert {name: (first / name).read_bytes() for name in files_in(first) - {"log.txt"}} == before
    assert "resuming after step 4 of 4" in (first / "log.txt").read_text()


def test_the_line_that_a_training_ends_with_evaluates_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = re.findall(
        r"next: python -m seed_exp\.knn (.+)", (home / "fleet" / "log.txt").read_text()
    )
    assert line == "run=fleet"
    monkeypatch.setattr(sys, "argv", ["knn.py", *line.split(), "ks=[5]", "device=cpu"])
    knn.main()
    assert list((home / "fleet" / "results").glob("knn-*.json"))


def test_a_run_that_lost_its_options_or_its_checkpoints_is_not_begun_anew(home: Path) -> None:
    shutil.copytree(home / "fleet", home / "other")
    students = {path: path.read_bytes() for path in home.glob("*/students/*")}
    (home / "fleet" / "config.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"fleet holds checkpoints or students, but no config\.json that says of what",
    ):
        distill.distill(compose("distill", [*FLEET, "optimizer.lr=0.5"]))
    shutil.rmtree(home / "other" / "checkpoints")
    with pytest.raises(ValueError, match=r"other was finished, but its checkpoints are gone"):
        distill.distill(compose("distill", [*FLEET, "run_dir=other"]))
    assert {path: path.read_bytes() for path in students} == students


def test_other_options_in_the_same_folder_are_refused_with_what_was_and_what_is(home: Path) -> None:
    before = {name: (home / "fleet" / name).read_bytes() for name in files_in(home / "fleet")}
    with pytest.raises(
        ValueError, match=r"objective\.tau_teacher was 0\.01, now 0\.1; seed was 0, now 1\."
    ) as refused:
        distill.distill(compose("distill", [*FLEET, "objective.tau_teacher=0.1", "seed=1"]))
    assert str(refused.value).startswith("fleet holds a run with other options")
    with pytest.raises(ValueError, match="fleet is a run of distill, not of pretrain"):
        pretrain.pretrain(compose("pretrain", [*PRETRAIN, "run_dir=fleet"]))
    assert {
        name: (home / "fleet" / name).read_bytes() for name in files_in(home / "fleet")
    } == before


def test_a_longer_training_of_a_finished_run_is_told_the_way(home: Path) -> None:
    way = r"students\.NAME\.init=fleet starts it from these students"
    with pytest.raises(ValueError, match=rf"steps was 4, now 8\. Give .* another run_dir; .*{way}"):
        distill.distill(compose("distill", [*FLEET, "steps=8"]))
    inits = [f"students.{name}.init=fleet" for name in ("convnet_w2", "convnet_w32")]
    longer = distill.distill(compose("distill", [*FLEET, *inits, "steps=5", "run_dir=longer"]))
    assert (longer / "done.json").exists()


@pytest.mark.parametrize(
    ("command", "option"),
    [("distill", "objective.queue_size"), ("pretrain", "moco.queue_size")],
)
def test_a_queue_that_does_not_fit_into_memory_is_refused_before_it_is_made(
    home: Path, command: str, option: str
) -> None:
    before = files_in(home)
    train, options = {
        "distill": (distill.distill, [*DISTILL, "student=convnet_w2"]),
        "pretrain": (pretrain.pretrain, PRETRAIN),
    }[command]
    with pytest.raises(ValueError, match=rf"{option}=2000000000 needs [\d,.]+ GiB .* are free"):
        train(compose(command, [*options, f"{option}=2000000000"]))
    assert files_in(home) == before


def test_a_student_that_does_not_fit_into_memory_is_refused(home: Path) -> None:
    options = [*PRETRAIN, "students.convnet_w2.hidden_dim=4000000000000"]
    with pytest.raises(ValueError, match=r"students\.convnet_w2 does not fit into memory with"):
        pretrain.pretrain(compose("pretrain", options))


def test_images_that_have_moved_go_on_in_their_run(home: Path) -> None:
    (home / "old" / "photos").mkdir(parents=True)
    for number in range(32):
        color = (number, 5 * number, 0)
        Image.new("RGB", (32, 32), color).save(home / "old" / "photos" / f"{number}.png")
    options = [*PRETRAIN, "data=image_folder", "steps=2", "batch_size=8"]
    first = pretrain.pretrain(compose("pretrain", [*options, "data.root=old/photos"]))
    (home / "new").mkdir()
    (home / "old" / "photos").rename(home / "new" / "photos")
    again = pretrain.pretrain(compose("pretrain", [*options, "data.root=new/photos"]))
    assert again == first
    assert "resuming after step 2 of 2" in (first / "log.txt").read_text()


OTHER_VALUES = {
    "run_dir": None,
    "device": "cuda",
    "log_every": 7,
    "checkpoint_every": 7,
    "data.num_workers": 3,
    "data.download": True,
    "teacher_cache": "other",
    "evaluations": "[knn]",
    "command": "distill",
    "keep_every": 3,
    "resume": "must",
    "data.on_error": "raise",
    "data.max_bad": 0.5,
    "tracker.name": "wandb",
    "tracker.project": "other",
    "tracker.entity": "other",
    "tracker.group": "other",
    "tracker.tags": "[other]",
    "tracker.mode": "offline",
    "tracker.artifacts": True,
}


def test_only_options_that_change_no_result_are_left_out_of_the_folders_name(home: Path) -> None:
    assert OTHER_VALUES.keys() == MAY_CHANGE

    def folder(*overrides: str) -> Path:
        config = compose("distill", [*DISTILL, *overrides])
        return folder_of("distill", "x", config, {}, home)

    changed = [f"{key}={value}" for key, value in OTHER_VALUES.items() if value is not None]
    assert folder(*changed) == folder()
    decisive = flatten(to_plain(compose("distill", DISTILL))).keys() - MAY_CHANGE
    assert {
        "seed",
        "steps",
        "batch_size",
        "precision",
        "accumulation",
        "data.root",
        "teacher.checkpoint",
    } <= decisive
    for override in (
        "seed=1",
        "steps=5",
        "precision=float32",
        "accumulation=2",
        "data.root=x",
        "views.flip_prob=0.1",
        "deterministic=true",
    ):
        assert folder(override) != folder()


def test_a_sweep_over_students_is_one_run_each(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    options = [option for option in PRETRAIN if not option.startswith("student=")]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "pretrain.py",
            "-m",
            "student=convnet_w2,convnet_w32",
            *options,
            "steps=1",
            "batch_size=8",
        ],
    )
    pretrain.main()
    runs = sorted((home / "runs" / "pretrain").iterdir())
    assert [[file.stem for file in (run / "students").iterdir()] for run in runs] == [
        ["convnet_w2"],
        ["convnet_w32"],
    ]


def test_a_teacher_of_several_networks_must_be_chosen(home: Path) -> None:
    options = [
        *TRAIN,
        "teacher=run",
        "teacher.checkpoint=fleet",
        "student=convnet_w2",
        "objective.queue_size=64",
        "steps=1",
    ]
    with pytest.raises(
        ValueError,
        match=r"fleet holds several networks; "
        r"choose one with teacher\.student=convnet_w2\|convnet_w32",
    ):
        distill.distill(compose("distill", options))
    assert distill.distill(compose("distill", [*options, "teacher.student=convnet_w32"])).is_dir()


def test_a_student_file_is_evaluated_whatever_it_is_called(home: Path) -> None:
    (home / "best.v2.safetensors").write_bytes(
        (home / "fleet" / "students" / "convnet_w2.safetensors").read_bytes()
    )
    options = [
        *DATA,
        "run=best.v2.safetensors",
        "views=linear_digits",
        "epochs=1",
        "lrs=[1,3]",
        "batch_size=auto",
    ]
    results = linear.linear(compose("linear", options))
    assert results.keys() == {"best.v2", "best.v2/lr1", "best.v2/lr3"}
    (file,) = (home / "results").glob("linear-*.json")
    protocol = json.loads(file.read_text())["protocol"]
    assert protocol["options"]["batch_size"] == "auto"
    assert protocol["batch_size"] in (1 << power for power in range(12))
    assert "batch_size_per_rank" not in protocol  # frozen networks do not normalise by the batch


def test_students_are_built_in_training_mode() -> None:  # of which momentum encoders are copies
    students = build_students(compose("pretrain", PRETRAIN), 128)
    assert all(module.training for student in students.values() for module in student.modules())


def test_a_student_starts_from_the_weights_of_a_run(home: Path) -> None:
    config = compose("pretrain", [*PRETRAIN, "students.convnet_w2.init=fleet"])
    built = build_students(config, config.embedding_dim)
    (given, _), *_ = load_students(home / "fleet", ["convnet_w2"]).values()
    for key, value in given.encoder.state_dict().items():
        assert torch.equal(value, built["convnet_w2"].encoder.state_dict()[key]), key


def assert_whole_protocol(path: Path, run: Path) -> dict[str, Any]:
    """Checks what both evaluations' results say about images, networks and versions.

    Returns the whole file.
    """
    content: dict[str, Any] = json.loads(path.read_text())
    protocol = content["protocol"]
    assert content["versions"].keys() == {"seed_exp", "python", "torch", "torchvision", "timm"}
    assert content["versions"]["seed_exp"] == __version__
    assert protocol["students"].keys() == {"convnet_w2", "convnet_w32"}
    for name, record in protocol["students"].items():
        assert (record["network"], record["step"], record["command"]) == (name, 4, "distill")
        assert record["sha256"] == file_hash(run / "students" / f"{name}.safetensors")
    return content


def test_knn_writes_accuracies_with_their_protocol_and_prints_them(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = knn.knn(compose("knn", [*DATA, "run=fleet", "ks=[10,20]"]))
    (path,) = (home / "fleet" / "results").iterdir()
    assert path.name.startswith("knn-")
    content = assert_whole_protocol(path, home / "fleet")
    assert content["evaluation"] == "knn"
    assert content["results"] == results
    assert results.keys() == {"convnet_w2", "convnet_w32"}
    assert results["convnet_w2"].keys() == {
        f"knn{k}_{vote}" for k in (10, 20) for vote in ("majority", "weighted")
    }
    assert all(10 < value <= 100 for measures in results.values() for value in measures.values())
    protocol = content["protocol"]
    assert (protocol["ks"], protocol["temperature"]) == ([10, 20], 0.07)
    assert (protocol["bank"], protocol["queries"]) == tuple(
        DigitsSource(split).fingerprint() for split in ("train", "val")
    )
    assert (
        protocol["views"]
        == read_header(home / "fleet" / "students" / "convnet_w2.safetensors")["eval_views"]
    )  # type: ignore[index]
    printed = capsys.readouterr().out
    assert f"{results['convnet_w32']['knn20_weighted']:.2f}" in printed
    assert f"written to {Path('fleet/results') / path.name}" in printed


def test_knn_takes_a_student_file_and_chosen_networks(home: Path) -> None:
    chosen = knn.knn(compose("knn", [*DATA, "run=fleet", "ks=[10]", "networks=[convnet_w2]"]))
    file = knn.knn(compose("knn", [*DATA, "run=fleet/students/convnet_w2.safetensors", "ks=[10]"]))
    assert chosen == file
    assert chosen.keys() == {"convnet_w2"}
    assert (
        len(list((home / "fleet" / "results").iterdir())) == 1
    )  # the same evaluation overwrites itself
    with pytest.raises(
        ValueError, match=r"unknown student of fleet 'convnet_w3'; did you mean 'convnet_w32'\?"
    ):
        knn.knn(compose("knn", [*DATA, "run=fleet", "networks=[convnet_w3]"]))


def test_linear_trains_every_rate_on_every_student_and_writes_its_protocol(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    students_before = {
        path.name: path.read_bytes() for path in (home / "fleet" / "students").iterdir()
    }
    config = compose("linear", LINEAR)
    results = linear.linear(config)
    printed = capsys.readouterr().out
    (path,) = (home / "fleet" / "results").iterdir()
    content = assert_whole_protocol(path, home / "fleet")
    assert (path.name.partition("-")[0], content["evaluation"]) == ("linear", "linear")
    assert content["results"] == results
    for name in ("convnet_w2", "convnet_w32"):
        rates = [results[f"{name}/lr{lr}"] for lr in (1, 3)]
        assert results[name] == max(rates, key=lambda accuracy: accuracy["top1"])
        assert all(accuracy["top1"] <= accuracy["top5"] for accuracy in rates)
        assert f"| {name}/lr3 " in printed
    assert len(results) == 6
    protocol = content["protocol"]
    options = decisive_options(to_plain(config))
    assert (
        options.pop("run") == "fleet"
    )  # a path says nothing about the numbers; the students' hashes do
    assert protocol["options"] == options
    assert (protocol["train"], protocol["val"]) == tuple(
        DigitsSource(split).fingerprint() for split in ("train", "val")
    )
    assert students_before == {
        path.name: path.read_bytes() for path in (home / "fleet" / "students").iterdir()
    }
    # Typed again, it finds its own run folder inside the run's, and its checkpoint.
    (folder,) = (home / "fleet" / "linear").iterdir()
    assert linear.linear(config) == results
    assert list((home / "fleet" / "linear").iterdir()) == [folder]
    assert "resuming after step 5 of 5" in (folder / "log.txt").read_text()


def test_linear_with_views_that_do_not_fit_the_run_is_refused_before_anything_is_written(
    home: Path,
) -> None:
    before = files_in(home)
    with pytest.raises(
        ValueError,
        match=r"views=linear evaluates with .*224.* trained for .*32.*; leave out views=linear",
    ):
        linear.linear(compose("linear", [*DATA, "run=fleet", "views=linear", "epochs=1"]))
    assert files_in(home) == before


def test_the_best_rate_of_each_student_stands_under_its_name() -> None:
    low, high = {"top1": 40.0, "top5": 90.0}, {"top1": 50.0, "top5": 80.0}
    accuracy = {"a/lr1": low, "a/lr10": high, "b/lr1": high, "b/lr10": low}
    assert with_best(accuracy) == {**accuracy, "a": high, "b": high}


def test_an_evaluation_of_what_is_no_run_is_refused(home: Path) -> None:
    (home / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no run folder or student file nowhere"):
        knn.knn(compose("knn", [*DATA, "run=nowhere"]))
    with pytest.raises(ValueError, match="empty holds no students"):
        linear.linear(compose("linear", [*DATA, "run=empty", "views=linear_digits"]))


def test_preview_shows_each_image_beside_its_views(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        *DATA[:2],
        "views=digits",
        "num_images=3",
        "views.crops.global.num=2",
        "output=pictures/digits.png",
    ]
    preview.preview(compose("preview", options))
    first = Image.open("pictures/digits.png")
    assert first.width > 3 * 32  # original and two views
    assert first.height > 3 * 32
    assert capsys.readouterr().out == "written to pictures/digits.png\n"
    preview.preview(compose("preview", [*options, "output=same.png"]))
    preview.preview(compose("preview", [*options, "output=epoch1.png", "epoch=1"]))
    assert Image.open("same.png").tobytes() == first.tobytes()
    assert Image.open("epoch1.png").tobytes() != first.tobytes()


def test_unlabelled_training_logs_no_accuracy_and_its_evaluation_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "images").mkdir()
    digits = load_source(compose("knn", [*DATA, "run=x"]).data, "train")
    for index in range(40):
        Image.fromarray(digits.image(index).permute(1, 2, 0).numpy()).save(
            home / "images" / f"{index}.png"
        )
    images = ["data=image_folder", "data.root=images"]
    folder = pretrain.pretrain(compose("pretrain", [*PRETRAIN, *images, "steps=2", "batch_size=8"]))
    assert not any("knn" in key for row in metrics(folder) for key in row)
    log = (folder / "log.txt").read_text()
    assert f"next: python -m seed_exp.embed run={folder} or python -m seed_exp.export" in log
    with pytest.raises(ValueError, match=r"data\.val_root|labels"):
        knn.knn(compose("knn", [*DATA, *images, f"run={folder}"]))


@pytest.mark.parametrize("command", ["distill", "pretrain"])
def test_a_batch_larger_than_the_data_leaves_no_run_folder(home: Path, command: str) -> None:
    words = [*(DISTILL if command == "distill" else DATA), "student=convnet_w2", "run_dir=run"]
    run = distill.distill if command == "distill" else pretrain.pretrain
    with pytest.raises(ValueError, match=r"batch_size=2000 exceeds the \d+ images"):
        run(compose(command, [*words, "batch_size=2000"]))
    assert not (home / "run").exists()


def test_a_queue_of_the_teachers_embeddings_is_the_same_with_a_cache_and_after_a_resume(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seed_exp.methods.seed.ONE_HOT", 1e9)  # so that any target is called so
    words = [*DISTILL, "student=convnet_w2", "objective.queue_init=teacher", "steps=6"]
    words += ["checkpoint_every=2", "log_every=1"]
    whole = distill.distill(compose("distill", [*words, "run_dir=whole"]))
    lines = (whole / "log.txt").read_text().splitlines()
    (told,) = [line for line in lines if "the target is one-hot" in line]
    assert "step 5: " in told
    killed = [*words, "run_dir=killed", "teacher_cache=cache"]
    folder = distill.distill(compose("distill", killed))
    (folder / "checkpoints/step_00000006.pt").unlink()
    (folder / "done.json").unlink()
    before = len((folder / "log.txt").read_text())
    distill.distill(compose("distill", killed))
    again = (folder / "log.txt").read_text()[before:]
    assert "resuming after step 4" in again
    assert "queue: starts with" not in again
    first, second = (
        torch.load(run / "checkpoints/step_00000006.pt", weights_only=True)
        for run in (whole, folder)
    )
    for part in ("carried", "networks", "optimizers"):
        tiny.assert_same(first[part], second[part])


@pytest.mark.parametrize("per", ["run", "row"])
def test_a_calibrated_run_with_an_automatic_queue_goes_on_bit_for_bit(home: Path, per: str) -> None:
    words = [*DISTILL, "student=convnet_w2", "steps=6", "checkpoint_every=2", "log_every=1"]
    words += ["objective.queue_size=auto", "objective.queue_init=teacher"]
    words += ["teacher.size=40", "teacher_cache=cache"]
    words += ["objective.effective_neighbours=300", f"objective.effective_neighbours_per={per}"]
    whole = distill.distill(compose("distill", [*words, "run_dir=whole"]))
    log = (whole / "log.txt").read_text()
    (tau,) = re.findall(r"temperature: tau_teacher=(\S+) gives the target 300 effective", log)
    assert "recommended for so few are about" in log
    folder = distill.distill(compose("distill", [*words, "run_dir=killed"]))
    (folder / "checkpoints/step_00000006.pt").unlink()
    (folder / "done.json").unlink()
    before = len((folder / "log.txt").read_text())
    distill.distill(compose("distill", [*words, "run_dir=killed"]))
    again = (folder / "log.txt").read_text()[before:]
    assert "resuming after step 4" in again
    assert "temperature:" not in again
    first, second = map(tiny.last_checkpoint, (whole, folder))
    for part in ("carried", "networks", "optimizers"):
        tiny.assert_same(first[part], second[part])
    assert first["carried"]["global.embeddings"].shape[0] == 512
    options = json.loads((folder / "config.json").read_text())["options"]
    assert options["objective"]["queue_size"] == 512
    header = read_header(folder / "students/convnet_w2.safetensors")
    assert header is not None
    assert header["tau_teacher"] == float(tau)
    rows = [row for row in metrics(folder) if "tau_teacher" in row]
    assert len(rows) == 6
    if per == "run":
        assert [row["tau_teacher"] for row in rows] == 6 * [pytest.approx(float(tau))]
    else:
        assert [row["effective_neighbours"] for row in rows] == 6 * [pytest.approx(300, rel=0.1)]


def test_a_student_that_cannot_take_a_view_size_is_refused_before_anything_is_written(
    home: Path,
) -> None:
    before = files_in(home)
    options = [
        "student=timm/levit_128s",
        "views.crops.global.size=40",
        "steps=1",
    ]
    with pytest.raises(
        ValueError, match="student levit_128s does not take views of 40 x 40 pixels"
    ):
        pretrain.pretrain(compose("pretrain", ["data=digits", *options]))
    assert files_in(home) == before


@pytest.mark.slow
def test_quickstart_writes_its_table_and_picture_and_typed_again_trains_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose("quickstart", ["steps=3", "seeds=[0,1]"])
    quickstart.quickstart(config)
    table = (tmp_path / "runs/quickstart/table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == [
        "convnet_w32",
        "convnet_w2",
        "convnet_w2",
    ]
    assert "over seeds [0, 1]" in table
    assert table in capsys.readouterr().out
    with Image.open(tmp_path / "runs/quickstart/overview.png") as picture:
        assert picture.size == (1600, 900)
    quickstart.quickstart(config)
    assert (tmp_path / "runs/quickstart/table.md").read_text() == table
    assert (
        "resuming after step 3 of 3"
        in (tmp_path / "runs/quickstart/seed1/seed/log.txt").read_text()
    )
