"""Commands that run: how benchmarks/torture.py starts, signals and outlives them."""

import collections
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "benchmarks" / "torture_program.py"
FINE, BAD = ("survived", "refused"), ("lost", "silent", "hung", "failed")
LONG = 240.0  # seconds that an undisturbed command may take on a busy machine


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a trial: one of `FINE` or `BAD`, or "skipped", and why."""

    what: str
    why: str = ""


class TrialError(Exception):
    """Ends a trial with a verdict of `BAD`."""

    def __init__(self, what: str, why: str):
        super().__init__(why)
        self.verdict = Verdict(what, why)


@dataclasses.dataclass
class Process:
    """A command that runs: its number, its exit status when it has ended, and what it has said."""

    pid: int
    arguments: list[str]
    log: pathlib.Path
    began: float
    status: int | None = None
    ended: float = 0.0
    mebibytes: int = 0  # of memory at most, where it was forked
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    def said(self, stream: str = "err") -> str:
        """What stands on stderr, or with "out" on stdout."""
        path = self.log.with_suffix(f".{stream}")
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def send(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if not self.done.is_set():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def listens(self) -> bool:
        """Whether it handles SIGTERM by now; False also where it has ended."""
        try:
            text = pathlib.Path(f"/proc/{self.pid}/status").read_text("utf-8")
        except OSError:
            return False
        caught = text.partition("SigCgt:")[2].split()
        return bool(caught) and bool(int(caught[0], 16) >> (signal.SIGTERM - 1) & 1)

    def end(self, seconds: float, what: str = "") -> int:
        """The exit status; `TrialError` "hung" where it is still there after so many seconds, and then it is killed."""
        if not self.done.wait(seconds):
            where = _stack(self.pid)
            self.send(signal.SIGKILL)
            self.done.wait(30)
            raise TrialError("hung", f"still alive {seconds:.0f} s after {what or 'its start'}{where}")
        return self.status

    def errors(self) -> list[str]:
        """The lines on stderr that begin with error:."""
        return [line for line in self.said().splitlines() if line.startswith("error:")]


def _stack(pid: int) -> str:
    """In which kernel functions its threads wait; empty where that cannot be read."""
    try:
        waits = [(task / "wchan").read_text("utf-8") for task in pathlib.Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return ""
    return f" ({len(waits)} threads: {dict(collections.Counter(waits))})"


class Runner:
    """Starts commands of the program, any number at a time; `cache` is the folder of compiled programs."""

    def __init__(self, cache: pathlib.Path):
        self._idle: list[subprocess.Popen] = []
        self._all: list[subprocess.Popen] = []
        self._lock = threading.Lock()
        self.environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }

    def start(
        self,
        folder: pathlib.Path,
        arguments: list[str],
        log: str = "",
        new: bool = False,
        script: bool = False,
        **more: str,
    ) -> Process:
        """A command in `folder`, whose streams go to `folder`.logs.

        Args:
          folder: Where it runs.
          arguments: Of the program; with `script` of Python, a script and its own.
          log: The name of its logs.
          new: Whether a new Python is started.
          script: Whether it is no command of the program.
          more: Of the environment.
        """
        log = log or arguments[-1].strip("-").partition("=")[0]
        logs = folder.with_name(folder.name + ".logs")
        logs.mkdir(exist_ok=True)
        path = logs / f"{len(list(logs.glob('*.err')))}_{log}"
        with (logs / "commands.txt").open("a", encoding="utf-8") as file:
            line = [sys.executable, *([] if script else [str(PROGRAM)]), *arguments]
            file.write(f"cd {folder} && PYTHONPATH={ROOT} {shlex.join(line)}\n")
        if new or script:
            return self._new(folder, line, path, self.environment | more)
        return self._fork(folder, arguments, path, self.environment | more)

    def _new(self, folder: pathlib.Path, line: list[str], path: pathlib.Path, environment: dict) -> Process:
        with (
            path.with_suffix(".out").open("w", encoding="utf-8") as out,
            path.with_suffix(".err").open("w", encoding="utf-8") as error,
        ):
            started = subprocess.Popen(
                line,
                cwd=folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=error,
                start_new_session=True,
            )
        process = Process(started.pid, line, path, time.monotonic())
        threading.Thread(target=_await, args=(process, started.wait), daemon=True).start()
        return process

    def _fork(self, folder: pathlib.Path, arguments: list[str], path: pathlib.Path, environment: dict) -> Process:
        server = self._server()
        path.with_suffix(".err").touch()
        asked = {"arguments": arguments, "folder": str(folder), "environment": environment}
        asked |= {"out": str(path.with_suffix(".out")), "error": str(path.with_suffix(".err"))}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        process = Process(int(server.stdout.readline()), arguments, path, time.monotonic())

        def wait() -> int:
            status, most = server.stdout.readline().split()
            process.mebibytes = int(most) // 1024
            self._idle.append(server)
            return int(status)

        threading.Thread(target=_await, args=(process, wait), daemon=True).start()
        return process

    def _server(self) -> subprocess.Popen:
        """One that has no child; it is started where all have one."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        server = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            env=os.environ | self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is for the benchmark alone
        )
        if server.stdout.readline() != "ready\n":
            raise RuntimeError(f"{PROGRAM} does not start")
        self._all.append(server)
        return server

    def close(self) -> None:
        """Ends the servers."""
        for server in self._all:
            server.kill()
            server.wait()


def _await(process: Process, wait: Callable[[], int]) -> None:
    process.status = wait()
    process.ended = time.monotonic()
    process.done.set()
