"""A network of the user's code is checked before training, and no file chooses what is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from seed_exp.config.schema import CropConfig, StudentConfig, TeacherConfig, ViewsConfig
from seed_exp.models import custom
from seed_exp.models.students import build_student, load_students, save_student
from seed_exp.models.teachers import build_teacher, untrained_teacher
from seed_exp.training.encoders import check_view_sizes, student_inputs

NETS = """
from torch import nn
from my_nets.layers import Pool

def build(width=6, num_features=None):
    net = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), Pool())
    if num_features is not None:
        net.num_features = num_features
    return net

def unpooled():
    return nn.Conv2d(3, 4, 3)

def several():
    class Levels(nn.Module):
        def forward(self, images):
            return [images, images]
    return Levels()

def large_only():
    return nn.Sequential(nn.Conv2d(3, 4, 30), Pool())

def text():
    return "no network"

def broken():
    raise KeyError("backbone.yaml")

WIDTH = 6
"""
LAYERS = """
from torch import nn

class Pool(nn.Module):
    def forward(self, maps):
        return maps.mean((2, 3))
"""
VIEWS = ViewsConfig("x", {"global": CropConfig(16)}, eval_size=24, eval_resize=24)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's package, on the import path of this process only."""
    folder = tmp_path / "my_nets"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "nets.py").write_text(NETS)
    (folder / "layers.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(custom.VARIABLE, raising=False)
    yield folder
    forget()


def forget() -> None:
    """Makes this process a new one, which has imported nothing of the user's."""
    custom._GIVEN.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_nets"]:
        del sys.modules[name]


def config(function: str = "build", **args: object) -> StudentConfig:
    return StudentConfig(f"my_nets.nets:{function}", args=args)


@pytest.mark.parametrize("declared", [{}, {"num_features": 5}])
def test_a_factory_makes_the_encoder_whose_width_is_measured_or_declared(
    declared: dict[str, int],
) -> None:
    student = build_student(config(width=5, **declared), 8).eval()
    assert student.num_features == 5
    assert student(torch.randn(2, 3, 16, 16)).shape == (2, 8)
    check_view_sizes({"mine": student}, VIEWS)
    assert all(module.training for module in build_student(config(), 8).modules())


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        ("unpooled", {}, r"a map \[1, 4, 222, 222\].*pool it, e.g. features.mean\(\(2, 3\)\)"),
        ("several", {}, "a list; expected features .*: return one tensor"),
        ("text", {}, "returns a str; expected a torch.nn.Module"),
        ("broken", {}, r"raises KeyError: 'backbone.yaml' \(called with {}\)"),
        ("build", {"depth": 3}, "raises TypeError: .* unexpected keyword argument 'depth'"),
        ("build", {"num_features": "6"}, "num_features=6; expected the width of its output"),
        ("absent", {}, "my_nets.nets has no function 'absent'; expected module:function"),
        ("WIDTH", {}, "my_nets.nets has a int called 'WIDTH'; expected module:function"),
    ],
)
def test_a_wrong_factory_is_one_line_that_names_the_option(
    function: str, args: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        build_student(config(function, **args), 8)
    assert f"students.<name>.network=my_nets.nets:{function}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_module_that_is_absent_or_cannot_be_imported_is_named(package: Path) -> None:
    with pytest.raises(ValueError, match=r"no module named 'my_netz'; .* PYTHONPATH="):
        build_student(StudentConfig("my_netz.nets:build"), 8)
    (package / "wrong.py").write_text("import yolo_of_mine")
    with pytest.raises(ValueError, match=r"my_nets.wrong:build: no module named 'yolo_of_mine'"):
        build_student(StudentConfig("my_nets.wrong:build"), 8)
    (package / "wrong.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=r"my_nets\.wrong raises ZeroDivisionError when it is"):
        build_student(StudentConfig("my_nets.wrong:build"), 8)


def test_a_width_or_a_size_that_is_wrong_is_found_before_training() -> None:
    wrong = build_student(config(width=6, num_features=7), 8)
    expected = r"student mine returns, for an image of 16 x 16 pixels, 6 features, .* num_features"
    with pytest.raises(ValueError, match=expected):
        check_view_sizes({"mine": wrong}, VIEWS)
    with pytest.raises(ValueError, match="student mine does not take views of 16 x 16 pixels: "):
        check_view_sizes({"mine": build_student(config("large_only"), 8)}, VIEWS)


def test_the_code_is_an_input_of_the_run_wherever_in_the_package_it_stands(package: Path) -> None:
    def found() -> str:
        forget()
        mine = config()
        inputs = student_inputs({"mine": mine}, {"mine": build_student(mine, 8)})
        return inputs["students.mine.network"]

    first = found()
    assert found() == first
    (package / "unused.py").write_text("# no layer is from here")
    assert found() == first
    (package / "layers.py").write_text(LAYERS.replace("mean", "amax"))
    second = found()
    (package / "nets.py").write_text(NETS + "# changed\n")
    assert len({first, second, found()}) == 3


def saved(path: Path) -> Path:
    mine = config(width=4)
    student = build_student(mine, 8)
    student(torch.randn(4, 3, 16, 16))
    save_student(path / "mine.safetensors", student.eval(), mine, {"step": 1})
    forget()
    return path / "mine.safetensors"


def test_a_file_imports_nothing_that_the_user_did_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path)
    expected = r"holds a network of my_nets.nets:build, .* set SEED_CUSTOM=my_nets.nets:build"
    for listed in ("", "my_nets", "my_nets.nets", "my_nets.nets:other"):
        monkeypatch.setenv(custom.VARIABLE, listed)
        with pytest.raises(ValueError, match=expected):
            load_students(file)
        assert "my_nets.nets" not in sys.modules
    monkeypatch.setenv(custom.VARIABLE, "a:b, my_nets.nets:build")
    student, header = load_students(file)["mine"]
    assert student.num_features == 4
    assert header["student"]["args"] == {"width": 4}
    images = torch.randn(2, 3, 16, 16)
    assert torch.isfinite(student.eval()(images)).all()


def test_what_options_of_a_process_named_its_evaluations_load(tmp_path: Path) -> None:
    file = saved(tmp_path)
    build_student(config(), 8)
    assert load_students(file)["mine"][0].num_features == 4


def test_a_file_of_other_code_is_refused(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path)
    monkeypatch.setenv(custom.VARIABLE, "my_nets.nets:build")
    (package / "layers.py").write_text(LAYERS.replace("mean", "amax"))  # the same tensors
    with pytest.raises(ValueError, match=r"was trained with other code of my_nets\.nets:build"):
        load_students(file)


@pytest.mark.parametrize("network", ["os.system", "os:system:x", "a b:c", ":x", "x:", "../a:b"])
def test_only_module_and_function_are_a_place(network: str) -> None:
    with pytest.raises(ValueError, match="unknown student network"):
        build_student(StudentConfig(network), 8)


def test_a_teacher_is_made_in_the_same_way(
    tmp_path: Path, package: Path, fresh: Callable[[], nn.Module]
) -> None:
    mine = TeacherConfig("my_nets.nets:build")
    torch.manual_seed(3)
    teacher = build_teacher(mine, "moco_v2")
    teacher.adapt_to(VIEWS)
    assert teacher.embedding_dim == untrained_teacher(mine, "").embedding_dim == 6
    torch.manual_seed(3)
    assert build_teacher(mine, "").fingerprint == teacher.fingerprint
    torch.manual_seed(4)
    assert build_teacher(mine, "").fingerprint != teacher.fingerprint
    save_file(fresh().state_dict(), tmp_path / "x.safetensors")
    of_file = TeacherConfig("my_nets.nets:build", checkpoint=str(tmp_path / "x.safetensors"))
    one = build_teacher(of_file, "")
    assert torch.equal(one.encoder.state_dict()["0.weight"], fresh().state_dict()["0.weight"])
    forget()
    (package / "layers.py").write_text(LAYERS + "# changed\n")
    assert build_teacher(of_file, "").fingerprint != one.fingerprint
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the encoder my_nets.nets:build: missing 0"):
        build_teacher(of_file, "")
    with pytest.raises(ValueError, match=r"teacher.network=my_nets.nets:unpooled returns.* a map"):
        build_teacher(TeacherConfig("my_nets.nets:unpooled"), "")


@pytest.fixture
def fresh() -> Callable[[], nn.Module]:
    """Makes the network of a file of weights, always the same one."""

    def make() -> nn.Module:
        torch.manual_seed(9)
        return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6))

    return make
