"""Trainings and tools under random hardship: each must go on, and end as an undisturbed one does.

    python tests/attack.py [MINUTES [SEED]]

An attack starts a command at random (a fleet with teacher cache and evaluations, convert, embed,
export) and lets something happen to it at a random instant: a kill, a stop, a full disk, a disk
that can only be read, little memory, or the same command beside it. Unless the command has
succeeded all the same, it is then typed again. The attack has failed, and the exit status is 1, if

- a command that did not succeed says so otherwise than in one line, the last one;
- the command that was typed again does not succeed, or hangs;
- names or content of the files differ from those that the command makes undisturbed.

Everything that an attack draws comes from its SEED, which its line begins with: a failed one is
repeated by `python tests/attack.py 0 SEED`. Disks are mounted, which only root can.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disks import FailingDisk, call, fill
from soak import write_shard

DISK_MIB = 64
PATIENCE_S = 300.0
"""Seconds after which a command hangs; a full disk is waited for during one minute."""

DATA = ["data=shards", "data.val_fraction=0.1"]
TRAINING = [
    *DATA,
    "device=cpu",
    "data.num_workers=1",
    "views=digits",
    "tracker=files",
    "batch_size=32",
]
TRAINING += ["log_every=5", "knn_bank_size=200", "knn_query_size=100"]
EVALUATIONS = '["knn ks=[5]","linear views=linear_digits epochs=1 lrs=[1]"]'


@dataclass(frozen=True)
class Subject:
    """A command that is attacked."""

    name: str
    words: list[str]
    """With {home} for the folder that it reads and writes, {given} for one that it reads."""
    results: tuple[str, ...]
    """Patterns of the files that must be the same, byte for byte; of all others the names."""


IMAGES = [*DATA, "data.root={home}/train-0000.tar"]
SUBJECTS = [
    Subject(
        "distill",
        [
            *(*TRAINING, "data.root={home}/train-0000.tar", "student=[convnet_w2,convnet_w32]"),
            *("teacher=run", "teacher.checkpoint={given}/teacher", "teacher_cache={home}/cache"),
            *("objective.queue_size=128", "steps=90", "eval_every=1", "checkpoint_every=5"),
            *("run_dir={home}/run", f"evaluations={EVALUATIONS}"),
        ],
        ("**/metrics.jsonl", "**/*.safetensors", "**/bad_samples.jsonl", "**/index.json"),
    ),
    Subject("convert", [*IMAGES, "to=image_folder", "output={home}/out"], ("out/**/[!.]*",)),
    Subject(
        "embed",
        [
            *(*IMAGES, "run={given}/teacher", "output={home}/out.npz", "gallery={home}/out.html"),
            *("duplicates=0.9", "device=cpu"),
        ],
        ("out*",),
    ),
    Subject(
        "export",
        [*IMAGES, "run={given}/teacher", "formats=[torch_export]", "output={home}/out"],
        ("out/**/*",),
    ),
]


class Process:
    """A command of the package that runs."""

    def __init__(self, command: str, words: list[str]) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        line = [sys.executable, "-m", f"seed_exp.{command}", *words]
        self._process = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=self._said, start_new_session=True
        )
        self.pid = self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to it and its workers, if it is still there."""
        if self._process.poll() is None:
            os.killpg(self.pid, number)

    def running(self, seconds: float) -> bool:
        """Whether it still runs when these seconds have passed."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def worked(self, seconds: float = float("inf")) -> float:
        """Waits until it has computed for so long, or has ended; returns seconds of CPU time.

        They do not depend on how busy the machine is.
        """
        total = 0.0
        while self.running(0.02) and total < seconds:
            with suppress(OSError):
                words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
                total = sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")
        return total

    def ended(self) -> tuple[int, str]:
        """Exit status and what it said; waits for it."""
        if self.running(PATIENCE_S):
            self.send(signal.SIGKILL)
            self._process.wait()
            return 1, f"nothing for {PATIENCE_S:.0f} s"
        self._said.seek(0)
        return self._process.returncode, self._said.read()


@dataclass(frozen=True)
class Scene:
    """Everything that a hardship may use."""

    disk: FailingDisk
    """That of the command's files."""
    dice: random.Random
    start: Callable[[], Process]
    moment: float
    """Seconds of the command's CPU time before the hardship."""

    def begun(self) -> Process:
        """The command at that moment; it may have ended before."""
        process = self.start()
        process.worked(self.moment)
        return process


