"""Programs of other libraries that run exported files, with a number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Way = Callable[[Tensor, int], Callable[[], Any]]
"""Maps images [N, 3, S, S] and a number of threads to a function that computes their features."""


def in_onnxruntime(path: Path) -> Way:
    """The file in onnxruntime's CPU provider."""

    def way(images: Tensor, threads: int) -> Callable[[], Any]:
        session, inputs = _session(path, threads), {"images": images.numpy()}
        return lambda: session.run(None, inputs)

    return way


def onnx_features(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from images [N, 3, S, S] to the features that the ONNX file gives for them."""
    session = _session(path)

    def features(images: Tensor) -> Tensor:
        (result,) = session.run(["features"], {"images": images.numpy()})
        return torch.from_numpy(result)

    return features


def _session(path: Path, threads: int = 0) -> Any:
    """The file in onnxruntime on the CPU, with so many threads; 0 = one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_openvino(path: Path) -> Way:
    """The file in OpenVINO, compiled for latency and for the number of images."""
    import openvino

    def way(images: Tensor, threads: int) -> Callable[[], Any]:
        model = openvino.Core().read_model(path)
        model.reshape(list(images.shape))
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled, inputs = openvino.compile_model(model, "CPU", hints), images.numpy()
        return lambda: compiled(inputs)

    return way


def openvino_version() -> str | None:
    """The version of OpenVINO; None if it is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    return str(openvino.__version__)


def versions() -> dict[str, str]:
    """The versions of the libraries that are measured, besides torch."""
    import onnxruntime

    found = {"onnxruntime": onnxruntime.__version__, "OpenVINO": openvino_version()}
    return {name: version for name, version in found.items() if version is not None}
