"""A student whose features an evaluation finds not finite: it has diverged, the others go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import tiny
import torch
from ranks import Ranks

from seed_exp.evaluation.accuracy import top_accuracy


def numbers(
    bad_from: int, called: list[Collection[str]]
) -> Callable[[Collection[str]], dict[str, float]]:
    """An evaluation that is a number for each network, for `bad` a NaN from this call on."""

    def evaluate(names: Collection[str]) -> dict[str, float]:
        called.append(list(names))
        broken = len(called) >= bad_from
        return {f"{name}/knn10": math.nan if name == "bad" and broken else 50.0 for name in names}

    return evaluate


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_others_go_on_as_if_alone(tmp_path: Path, logged: list[str]) -> None:
    called: list[Collection[str]] = []
    together, single = tiny.seed(["a", "bad", "c"]), tiny.seed(["a"])
    tiny.train(together, tmp_path / "fleet", evaluate=numbers(1, called))
    tiny.train(single, tmp_path / "single", evaluate=lambda _: {"a/knn10": 50.0})
    tiny.assert_same(tiny.weights(single)["a"], tiny.weights(together)["a"])
    found = {line["step"]: line for line in lines(tmp_path / "fleet") if "lr" in line}
    for line in [line for line in lines(tmp_path / "single") if "lr" in line]:
        assert line == {key: found[line["step"]][key] for key in line}
    assert called == [["a", "bad", "c"], ["a", "c"], ["a", "c"]]
    assert "NaN" not in (tmp_path / "fleet" / "metrics.jsonl").read_text()
    assert tiny.last_checkpoint(tmp_path / "fleet")["diverged"] == {"bad": 5}
    (error,) = [line for line in logged if line.startswith("ERROR")]
    assert "step 5: bad/knn10 is nan" in error
    assert "Training of bad ends here, 2 others go on" in error


def test_a_run_that_broke_off_after_that_evaluation_goes_on_the_same(tmp_path: Path) -> None:
    tiny.train(tiny.seed(["a", "bad"]), tmp_path / "straight", evaluate=numbers(1, []))
    source = tiny.Images(fail_after=8 * 5)  # before the evaluation's finding is in a checkpoint
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(
            tiny.seed(["a", "bad"]), tmp_path / "broken", source=source, evaluate=numbers(1, [])
        )
    tiny.train(tiny.seed(["a", "bad"]), tmp_path / "broken", evaluate=numbers(1, []))
    tiny.assert_same(
        tiny.last_checkpoint(tmp_path / "straight"), tiny.last_checkpoint(tmp_path / "broken")
    )


def test_a_run_ends_where_no_network_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step 5: bad/knn10 is nan \(learning rate bad"):
        tiny.train(tiny.seed(["bad"]), tmp_path, evaluate=numbers(1, []))


def train_on_a_rank(folder: str) -> list[list[str]]:
    called: list[Collection[str]] = []
    of_rank_0 = numbers(1, called)

    def evaluate(names: Collection[str]) -> dict[str, float]:
        found = of_rank_0(names)
        return found if torch.distributed.get_rank() == 0 else {}

    tiny.train(tiny.seed(["a", "bad"]), Path(folder), evaluate=evaluate)
    return [list(names) for names in called]


def test_all_ranks_learn_it_from_the_first(two_ranks: Ranks, tmp_path: Path) -> None:
    expected = [["a", "bad"], ["a"], ["a"]]
    assert two_ranks.run(train_on_a_rank, str(tmp_path)) == [expected, expected]


def test_logits_that_are_not_finite_have_no_accuracy() -> None:
    logits = torch.eye(4)
    assert top_accuracy(logits, torch.arange(4))["top1"] == 100
    logits[2, 3] = torch.inf
    assert all(map(math.isnan, top_accuracy(logits, torch.arange(4)).values()))
