"""ONNX networks with fewer bits: float16 weights, and int8 with calibrated ranges.

onnxruntime's own tools make both; this module chooses their options.
"""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

CALIBRATION_BATCH = 16
"""Images of a forward pass of the calibration, which takes their smallest and largest value."""


def in_float16(model: Any) -> Any:
    """The ONNX network with weights and computation in float16; images and features stay float32.

    Args:
        model: ONNX network, which is left as it is.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(copy.deepcopy(model), keep_io_types=True)


def in_int8(model: Any, images: Tensor) -> Any:
    """The ONNX network with weights and activations in int8, in the form QDQ.

    Weights have a scale for each channel of the output. Activations have one for each tensor. It
    lies between the smallest and the largest value of a batch, each in the mean over the batches.
    The extremes of all images would leave few steps for the others: with them MobileNetV3, whose
    squeeze-excite has rare large values, loses much (docs/export.md).

    Args:
        model: ONNX network in float32, which is left as it is.
        images: Images for the calibration [N, 3, S, S], as the network takes them.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as folder:
        given, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("a", "b", "c"))
        onnx.save(model, given)
        # torch has written the shapes already, and the symbolic inference knows fewer operators.
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            _Batches(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Unsigned, because x86 multiplies unsigned by signed; on ARM both are fast.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"CalibMovingAverage": True},
        )
        return onnx.load(quantised)


class _Batches:
    """The images in batches, as onnxruntime's calibration asks for them."""

    def __init__(self, images: Tensor) -> None:
        self._rest = iter(torch.split(images, CALIBRATION_BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._rest, None)
        return None if batch is None else {"images": batch.numpy()}
