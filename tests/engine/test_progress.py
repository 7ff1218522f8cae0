from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from seed_exp.engine import progress as module
from seed_exp.engine.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test sets, in seconds."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)
    return now


def test_rate_counts_images_of_the_steps_since_the_last_measurement(clock: SimpleNamespace) -> None:
    progress = Progress(first_step=10, num_steps=100, batch_size=32)
    clock.seconds += 4
    assert progress.measure(20)["images_per_s"] == pytest.approx(10 * 32 / 4)
    clock.seconds += 2
    assert progress.measure(21)["images_per_s"] == pytest.approx(32 / 2)
    progress.close()


def test_waiting_for_data_is_a_share_of_the_time(clock: SimpleNamespace) -> None:
    progress = Progress(0, 100, 32)
    with progress.waiting():
        clock.seconds += 1
    clock.seconds += 3
    assert progress.measure(1)["data_wait_percent"] == pytest.approx(25)
    clock.seconds += 1
    assert progress.measure(2)["data_wait_percent"] == 0
    progress.close()


def test_evaluation_does_not_count_in_the_rate(clock: SimpleNamespace) -> None:
    progress = Progress(0, 100, 32)
    clock.seconds += 2
    with progress.paused():
        clock.seconds += 1000
    assert progress.measure(4)["images_per_s"] == pytest.approx(4 * 32 / 2)
    progress.close()


def test_no_time_at_all_is_no_error(clock: SimpleNamespace) -> None:
    progress = Progress(0, 100, 32)
    speed = progress.measure(1)
    progress.report(1, {"a/loss": 1.0}, speed)
    progress.report(1, {"a/loss": 1.0}, {"images_per_s": 0.0, "data_wait_percent": 0.0})
    progress.close()


@pytest.mark.parametrize(("step", "left"), [(100, "0:00"), (90, "0:10"), (38, "1:02"), (0, "1:40")])
def test_the_line_tells_step_losses_rate_and_time_left(
    step: int, left: str, logged: list[str]
) -> None:
    progress = Progress(0, 100, 32)
    progress.report(
        step, {"a/loss": 1.23456, "b/loss": 7.0}, {"images_per_s": 32.0, "data_wait_percent": 12.4}
    )
    progress.close()
    assert logged == [
        f"INFO step {step}/100: a/loss 1.235, b/loss 7; 32 img/s, data wait 12 %, {left} left"
    ]


def test_hours_are_told_as_hours(logged: list[str]) -> None:
    Progress(0, 10_000, 1).report(0, {}, {"images_per_s": 1.0, "data_wait_percent": 0.0})
    assert "2:46:40 left" in logged[0]


def test_on_a_terminal_there_is_a_bar_and_lines_only_in_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logged: list[str]
) -> None:
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(5, 100, 32)
    for _ in range(3):
        progress.update()
    progress.report(8, {"a/loss": 1.5}, {"images_per_s": 32.0, "data_wait_percent": 0.0})
    progress.close()
    assert re.search(r"8/100 .*a/loss 1.5.*32 img/s", capsys.readouterr().err)
    assert logged[0].startswith("DEBUG ")


def test_the_time_left_is_told_after_ten_seconds_even_if_no_line_was_due(
    clock: SimpleNamespace, logged: list[str]
) -> None:
    progress = Progress(10, 100, 32)
    clock.seconds += 3  # compiles
    progress.update()
    with progress.paused():
        clock.seconds += 500
    for _ in range(3):
        clock.seconds += 2
        progress.update()
    assert logged == []  # 9 s of training
    for _ in range(3):
        clock.seconds += 2
        progress.update()
    assert logged == ["INFO step 15/100: 16 img/s, 2:50 left"]
    progress.close()


def test_that_time_is_not_told_where_lines_come_sooner(
    clock: SimpleNamespace, logged: list[str]
) -> None:
    progress = Progress(0, 100, 32)
    clock.seconds += 5
    progress.update()
    progress.report(1, {"a/loss": 1.0}, progress.measure(1))
    for _ in range(20):
        clock.seconds += 5
        progress.update()
    assert len(logged) == 1
    progress.close()
