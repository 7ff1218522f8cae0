"""An exported file's error is relative to what tells images apart.

It is measured without this package.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seed_exp.exporting.parity import relative_error, results_of


def test_what_all_images_have_in_common_hides_no_error() -> None:
    expected = 1000 + torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert relative_error(expected + 0.01, expected) == pytest.approx(0.01, rel=1e-2)
    assert relative_error(expected, expected) == 0


@pytest.mark.parametrize(
    "given", [torch.zeros(2, 3), torch.full((2, 2), torch.nan), torch.full((2, 2), torch.inf)]
)
def test_other_shapes_and_numbers_that_are_none_are_infinitely_wrong(given: torch.Tensor) -> None:
    assert relative_error(given, torch.randn(2, 2)) == float("inf")


def test_lines_run_in_the_folder_and_cannot_import_this_package(tmp_path: Path) -> None:
    (tmp_path / "double.py").write_text("def double(x):\n    return 2 * x\n")
    images = torch.randn(2, 3, 4, 4)
    results = results_of("from double import double\nfeatures = double(images)", images, tmp_path)
    assert torch.equal(results["features"], 2 * images)
    assert [path.name for path in tmp_path.iterdir()] == ["double.py"]
    with pytest.raises(ValueError, match=r"cannot be loaded: ModuleNotFoundError: .*seed_exp"):
        results_of("import seed_exp.models", images, tmp_path)
