"""A step on a GPU, without a GPU: on tensors without memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from seed_exp.config.schema import FitConfig, Precision, StudentConfig
from seed_exp.data.transfer import moved
from seed_exp.engine import fleet
from seed_exp.engine.averages import Averages
from seed_exp.engine.fleet import Fleet, Outcome, find_batch_size
from seed_exp.engine.method import Method
from seed_exp.engine.precision import autocast
from seed_exp.methods.seed import Seed
from seed_exp.models.students import build_student
from seed_exp.views.recipe import HostBatch, TrainViews

GPU, META = torch.device("cuda", 0), torch.device("meta")
VIEWS = {"blur_prob": 0.5, "grayscale_prob": 0.2, "mixup": True}
NUM = 8
METHODS: dict[str, Callable[[], Method]] = {
    "one student": lambda: tiny.seed(["a"]),
    "five students": lambda: tiny.seed(list("abcde")),
    "moco": lambda: tiny.moco(["a", "b"]),
}


class Watch(TorchDispatchMode):
    """Counts operations, and lists the copies for which the host waits.

    Whatever else waits (item(), bool(), nonzero()) is an error for tensors without memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: list[str] = []
        self.convolved: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.operations[name] += 1
        if name in ("convolution", "conv2d"):  # conv2d: in inference mode
            self.convolved.add(args[0].dtype)
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            waits = not (
                (kwargs or {}).get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            )
            if waits and source.device.type != result.device.type:
                self.waits.append(f"{name} {tuple(source.shape)} to {result.device}")
        return result


def config_and_views(**options: Any) -> tuple[FitConfig, TrainViews]:
    config = tiny.replaced(
        tiny.fit_config(compile=False, **options),
        optimizer=tiny.optimizer_config(name="lars", clip_grad_norm=1.0),
    )
    return config, TrainViews(tiny.views_config(**VIEWS), 1)


def built(method: Method, config: FitConfig, views: TrainViews, device: torch.device) -> Fleet:
    lengths = dict.fromkeys(method.trainable, 9)
    return Fleet(
        method,
        views,
        config,
        device,
        batch_size=NUM,
        steps_per_epoch=5,
        num_steps=lengths,
        averages=Averages(method.trainable, 0.9, device) if device == META else None,
    )


