"""SLURM on this machine, for the tests.

Its daemons are children of this process, in one folder, without systemd or cgroups.

    with PrivateSlurm(Path("/tmp/lab")) as slurm:
        print(slurm.run("sbatch", "--wait", "job.sh").stdout)

Debian has them in slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "scancel",
    "sinfo",
    "setpriv",
)
START_S = 30
SOCKET_PATH_LENGTH = 107
"""Bytes that a Unix socket's path may have; hence the folder must be a short one."""

FOREIGN = (
    "SLURM",
    "SBATCH",
    "SRUN",
    "SUBMITIT",
    "MASTER_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
)
"""Beginnings of variables that belong to a job in which the tests themselves may run."""

CONFIG = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# Credentials expire after 5 s instead of 120: for so long a requeued job is held.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
{communication}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=60
SlurmdParameters=config_overrides
KillWait=20
# Ports of a job's process group follow from its number.
FirstJobId={first_job}
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL DefaultTime=10 MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


def program(name: str) -> str | None:
    """The path of the program; daemons are not on every user's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def why_not() -> str | None:
    """Why SLURM cannot run here, in one line; None = it can."""
    if missing := [name for name in PROGRAMS if program(name) is None]:
        return (
            f"SLURM is not installed (no {', '.join(missing)}): "
            "apt-get install slurmctld slurmd slurm-client munge"
        )
    try:  # as SLURM does: with 127.0.0.1 alone on the machine, that is no address
        socket.getaddrinfo(
            "127.0.0.1", 1, socket.AF_INET, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG
        )
    except OSError as error:
        return f"SLURM cannot resolve 127.0.0.1 ({error}): as root, ip addr add 127.0.0.2/8 dev lo"
    return None


def free_ports(num: int) -> list[int]:
    """Ports of this machine without a listener."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Returns as soon as the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


class PrivateSlurm:
    """A cluster whose nodes, 127.0.0.1 and so on, are all this machine.

    Each node has CPUs and GPUs that the machine does not have. Partition `main` is the default; a
    job in `urgent` preempts those in `main`, which have 20 s to leave and are requeued.

    Args:
        folder: An empty folder with a short name that everybody may enter (munged wants it so),
            not in pytest's tmp_path.
        num_nodes: Nodes.
        cpus, gpus: What each node pretends to have.
    """

    def __init__(self, folder: Path, *, num_nodes: int = 2, cpus: int = 4, gpus: int = 2) -> None:
        self.folder, self.cpus, self.gpus = folder.resolve(), cpus, gpus
        self.nodes = [f"127.0.0.{number + 1}" for number in range(num_nodes)]  # names that resolve
        self.env = {
            name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)
        }
        """Variables that make a process a client of this cluster and of no other."""
        self.env |= {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> PrivateSlurm:
        self._configure()
        try:
            key, socket_path = self.folder / "munge.key", self.folder / "munge.sock"
            places = [
                f"--key-file={key}",
                f"--socket={socket_path}",
                f"--pid-file={self.folder}/munged.pid",
            ]
            self._start(
                "munged",
                "-F",
                *places,
                f"--log-file={self.folder}/munged.log",
                f"--seed-file={self.folder}/munged.seed",
            )
            wait_until(lambda: self._alive() and socket_path.exists(), "munged's socket", START_S)
            self._start("slurmctld", "-D", "-c")
            for node in self.nodes:
                self._start("slurmd", "-D", "-N", node, name=f"slurmd-{node}")
            idle = ("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D")
            ready = f"{len(self.nodes)}"
            wait_until(
                lambda: self._alive() and self.run(*idle, check=False).stdout.strip() == ready,
                "idle nodes",
                START_S,
            )
        except BaseException as error:
            self.__exit__(None, None, None)
            raise RuntimeError(f"no SLURM: {error}\n{self.logs()}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            self.cancel_all()
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(
        self,
        *command: str | Path,
        cwd: Path | None = None,
        check: bool = True,
        timeout: float = 120,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a client of the cluster, such as sbatch or a command of ours.

        Args:
            env: Variables to add to the environment.

        Raises:
            RuntimeError: it fails, unless `check` is False; with all that it printed.
        """
        environment = {**self.env, **env}
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(map(str, command))} ended with {done.returncode}:\n"
                f"{done.stdout}{done.stderr}"
            )
        return done

    def jobs(self) -> list[dict[str, str]]:
        """Answers of `scontrol show job` for each job, also for jobs that ended."""
        shown = self.run("scontrol", "-o", "show", "job", check=False).stdout
        found = [dict(re.findall(r"(?:^| )([\w/:]+)=(\S*)", line)) for line in shown.splitlines()]
        return [job for job in found if "JobId" in job]

    def job(self, job_id: str) -> dict[str, str]:
        """The answer for one job, such as 12, or for a task of an array, such as 12_0."""
        for job in self.jobs():
            if job_id in (job["JobId"], f"{job.get('ArrayJobId')}_{job.get('ArrayTaskId')}"):
                return job
        raise LookupError(f"no job {job_id}")

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.job(job_id)["JobState"]

    def wait_for(self, job_id: str, *states: str, seconds: float = 60) -> None:
        """Returns when the job is in one of the states."""
        wait_until(
            lambda: self.state(job_id) in states, f"job {job_id} in {' or '.join(states)}", seconds
        )

    def cancel_all(self) -> None:
        """Cancels whatever is queued or runs, and waits until it is gone."""
        self.run("scancel", "--user", pwd.getpwuid(os.geteuid()).pw_name, check=False)
        wait_until(
            lambda: not self.run("squeue", "-h", check=False).stdout.strip(), "an empty queue"
        )

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(self._log_ends())

    def _log_ends(self) -> Iterator[str]:
        for file in sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out")):
            yield f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}"

    def _configure(self) -> None:
        if len(str(self.folder / "munge.sock")) > SOCKET_PATH_LENGTH:
            raise ValueError(f"{self.folder} is too long a path for a socket; choose one in /tmp")
        self.folder.chmod(0o711)
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        for number in range(self.gpus):  # a GPU is a character device whose name ends in a number
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n"
        )
        ports, host = free_ports(1 + len(self.nodes)), socket.gethostname().partition(".")[0]
        has = f"CPUs={self.cpus} RealMemory=8000 Gres=gpu:{self.gpus}"
        nodes = []
        for node, port in zip(self.nodes, ports[1:], strict=True):
            (self.folder / f"spool-{node}").mkdir()
            nodes.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {has}"
            )
        text = CONFIG.format(
            folder=self.folder,
            host=host,
            port=ports[0],
            user=pwd.getpwuid(os.geteuid()).pw_name,
            communication="CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"
            if _is_loopback(host)
            else "",
            first_job=random.randrange(1, 60_000),
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(text)

    def _start(self, daemon: str, *arguments: str, name: str | None = None) -> None:
        path = program(daemon)
        assert path is not None
        with (self.folder / f"{name or daemon}.out").open("ab") as out:
            # setpriv: a daemon must not outlive this process, however that ends.
            self._daemons[name or daemon] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", path, *arguments],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _alive(self) -> bool:
        if dead := [name for name, daemon in self._daemons.items() if daemon.poll() is not None]:
            raise RuntimeError(f"{', '.join(dead)} ended at once")
        return True


def _is_loopback(host: str) -> bool:
    """Whether 127.0.0.1 reaches daemons that listen only on the address of the machine's name."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False
