from __future__ import annotations

import pytest
import torch

from seed_exp.config.schema import Precision
from seed_exp.engine.precision import resolve


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), Precision.float32), ((8, 0), Precision.bfloat16), ((9, 0), Precision.bfloat16)],
)
def test_auto_is_bfloat16_where_a_gpu_computes_in_it(
    capability: tuple[int, int], expected: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        resolve(Precision.auto, torch.device("cuda")) is Precision.bfloat16
        or torch.cuda.is_available()
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve(Precision.auto, torch.device("cuda", 0)) is expected
    assert resolve(Precision.bfloat16, torch.device("cuda", 0)) is Precision.bfloat16
    assert resolve(Precision.auto, torch.device("cpu")) is Precision.float32
