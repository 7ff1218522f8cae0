"""Times a trained network on a CPU: in torch, in onnxruntime and, if installed, in OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from seed_exp.benchmarks.measure import BenchReport, Contender, interleave, machine
from seed_exp.config.schema import BenchConfig
from seed_exp.exporting.formats import FORMATS, Subject
from seed_exp.exporting.runtimes import (
    Way,
    in_onnxruntime,
    in_openvino,
    openvino_version,
    versions,
)
from seed_exp.models.student_header import recorded_config
from seed_exp.models.students import Student, build_student, load_students

CPU = torch.device("cpu")


def bench(config: BenchConfig) -> BenchReport:
    """Measures images per second of one network, with one image and with `config.batch_size`.

    Each is measured with one thread and with all, unless `config.threads` says how many.

    Raises:
        ValueError: there are several networks, or `config.device` is a GPU.
    """
    if config.device not in ("auto", "cpu"):
        raise ValueError(f"bench=latency measures on the CPU; got device={config.device}")
    subject = network_of(config)
    size = subject.eval_views["eval_size"]
    batches = {num: subject.images[:num] for num in sorted({1, config.batch_size})}
    all_threads = torch.get_num_threads()
    threads = [config.threads] if config.threads is not None else sorted({1, all_threads})
    with ExitStack() as stack:
        ways = stack.enter_context(ways_of(subject, compiled=config.compile is not False))
        contenders = [
            Contender(_row(name, count, num), way(images, count), num)
            for count in threads
            for num, images in batches.items()
            for name, way in ways.items()
        ]
        with torch.inference_mode():
            rows = interleave(contenders, seconds=config.seconds, device=CPU)
    torch.set_num_threads(all_threads)
    facts = {
        "network": subject.name,
        "images": f"3 x {size} x {size}",
        **versions(),
        **machine(CPU),
        "CPU threads": "as each row says",
    }
    return BenchReport("latency", "img/s", rows, _row("onnxruntime", threads[0], 1), [], facts)


def network_of(config: BenchConfig) -> Subject:
    """The network of `config.run`, or a student with random weights, with images of noise.

    Raises:
        ValueError: there are several.
    """
    if config.run is None:
        named = {name: build_student(student, 1) for name, student in config.students.items()}
        configs, size = config.students, config.views.eval_size
    else:
        loaded = load_students(Path(config.run), config.networks)
        named = {name: student for name, (student, _) in loaded.items()}
        configs = {name: recorded_config(header) for name, (_, header) in loaded.items()}
        size = next(iter(loaded.values()))[1]["eval_views"]["eval_size"]
    if len(named) != 1:
        raise ValueError(
            f"bench=latency measures one network, got {', '.join(named)}; choose one, with "
            f"{'student=NAME' if config.run is None else f'networks=[{next(iter(named))}]'}"
        )
    ((name, student),) = named.items()
    student.eval().requires_grad_(False)
    images = torch.randn(max(2, config.batch_size), 3, size, size)
    views = {"eval_size": size}
    return Subject(
        name, student, configs[name], views, images, False, calibration=lambda: images[:2]
    )


@contextmanager
def ways_of(subject: Subject, *, compiled: bool) -> Iterator[dict[str, Way]]:
    """The ways to compute the network's features, by name.

    The ranges of the int8 network are those of noise: it is as fast as a useful one.
    """
    formats = {name: FORMATS[name] for name in ("onnx", "onnx_int8")}
    with TemporaryDirectory() as folder:
        for each in formats.values():
            each.write(subject, Path(folder))
        files = {name: Path(folder) / each.file for name, each in formats.items()}
        ways = {"torch, eager": in_torch(subject.student)}
        if compiled:
            ways["torch, compiled"] = in_compiled_torch(subject.student)
        ways["onnxruntime"] = in_onnxruntime(files["onnx"])
        ways["onnxruntime, int8"] = in_onnxruntime(files["onnx_int8"])
        if openvino_version() is not None:
            ways["OpenVINO"] = in_openvino(files["onnx"])
            ways["OpenVINO, int8"] = in_openvino(files["onnx_int8"])
        yield ways


def in_torch(student: Student) -> Way:
    """The network as torch runs it operation by operation, channels last."""
    encoder: Any = student.encoder  # torch's annotation of `to` lacks the memory format
    return _torch_way(encoder.to(memory_format=torch.channels_last))


def in_compiled_torch(student: Student) -> Way:
    """The network compiled for each number of images."""
    return _torch_way(torch.compile(student.encoder, dynamic=False))


def _torch_way(encoder: Callable[[Tensor], Tensor]) -> Way:
    def way(images: Tensor, threads: int) -> Callable[[], Any]:
        laid_out = images.contiguous(memory_format=torch.channels_last)

        def run() -> Any:
            torch.set_num_threads(threads)
            return encoder(laid_out)

        return run

    return way


def _row(name: str, threads: int, num: int) -> str:
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, batch {num}"
