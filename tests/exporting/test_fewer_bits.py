"""Files of fewer bits hold what their names say, and what they keep is measured as stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seed_exp.config.compose import compose
from seed_exp.config.schema import StudentConfig
from seed_exp.data.sources import load_source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.evaluation.votes import knn_accuracy
from seed_exp.exporting.formats import FORMATS, Subject
from seed_exp.exporting.kept_accuracy import TrialImages, kept_by, mean_cosine
from seed_exp.exporting.parity import relative_error
from seed_exp.exporting.reduced import CALIBRATION_BATCH, in_int8
from seed_exp.exporting.runtimes import onnx_features
from seed_exp.models.students import build_student
from seed_exp.tools.export import trial_images

onnx = pytest.importorskip("onnx")
VIEWS = {"eval_size": 32, "eval_resize": 32, "mean": [0.305] * 3, "std": [0.376] * 3}


@pytest.fixture(scope="module")
def images() -> TrialImages:
    options = ["run=none", "data.num_workers=0", "knn_bank_size=300", "knn_query_size=100"]
    config = compose("export", options)
    return trial_images(config, load_source(config.data, "train"), VIEWS)


@pytest.fixture(scope="module")
def written(images: TrialImages, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Path]:
    """A network for digits as onnx, onnx_fp16 and onnx_int8."""
    torch.manual_seed(0)
    config = StudentConfig("convnet_w32")
    student = build_student(config, 8)
    seen = images.prepared(64)
    with torch.no_grad():
        for layer in student.modules():  # statistics of these images, as after a training
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
        student.features(seen)
    student.eval().requires_grad_(False)
    subject = Subject("a", student, config, VIEWS, seen[:4], True, calibration=lambda: seen)
    folder = tmp_path_factory.mktemp("written")
    for name in ("onnx_int8", "onnx", "onnx_fp16"):
        FORMATS[name].write(subject, folder)
    return subject, folder


def tensors(path: Path) -> dict[str, Any]:
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
    }


def test_int8_has_a_scale_for_each_channel_of_a_weight_and_rounds_to_it(
    written: tuple[Subject, Path],
) -> None:
    subject, folder = written
    own = tensors(folder / "model_int8.onnx")
    model = onnx.load(folder / "model_int8.onnx")
    found = 0
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in own:
            continue
        values, scale = own[node.input[0]], own[node.input[1]]
        if values.ndim != 4:
            continue
        assert values.dtype == np.int8
        assert scale.shape == (len(values),)
        assert np.abs(values).reshape(len(values), -1).max(1).min() >= 126  # the whole range
        found += 1
    convolutions = [m for m in subject.student.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert found == len(convolutions) > 0


def test_int8_takes_the_mean_of_the_batches_ranges(written: tuple[Subject, Path]) -> None:
    subject, _ = written
    small, large = subject.calibration()[: 2 * CALIBRATION_BATCH].split(CALIBRATION_BATCH)
    model = in_int8(subject.onnx, torch.cat([small, 3 * large]))
    own = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    (scale,) = [
        own[node.input[1]]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] == "images"
    ]
    span, larger = (float(batch.max() - batch.min()) for batch in (small, 3 * large))
    assert float(scale) == pytest.approx((span + larger) / 2 / 255, rel=1e-5)


def test_float16_has_half_the_bytes_and_takes_and_gives_float32(
    written: tuple[Subject, Path],
) -> None:
    subject, folder = written
    weights = [each for each in tensors(folder / "model_fp16.onnx").values() if each.ndim == 4]
    assert {each.dtype.name for each in weights} == {"float16"}
    features = onnx_features(folder / "model_fp16.onnx")(subject.images)
    assert features.dtype == torch.float32
    sizes = [(folder / f"model{end}.onnx").stat().st_size for end in ("", "_fp16", "_int8")]
    assert sizes[0] > 1.6 * sizes[1] > 1.6 * sizes[2] * 1.2


def test_fewer_bits_are_less_exact(written: tuple[Subject, Path]) -> None:
    subject, folder = written
    expected = subject.student.features(subject.images)
    errors = [
        relative_error(onnx_features(folder / f"model{end}.onnx")(subject.images), expected)
        for end in ("", "_fp16", "_int8")
    ]
    assert errors[0] < 1e-5 < errors[1] < 1e-2 < errors[2] < 0.5


def test_the_network_as_onnx_is_made_once_for_all_formats(written: tuple[Subject, Path]) -> None:
    subject, folder = written
    assert subject.onnx is subject.onnx
    assert onnx.load(folder / "model.onnx") == subject.onnx


def test_what_is_kept_is_measured_with_each_programs_own_features(
    written: tuple[Subject, Path], images: TrialImages
) -> None:
    subject, _ = written
    torch.manual_seed(1)
    width = subject.student.num_features

    def noisy(given: Tensor) -> Tensor:
        own = subject.student.features(given)
        # A pure function of the image, however images are put into batches.
        return own + 0.3 * torch.sin(1e3 * own)

    programs = {"onnx": subject.student.features, "noisy": noisy}
    kept = kept_by(programs, {"onnx": 7, "noisy": 5}, images)
    assert (kept["onnx"].size, kept["noisy"].size) == (7, 5)
    assert kept["onnx"].cosine == pytest.approx(1)
    config = images.config
    val = images.val
    assert val is not None
    bank_in = evenly_spaced(len(images.train), config.knn_bank_size)
    query_in = evenly_spaced(len(val), config.knn_query_size)
    bank = images.extractor.views.inputs([images.train.image(i) for i in bank_in.tolist()])
    queries = images.extractor.views.inputs([val.image(i) for i in query_in.tolist()])
    labels = [torch.from_numpy(s.labels[i]) for s, i in ((images.train, bank_in), (val, query_in))]
    for name, program in programs.items():
        own = program(queries)
        assert own.shape == (100, width)
        expected = knn_accuracy(program(bank), labels[0], own, labels[1], ks=[10], temperature=1)
        assert kept[name].knn == expected["knn10_majority"]
    one, other = noisy(queries), subject.student.features(queries)
    rows = zip(one - other.mean(0), other - other.mean(0), strict=True)
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in rows]
    assert kept["noisy"].cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert kept["noisy"].cosine < 0.999


def test_a_part_that_all_images_share_hides_no_error() -> None:
    torch.manual_seed(0)
    features = 100 + torch.randn(50, 16)
    assert torch.cosine_similarity(100 + torch.randn(50, 16), features).min() > 0.999
    assert abs(mean_cosine(100 + torch.randn(50, 16), features)) < 0.2
    assert mean_cosine(features, features) == pytest.approx(1)
