"""An hour of fleet training with random kills, killed workers and unreadable images.

    python tests/soak.py [MINUTES]

A quiet run and a disturbed one of the same length are trained on tar shards of the digits, some of
which are damaged. The disturbed one is killed, or one of its workers is, at random instants, and
started again. In the end both must have written the same; the quiet one's memory and file
descriptors, sampled all the time, must not grow.
"""

from __future__ import annotations

import io
import os
import random
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image

from seed_exp.data.digits import DigitsSource

FAULT_EVERY_S = 60.0
PATIENCE_S = 120.0
STEPS_PER_MINUTE = 400


def write_shard(path: Path, num_bad: int) -> None:
    """The digits as a tar shard in which some images are cut in the middle."""
    source, dice = DigitsSource("train"), random.Random(0)
    bad = set(dice.sample(range(len(source)), num_bad))
    with tarfile.open(path, "w") as shard:
        for index in range(len(source)):
            buffer = io.BytesIO()
            Image.fromarray(source.image(index).permute(1, 2, 0).numpy()).save(buffer, "PNG")
            content = buffer.getvalue()[: 60 if index in bad else None]
            for suffix, data in (
                ("png", content),
                ("cls", str(int(source.labels[index])).encode()),
            ):
                member = tarfile.TarInfo(f"{index:05d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def command(home: Path, run: str, steps: int) -> list[str]:
    """Trains two students with MoCo-V2."""
    data = [
        "data=shards",
        f"data.root={home}/train-0000.tar",
        "data.val_fraction=0.1",
        "data.num_workers=1",
    ]
    small = [
        "student=[convnet_w2,convnet_w32]",
        "views=digits",
        "views.crops.global.num=2",
        "moco.queue_size=512",
        "batch_size=32",
    ]
    often = [
        "tracker=files",
        "batch_size=32",
        "checkpoint_every=50",
        "log_every=10",
        "eval_every=5",
        "device=cpu",
        f"steps={steps}",
        f"run_dir={home / run}",
    ]
    return [sys.executable, "-m", "seed_exp.pretrain", *data, *small, *often, "optimizer.lr=0.06"]


def children(pid: int) -> list[int]:
    """Processes that it has started."""
    with suppress(OSError):
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    return []


def usage(pid: int) -> tuple[float, int] | None:
    """Resident MiB and open file descriptors."""
    with suppress(OSError, StopIteration, ValueError):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
        return resident / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return None


def slope_per_hour(samples: list[tuple[float, float]]) -> float:
    """Growth per hour of values over seconds."""
    return 3600 * statistics.linear_regression(*zip(*samples, strict=True)).slope


def quiet(line: list[str]) -> None:
    """Runs the command; prints the course of memory and descriptors in its second half.

    By then everything is in place.
    """
    process, born = (
        subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
        time.monotonic(),
    )
    samples: list[tuple[float, float, int]] = []
    while process.poll() is None:
        time.sleep(1)
        if (used := usage(process.pid)) is not None:
            samples.append((time.monotonic() - born, *used))
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, line)
    half = samples[len(samples) // 2 :]
    memory = slope_per_hour([(at, resident) for at, resident, _ in half])
    descriptors = slope_per_hour([(at, float(open_files)) for at, _, open_files in half])
    first, last = half[0], half[-1]
    print(
        f"seconds {first[0]:.0f} to {last[0]:.0f}: "
        f"memory {first[1]:.0f} -> {last[1]:.0f} MiB ({memory:+.1f} MiB/h),"
    )
    print(f"  file descriptors {first[2]} -> {last[2]} ({descriptors:+.1f}/h)")


def disturbed(line: list[str], log: Path, dice: random.Random) -> dict[str, int]:
    """Runs the command until it has finished, with faults; returns how many of each."""
    faults = {"kill": 0, "worker": 0, "term": 0}
    while True:
        with log.open("ab") as output:
            process = subprocess.Popen(line, stdout=output, stderr=output)
        born = time.monotonic()
        # Now and then it may live long enough for a leak to show.
        doom = born + dice.choice([0.3, 1, 5]) * FAULT_EVERY_S * dice.random()
        while process.poll() is None and time.monotonic() < doom:
            time.sleep(1)
        if process.poll() is not None:
            if process.returncode == 0:
                break
            faults["worker"] += 1  # it noticed that its worker was gone
            continue
        fault = dice.choice(["kill", "kill", "worker", "term"])
        workers = children(process.pid)
        if fault == "worker" and workers:
            with suppress(ProcessLookupError):
                os.kill(dice.choice(workers), signal.SIGKILL)
            process.wait(timeout=PATIENCE_S)
        else:
            process.send_signal(signal.SIGTERM if fault == "term" else signal.SIGKILL)
            process.wait(timeout=PATIENCE_S)
        faults[fault] += 1
    return faults


def main() -> None:
    """Prints what happened; exit status 1 if the two runs differ."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    steps = max(100, round(minutes * STEPS_PER_MINUTE))
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_shard(home / "train-0000.tar", num_bad=7)
        began = time.monotonic()
        quiet(command(home, "quiet", steps))
        print(f"quiet run: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        began = time.monotonic()
        faults = disturbed(command(home, "disturbed", steps), home / "log", random.Random(0))
        print(f"disturbed run: {time.monotonic() - began:.0f} s, {faults}")
        same = True
        for file in (
            "metrics.jsonl",
            "students/convnet_w2.safetensors",
            "students/convnet_w32.safetensors",
        ):
            equal = (home / "quiet" / file).read_bytes() == (home / "disturbed" / file).read_bytes()
            same &= equal
            print(f"{file}: {'identical' if equal else 'DIFFERENT'}")
        bad = len((home / "disturbed" / "bad_samples.jsonl").read_text().splitlines())
        print(f"bad samples listed: {bad}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