def steps(method: Method, monkeypatch: pytest.MonkeyPatch) -> tuple[Watch, Outcome, Fleet]:
    """What two steps do, the outcome of the last, and the fleet.

    On `meta`, for which autograd needs no driver: there the package takes a GPU's ways.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has no `meta`
    config, views = config_and_views(precision=Precision.float32, accumulation=2)
    trained = built(method, config, views, META)
    batch = moved(views.empty(NUM), META)
    with Watch() as watch:
        for step in range(2):
            outcome = trained.step(batch, step, measure=True)
    return watch, outcome, trained


@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, outcome, trained = steps(METHODS[name](), monkeypatch)
    assert watch.waits == []
    numbers = [*outcome.means.values(), *outcome.measured.values(), *outcome.skipped.values()]
    kept = [*trained.method.carried.buffers()]
    for network in trained.method.trainable.values():
        kept += [*network.parameters(), *network.buffers()]
    assert trained.averages is not None
    for average in trained.averages.networks.values():
        kept += [*average.parameters(), *average.buffers()]
    assert {tensor.device for tensor in [*numbers, *kept]} == {META}


@pytest.mark.parametrize("num_layers", [1, 5])
@pytest.mark.parametrize("is_skipped", [False, True])
def test_a_skipped_step_is_undone_in_as_many_kernels_however_many_layers_there_are(
    num_layers: int, is_skipped: bool
) -> None:
    network = torch.nn.Sequential(*(torch.nn.BatchNorm2d(6) for _ in range(num_layers)))
    first = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with Watch() as watch:
        statistics = fleet._Statistics(network)
    network(torch.randn(4, 6, 2, 2))
    moved_on = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with watch:
        statistics.restore_where(torch.tensor(is_skipped))
    tiny.assert_same(dict(network.named_buffers()), first if is_skipped else moved_on)
    kernels = ("cat", "where", "_foreach_copy_", "clone", "copy_")
    assert [watch.operations[name] for name in kernels] == [4, 2, 2, 0, 0]  # of two dtypes


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets autocast take a GPU for one that computes in bfloat16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    event = SimpleNamespace(record=lambda: None, query=lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("precision", [Precision.float32, Precision.bfloat16])
def test_a_forward_pass_computes_in_the_formats_of_its_networks(
    name: str, precision: Precision
) -> None:
    method = METHODS[name]()
    config, views = config_and_views(precision=precision)
    if isinstance(method, Seed):  # it waits once for the first embeddings of each shape
        method.teacher.overflow._tried = {
            torch.Size((crop.num * NUM, 3, crop.size, crop.size))
            for crop in views.config.crops.values()
        }
    with FakeTensorMode(allow_non_fake_inputs=True):
        built(method, config, views, GPU)
        batch = moved(views.empty(NUM), GPU)
        with Watch() as watch, autocast(precision, GPU):
            prepared = method.prepare(views.device(batch), batch)
            losses = [
                method.loss(of, network, prepared)["loss"]
                for of, network in method.trainable.items()
            ]
    assert watch.waits == []
    assert {(loss.dtype, loss.device) for loss in losses} == {(torch.float32, GPU)}
    half = {torch.bfloat16} if name == "moco" else {torch.bfloat16, torch.float16}
    assert watch.convolved == (half if precision is Precision.bfloat16 else {torch.float32})


RAISE_WHEN_DETERMINISTIC = {
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "put_", "put", "histc"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "max_unpool2d"),
    *(f"upsample_{kind}2d_backward" for kind in ("bilinear", "bicubic", "linear")),
    *(f"_upsample_{kind}2d_aa_backward" for kind in ("bilinear", "bicubic")),
    *(f"reflection_pad{num}d_backward" for num in (1, 2, 3)),
    *("nll_loss2d_forward", "grid_sampler_2d_backward", "avg_pool3d_backward", "median"),
}
"""Operations without a deterministic way on a GPU, of torch.use_deterministic_algorithms' page."""


@pytest.mark.parametrize("network", ["resnet18", "mobilenetv3_large", "efficientnet_b0"])
def test_every_operation_of_a_released_student_has_a_deterministic_way(network: str) -> None:
    with META:
        student = build_student(StudentConfig(network), 128)
        with Watch() as watch:
            student(torch.ones(2, 3, 64, 64)).sum().backward()
    assert watch.operations["convolution_backward"] > 0
    assert RAISE_WHEN_DETERMINISTIC & watch.operations.keys() == set()


def test_the_watch_sees_a_copy_that_waits() -> None:
    with FakeTensorMode(), Watch() as watch:
        on_gpu = torch.ones(3, device="cuda:0")
        on_gpu.to("cpu", non_blocking=True)
        on_gpu.cpu()
        on_gpu.copy_(torch.ones(3))
    assert watch.waits == ["_to_copy (3,) to cpu", "copy_ (3,) to cuda:0"]


def test_the_indices_of_a_trial_batch_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[HostBatch] = []
    monkeypatch.setattr(Fleet, "step", lambda _fleet, batch, *_, **__: seen.append(batch))
    monkeypatch.setattr(fleet, "largest_batch_size", lambda step, **_: step(4) or 4)
    config = tiny.replaced(tiny.fit_config(), optimizer=tiny.optimizer_config())
    views = TrainViews(tiny.views_config(), 1)
    assert find_batch_size(tiny.seed(), views, config, META, 8) == 4
    assert (seen[0].indices.device.type, seen[0].labels.device.type) == ("cpu", "meta")
