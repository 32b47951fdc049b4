"""Processes that begin in milliseconds: forks of one that has imported PyTorch and this package, and computed nothing.

A process of its own is what the tests of kills, signals and locks need; the seconds that its imports take are not. So
one server a test session imports all there is and waits, and forks a process for each that is asked for. Each runs a
program in a session of its own, with the environment and the folder of whoever asked. That `python -m metaheed` begins
as it should is held by tests which begin it so (tests/test_cli.py).

    server   forks a keeper for each request, and waits for the next
    keeper   forks the process, reports its number, waits for its end, and reports its status
    process  runs the program
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

ROOT = Path(__file__).parents[1]
COMMAND_LINE = "import sys\nfrom metaheed.cli.entry import main\nsys.exit(main(sys.argv[1:]))\n"
"""The program that `python -m metaheed` runs."""
SERVER = "METAHEED_TEST_SERVER"
"""The environment variable that names the server's socket, for processes that begin others."""


IMPORTED = (
    *("metaheed.cli.entry", "metaheed.running.train", "metaheed.running.evaluate", "metaheed.running.speed"),
    *("metaheed.studies.search", "metaheed.studies.reproduce", "metaheed.studies.report", "tests.networks"),
    *("metaheed.headless", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "sqlalchemy.dialects.sqlite"),
    "torch._dynamo",  # torch.func imports it when it first takes a gradient
)
"""What the server imports: all that a command does."""


class WarmProcess:
    """A process that the server has forked; used as a `subprocess.Popen` whose output goes to two files.

    Args:
        arguments: of the command line, or of the program.
        server: path of the server's socket; the environment's if None.
        program: Python source that is run as the main module.
        before: Python source that is run ahead of it.
        environment: of the process; this one's if None.
        folder: where it works; this process's if None.
        output, errors: paths of the files for its standard output and standard error, or open files' numbers.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        server: str | None = None,
        program: str = COMMAND_LINE,
        before: str = "",
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        output: Path | int,
        errors: Path | int,
    ) -> None:
        self.returncode: int | None = None
        self._output, self._errors = output, errors
        request = {
            "arguments": [str(argument) for argument in arguments],
            "program": before + program,
            "environment": dict(os.environ if environment is None else environment),
            "folder": str(folder or Path.cwd()),
        }
        mine, theirs = os.pipe()
        given = [open_to_write(output), open_to_write(errors), theirs]
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(server or os.environ[SERVER])
            socket.send_fds(connection, [b"x"], given)
            connection.sendall(json.dumps(request).encode())
        for number, where in zip(given, (output, errors, None), strict=True):
            if not isinstance(where, int):
                os.close(number)
        self._reports = mine
        self._read = b""
        while b"\n" not in self._read:
            self._look(None)
        self.pid = int(self._read.split(b"\n")[0])

    def _look(self, timeout: float | None) -> bool:
        if not select.select([self._reports], [], [], timeout)[0]:
            return False
        found = os.read(self._reports, 100)
        assert found, "the process's keeper is gone"
        self._read += found
        return True

    def poll(self) -> int | None:
        """The status of its end, or None if it goes on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its status, negative for a signal."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            if not self._look(None if until is None else max(0.0, until - time.monotonic())):
                assert timeout is not None
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            ended = self._read.split(b"\n")
            if len(ended) == 3:
                self.returncode = int(ended[1])
                os.close(self._reports)
        return self.returncode

    def communicate(self, timeout: float | None = 120) -> tuple[str, str]:
        """Wait for its end; what it wrote."""
        self.wait(timeout)
        return self.out, self.err

    @property
    def out(self) -> str:
        """What it has written to its standard output."""
        assert isinstance(self._output, Path)
        return self._output.read_text()

    @property
    def err(self) -> str:
        """What it has written to its standard error."""
        assert isinstance(self._errors, Path)
        return self._errors.read_text()

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)


class WarmStage(WarmProcess):
    """What `metaheed reproduce` begins for a stage, in the place of its `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], *, stdout: IO[bytes], **_: object) -> None:
        assert list(arguments[:4]) == [sys.executable, "-P", "-m", "metaheed"]
        super().__init__(
            arguments[4:],
            environment={**os.environ, "PYTHONSAFEPATH": "1"},
            output=stdout.fileno(),
            errors=stdout.fileno(),
        )


def begin_stages_warm(replace: Callable[[str, object], None] | None = None) -> None:
    """Let `metaheed reproduce` in this process begin its stages by the server.

    Args:
        replace: as pytest's monkeypatch.setattr, which takes it back; for good if None.
    """
    from metaheed.studies.reproduce import crew

    module = SimpleNamespace(Popen=WarmStage, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    if replace is None:
        vars(crew)["subprocess"] = module
    else:
        replace("metaheed.studies.reproduce.crew.subprocess", module)


def open_to_write(where: Path | int) -> int:
    return where if isinstance(where, int) else os.open(where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def wait_for(condition: Callable[[], object], *processes: Any, seconds: float = 120) -> None:
    """Wait until the condition holds, or a process has ended."""
    until = time.monotonic() + seconds
    while not condition() and all(process.poll() is None for process in processes):
        assert time.monotonic() < until
        time.sleep(0.01)


def start_server(folder: Path) -> tuple["subprocess.Popen[bytes]", str]:
    """Start a server, which ends when its standard input is closed; it, and the path of its socket."""
    path = str(folder / "socket")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.warm import serve; exec(serve())", path],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process, path


def serve() -> str:
    """Serve until standard input ends. In each process that is forked, return the program that it is to run."""
    for name in IMPORTED:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("sqlalchemy.dialects.postgresql.psycopg")
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen(64)
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([listening.fileno(), 0], [], [])
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # keepers that have ended
                    pass
            if listening.fileno() not in ready:
                return ""
            connection, _ = listening.accept()
            with connection:
                _, given, _, _ = socket.recv_fds(connection, 1, 3)
                parts = iter(lambda: connection.recv(1 << 16), b"")  # noqa: B023  # read here and now
                request = json.loads(b"".join(parts))
            if os.fork() == 0:
                break
            for number in given:
                os.close(number)
    return _kept(request, *given)


def _kept(request: dict[str, Any], output: int, errors: int, reports: int) -> str:
    pid = os.fork()
    if pid:
        os.close(output)
        os.close(errors)
        with contextlib.suppress(BrokenPipeError):  # who asked for the process may have been killed
            os.write(reports, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):
            os.write(reports, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, place in ((nothing, 0), (output, 1), (errors, 2)):
        os.dup2(number, place)
    for number in {nothing, output, errors, reports} - {0, 1, 2}:
        os.close(number)
    # Those of the server were made for another kind of file.
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # type: ignore[misc]  # noqa: SIM115
        2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["metaheed", *request["arguments"]]
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, request["folder"])
    program: str = request["program"]
    return program
