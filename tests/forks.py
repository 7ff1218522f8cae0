"""Commands of the package in processes of their own, without the seconds that imports take.

`Popen` and `run` are those of `subprocess` for lines that begin with `sys.executable`. One process
per process of tests has imported what the commands need; it forks for each line. The line has the
same arguments, environment, working directory, signals and exit status as with `subprocess`. A test
of what is imported, of how memory grows, or of variables that are read at import uses `subprocess`.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMANDS = (
    *("seed_exp.training.distillation", "seed_exp.training.pretraining", "seed_exp.config.command"),
    *("seed_exp.protocols.knn", "seed_exp.protocols.linear", "matplotlib.pyplot"),
)
"""Modules that are imported once; others are imported by the lines that need them."""
LIBRARIES = ("torch", "timm", "safetensors.torch")
"""The same for lines that load exported files, and cannot import the package."""
_START = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import forks; forks.serve()"
_servers: dict[tuple[int, tuple[str, ...]], tuple[subprocess.Popen[bytes], socket.socket]] = {}


def run(
    command: Sequence[Any],
    *,
    imported: tuple[str, ...] = COMMANDS,
    timeout: float | None = None,
    check: bool = False,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` of a line that begins with `sys.executable`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, imported=imported, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` of a line that begins with `sys.executable`.

    It is no child of this process: `_ended` tells how it ended.
    """

    _ended: int = -1

    def __init__(
        self, command: Sequence[Any], *, imported: tuple[str, ...] = COMMANDS, **options: Any
    ) -> None:
        self._imported = imported
        super().__init__(command, **options)

    def _execute_child(self, *values: Any) -> None:
        parameters = inspect.signature(subprocess.Popen._execute_child).parameters
        given = dict(zip(list(parameters)[1:], values, strict=True))
        python, *arguments = (os.fsdecode(word) for word in given["args"])
        assert python == sys.executable
        request = {
            "arguments": arguments,
            "cwd": os.path.realpath(given["cwd"] or "."),
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "new_session": given["start_new_session"],
        }
        theirs = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        self._ended, status = os.pipe()
        server = _connection(self._imported)
        fds = [own if fd == -1 else fd for own, fd in enumerate(theirs)]
        socket.send_fds(server, [json.dumps(request).encode()], [*fds, status])
        os.close(status)
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[pipe] for pipe in pipes))  # those of the other side
        self.pid = int(server.recv(100))
        self._child_created = True

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(os.read(self._ended, 100) or -signal.SIGKILL)
            os.close(self._ended)
        return self.returncode


def _connection(imported: tuple[str, ...]) -> socket.socket:
    """The connection to the process that forks, which starts with the first call."""
    key = os.getpid(), imported
    if key not in _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-c", _START, str(theirs.fileno()), *imported]
            _servers[key] = subprocess.Popen(command, pass_fds=[theirs.fileno()]), ours
    return _servers[key][1]


def serve() -> None:
    """Forks for each request; returns in a process that has run the request's line."""
    for name in sys.argv[2:]:
        __import__(name)
    gc.freeze()  # a collection would copy the memory of all objects into each process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets who has ended
    connection = socket.socket(fileno=int(sys.argv[1]))
    while True:
        request, fds, *_ = socket.recv_fds(connection, 1 << 20, 4)
        if not request:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            *standard, status = fds
            line = os.fork()
            if line == 0:
                connection.close()
                os.close(status)
                _become(json.loads(request), standard)
                return
            for fd in {*standard, 0, 1, 2}:
                os.close(fd)
            connection.send(str(line).encode())
            connection.close()
            ended = os.waitstatus_to_exitcode(os.waitpid(line, 0)[1])
            os.write(status, str(ended).encode())
            os._exit(0)
        for fd in fds:
            os.close(fd)


def _become(request: Mapping[str, Any], standard: Sequence[int]) -> None:
    """Runs the line in this process, as Python does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["new_session"]:
        os.setsid()
    for number, fd in enumerate(standard):
        os.dup2(fd, number)
    for fd in standard:
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    what, *arguments = request["arguments"]
    if what == "-B":
        sys.dont_write_bytecode = True
        what, *arguments = arguments
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if what == "-m":
        name, *arguments = arguments
        sys.path[:] = [str(Path.cwd()), *places, *sys.path]
        sys.argv = [name, *arguments]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif what == "-c":
        code, *arguments = arguments
        sys.path[:] = ["", *places, *sys.path]
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[:] = [str(Path(what).resolve().parent), *places, *sys.path]
        sys.argv = [what, *arguments]
        runpy.run_path(what, run_name="__main__")