def kill(scene: Scene) -> list[Process]:
    process = scene.begun()
    process.send(signal.SIGKILL)
    return [process]


def stop(scene: Scene) -> list[Process]:
    process = scene.begun()
    process.send(signal.SIGSTOP)
    time.sleep(scene.dice.uniform(0.1, 5))
    process.send(signal.SIGCONT)
    return [process]


def two(scene: Scene) -> list[Process]:
    first = scene.start()
    first.worked(scene.dice.choice([0, 0.1, 1]) * scene.moment)
    return [first, scene.start()]


def memory(scene: Scene) -> list[Process]:
    """It may take a little more than it has at that moment, or nothing."""
    process = scene.begun()
    if process.running(0):
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + scene.dice.choice([0, 1, 20, 200]) * 2**20
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return [process]


def full(scene: Scene) -> list[Process]:
    process = scene.begun()
    ballast = fill(scene.disk.folder, leave=scene.dice.choice([0, 1, 10, 100]) << 10)
    wait_for_end_or_relief(process, scene.dice)
    ballast.unlink()
    return [process]


def read_only(scene: Scene) -> list[Process]:
    """Nothing new can be opened to write, for a while; the kernel protects what is open."""
    process, place = scene.begun(), scene.disk.folder
    aside = place.with_name("read_only")
    aside.mkdir(exist_ok=True)
    call("mount", "--bind", place, aside)
    call("mount", "-o", "remount,bind,ro", aside)  # refused where a file is being written
    call("mount", "--bind", aside, place)
    call("umount", aside)
    wait_for_end_or_relief(process, scene.dice)
    call("umount", "--lazy", place)
    return [process]


def failing(scene: Scene) -> list[Process]:
    """Nothing can be written until the command has ended."""
    process = scene.begun()
    scene.disk.fail()
    process.ended()
    scene.disk.repair()
    return [process]


def wait_for_end_or_relief(process: Process, dice: random.Random) -> None:
    process.running(dice.choice([1, 15, PATIENCE_S]))


HARDSHIPS = (kill, stop, two, memory, full, read_only, failing)


class Attacks:
    """Attacks in a folder of their own.

    Args:
        base: An empty folder.
    """

    def __init__(self, base: Path) -> None:
        self._home, self._given = base / "home", base / "given"
        self._image = base / "disk"
        self._given.mkdir()
        write_shard(self._given / "train-0000.tar", num_bad=7)
        os.environ |= {"SEED_CACHE": str(base / "cache"), "OMP_NUM_THREADS": "1"}
        root = f"data.root={self._given}/train-0000.tar"
        words = [*TRAINING, root, "student=convnet_w32", "moco.queue_size=128", "steps=20"]
        self._succeed("pretrain", [*words, f"run_dir={self._given}/teacher"])
        self._quiet: dict[str, tuple[float, dict[str, str]]] = {}

    def attack(self, seed: int) -> tuple[str, str, list[str]]:
        """Makes one attack; returns its kind, what happened, and what was wrong."""
        dice = random.Random(seed)
        subject, hardship = dice.choice(SUBJECTS), dice.choice(HARDSHIPS)
        seconds, expected = self._undisturbed(subject)
        # Late rather than early: half of a short command is imports.
        moment = dice.triangular(0, 1, 0.8) * seconds
        with self._new_disk() as disk:
            scene = Scene(disk, dice, lambda: self._start(subject), moment)
            ends = [process.ended() for process in hardship(scene)]
            wrong = [fault for end in ends if (fault := fault_of(hardship, *end)) is not None]
            if all(status != 0 for status, _ in ends):
                ends.append(self._start(subject).ended())
                # Killed after its last step: what it made is there, and is not overwritten.
                if ends[-1][0] != 0 and "exists already" not in ends[-1][1]:
                    wrong.append(f"typed again: {ends[-1]}")
            wrong += differences(expected, self._results(subject))
        happened = ", then ".join(in_words(*end) for end in ends)
        return (
            hardship.__name__,
            f"{subject.name} at {moment:.1f} of {seconds:.1f} s: {happened}",
            wrong,
        )

    def _undisturbed(self, subject: Subject) -> tuple[float, dict[str, str]]:
        """Seconds of CPU time and results of the command, which is run for them once."""
        if subject.name not in self._quiet:
            with self._new_disk():
                seconds = self._succeed(subject.name, self._words(subject))
                self._quiet[subject.name] = seconds, self._results(subject)
        return self._quiet[subject.name]

    @contextmanager
    def _new_disk(self) -> Iterator[FailingDisk]:
        """A disk with nothing but the images."""
        disk = FailingDisk(self._home, self._image, DISK_MIB)
        try:
            shutil.copy2(self._given / "train-0000.tar", self._home)
            call("sync", "--file-system", self._home)  # a failing disk takes nothing afterwards
            yield disk
        finally:
            disk.remove()

    def _words(self, subject: Subject) -> list[str]:
        places = {"{home}": str(self._home), "{given}": str(self._given)}
        words = subject.words
        for name, place in places.items():
            words = [word.replace(name, place) for word in words]
        return words

    def _start(self, subject: Subject) -> Process:
        return Process(subject.name, self._words(subject))

    def _succeed(self, command: str, words: list[str]) -> float:
        process = Process(command, words)
        seconds = process.worked()
        status, said = process.ended()
        if status != 0:
            raise RuntimeError(f"{command} fails undisturbed: {said}")
        return seconds

    def _results(self, subject: Subject) -> dict[str, str]:
        """Checksum of each result, and "" of each other file."""
        files = {path for path in self._home.rglob("*") if path.is_file()}
        # The older of the two that are kept may be an earlier one: a run goes on while its disk
        # takes nothing.
        files -= set(sorted(self._home.glob("run/checkpoints/*.pt"))[-2:-1])
        compared = files & {path for each in subject.results for path in self._home.glob(each)}
        return {
            str(path.relative_to(self._home)): (
                hashlib.sha256(path.read_bytes()).hexdigest() if path in compared else ""
            )
            for path in files
            if not path.name.endswith(".index.npy")  # without room it is kept in SEED_CACHE
        }


def fault_of(hardship: Callable[..., Any], status: int, said: str) -> str | None:
    """What is wrong with a command's end: an error that is not one line; None if nothing is."""
    lines = said.strip().splitlines()
    errors = [line for line in lines if line.startswith("error")]
    if status == 0 or (status < 0 and hardship in (kill, memory)):
        return None
    # Libraries that get no memory while they are loaded end in errors of all kinds.
    is_loading = hardship is memory and "<frozen importlib" in said
    is_clear = "Traceback" not in said and errors == lines[-1:]
    return None if is_loading or is_clear else f"status {status}: {said}"


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    both = sorted(expected.keys() & found.keys())
    return wrong + [f"{name} differs" for name in both if expected[name] != found[name]]


def in_words(status: int, said: str) -> str:
    if status < 0:
        return signal.Signals(-status).name
    return "succeeded" if status == 0 else (said.strip().splitlines() or [""])[-1]


def main() -> None:
    """Attacks until the time is over, at least once; prints a line for each, and how many."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    deadline = time.monotonic() + 60 * minutes
    made: Counter[str] = Counter()
    failed = []
    with tempfile.TemporaryDirectory() as base:
        attacks = Attacks(Path(base))
        while not made or time.monotonic() < deadline:
            kind, happened, wrong = attacks.attack(seed)
            print(f"{seed} {kind}, {happened}: {'FAILED' if wrong else 'as undisturbed'}")
            print("".join(f"    {line}\n" for line in "\n".join(wrong).splitlines()), end="")
            sys.stdout.flush()
            made[kind] += 1
            failed += [seed] if wrong else []
            seed += 1
    print(f"{made.total()} attacks: {dict(made)}; failed: {failed or 'none'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
