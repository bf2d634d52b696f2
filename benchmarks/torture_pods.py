"""Trials of jobs of two processes: one that is killed, stopped or signalled, and strangers at the door."""

import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import random
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable

from torture_kills import AGAIN, Bench, wait_for_a_moment
from torture_processes import LONG, Process, TrialError, Verdict
from torture_products import Products, common, differing, made
from torture_scene import COMMANDS

_TRAIN = COMMANDS["train"]
_SEES_SECONDS = 60.0  # until a process that lives has seen that another does not


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Job:
    """A training of two processes on the loopback interface."""

    def __init__(self, bench: Bench, folder: pathlib.Path):
        self._bench, self._folder, self.port = bench, folder, _free_port()
        self.token = secrets.token_hex(16)
        self.processes: list[Process] = []

    def start(self, number: int) -> Process:
        """Process `number` of it."""
        where = [f"--coordinator=localhost:{self.port}", "--processes=2", f"--process={number}", "--start_seconds=60"]
        flags = self._bench.runner.environment["XLA_FLAGS"]
        for name in ("timeout", "call_terminate_timeout"):  # cores are few, and one may be late without being dead
            flags += f" --xla_cpu_collective_{name}_seconds=600"
        more = {"WARM_JAX_TOKEN": self.token, "XLA_FLAGS": flags}
        process = self._bench.runner.start(self._folder, [*_TRAIN.arguments, *where], f"process{number}", **more)
        self.processes.append(process)
        return process

    def both(self) -> "Job":
        """The same, with both processes started."""
        for number in (0, 1):
            self.start(number)
        return self

    def end(self, seconds: float, what: str) -> list[int]:
        """The statuses. `TrialError` "hung" where one does not end in so many seconds."""
        until, hung = time.monotonic() + seconds, None
        for process in self.processes:
            try:
                process.end(max(0.1, until - time.monotonic()), what)
            except TrialError as error:
                hung = error
        if hung:
            raise hung
        return [process.status for process in self.processes]

    def result(self, what: str) -> Products:
        """What it made, of a job that must end well."""
        statuses = self.end(LONG, what)
        if statuses != [0, 0]:
            said = [(process.errors() or process.said().splitlines() or [""])[-1][:200] for process in self.processes]
            raise TrialError("lost", f"{what}: statuses {statuses}: {said}")
        return made(self._folder, _TRAIN.results)


_computing = threading.Lock()


def _expected(bench: Bench) -> tuple[Products, float]:
    """What two undisturbed jobs both make, and the seconds that one takes."""
    with _computing:
        note = bench.scene.folder / "pod.json"
        if not note.exists():
            found = []
            for _ in range(2):
                folder, began = bench.scene.begin(bench.scene.folder / "pod", *_TRAIN.needs), time.monotonic()
                found.append(Job(bench, folder).both().result("an undisturbed job"))
            note.write_text(
                json.dumps({"products": common(*found), "seconds": time.monotonic() - began}, indent=1), "utf-8"
            )
        kept = json.loads(note.read_text("utf-8"))
        return kept["products"], kept["seconds"]


def host(bench: Bench, rng: random.Random, folder: pathlib.Path, what: str) -> Verdict:
    """One of two hosts is killed, stopped or signalled; both end, and the same job goes on to the same bytes."""
    expected, seconds = _expected(bench)
    bench.scene.begin(folder, *_TRAIN.needs)
    job, chosen = Job(bench, folder).both(), rng.randrange(2)
    said = f"{what} to host {chosen} {wait_for_a_moment(job.processes[chosen], folder, seconds, rng)}"
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(what) or rng.choice((signal.SIGTERM, signal.SIGINT))
    ready = all(process.listens() for process in job.processes)
    ended = job.processes[chosen].done.is_set()
    job.processes[chosen].send(number)
    if what == "stop":  # the other one must not wait for it for ever
        job.processes[1 - chosen].end(_SEES_SECONDS + bench.patience, said)
        job.processes[chosen].send(signal.SIGKILL)
    statuses = job.end(_SEES_SECONDS + bench.patience, said)
    if what == "signal" and ready and not set(statuses) <= {0, AGAIN}:
        errors = [line for process in job.processes for line in process.errors()]
        return Verdict("failed", f"{said}: statuses {statuses}: {errors}")
    other = job.processes[1 - chosen]
    aborts = (
        what == "kill" and chosen == 0
    )  # JAX in the others, where its coordinator has gone: by a message of its own
    if what != "signal" and not (ended or aborts) and other.status != 0 and not other.errors():
        return Verdict("failed", f"{said}: status {other.status} of the other without a line of error:")
    wrong = differing(Job(bench, folder).both().result(f"{said}, statuses {statuses}; the next job"), expected)
    return Verdict("lost", f"{said}: {wrong}") if wrong else Verdict("survived", f"{said}, statuses {statuses}")


# ── Strangers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _message(token: str, challenge: bytes, text: bytes) -> bytes:
    """What a process says that has the token, as runtime/door.py describes it."""
    code = hmac.new(token.encode(), b" ".join((b"other", challenge, b"n", text)), hashlib.sha256)
    return code.hexdigest().encode() + b" n " + text + b"\n"


def _says(process: int, name: str = "stranger") -> bytes:
    return json.dumps({"process": process, "host": name, "facts": {}}).encode()


class Stranger:
    """Somebody who reaches the port of process 0, and the time in which he may do something."""

    def __init__(self, port: int, token: str, rng: random.Random):
        self.port, self.token, self.rng = port, token, rng
        self.over = threading.Event()  # the job has met: what comes now would come to JAX
        self.kept: list[socket.socket] = []

    def comes(self) -> tuple[socket.socket, bytes]:
        """A connection, and the number that process 0 says to it."""
        connection = socket.create_connection(("localhost", self.port), timeout=5)
        greeting = connection.recv(300).split()
        if greeting and greeting[0] != b"warm_jax":  # JAX has opened the port: the processes have met
            self.over.set()
        return connection, greeting[-1] if greeting else b""

    def again(self, say: Callable[[socket.socket, bytes], None], pause: float = 0.05) -> None:
        """Comes again and again, says something and goes."""
        while not self.over.is_set():
            with contextlib.suppress(OSError):
                connection, challenge = self.comes()
                with connection:
                    if self.over.is_set():
                        return
                    connection.settimeout(0.5)
                    say(connection, challenge)
                    connection.recv(100)
            time.sleep(pause)

    def says(self, text: bytes, token: str = "") -> None:
        """Comes again and again with `text`, coded with a token."""
        self.again(lambda connection, challenge: connection.sendall(_message(token, challenge, text)))

    def slow(self) -> None:
        """Twenty connections, on each a byte every two milliseconds."""
        for _ in range(20):
            self.kept.append(self.comes()[0])
        while not self.over.is_set():
            for connection in self.kept:
                with contextlib.suppress(OSError):
                    connection.send(b"a")
            time.sleep(0.002)

    def silent(self) -> None:
        """Three hundred connections that say nothing."""
        for _ in range(300):
            with contextlib.suppress(OSError):
                self.kept.append(self.comes()[0])
        self.over.wait()

    def replay(self) -> None:
        """What process 1 said on another connection, with its code."""
        heard = _message(self.token, self.comes()[1], _says(1))
        self.again(lambda connection, challenge: connection.sendall(heard))

    def reset(self) -> None:
        """Closed before anything was said, in the rudest way."""

        def say(connection: socket.socket, challenge: bytes) -> None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()

        self.again(say, 0.002)


ATTACKS: dict[str, Callable[[Stranger], None]] = {
    "garbage": lambda s: s.again(lambda c, _: c.sendall(s.rng.randbytes(4096) + b"\n")),
    "deep JSON": lambda s: s.says(b"[" * 200_000, s.token),
    "slow bytes": Stranger.slow,
    "silent connections": Stranger.silent,
    "wrong process number": lambda s: s.says(_says(99), s.token),
    "replay": Stranger.replay,
    "wrong token": lambda s: s.says(_says(1), s.token[::-1]),
    "no token": lambda s: s.says(_says(1)),
    "oversize": lambda s: s.again(lambda c, _: c.sendall(b"a" * 10_000_000)),
    "escapes": lambda s: s.says(_says(1, "\x1b[2J\x1b]0;x\x07\nerror: "), s.token[::-1]),
    "early close": Stranger.reset,
    "HTTP": lambda s: s.again(lambda c, _: c.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")),
    "TLS": lambda s: s.again(lambda c, _: c.sendall(b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + os.urandom(198))),
}


def attacked(bench: Bench, rng: random.Random, folder: pathlib.Path, name: str) -> Verdict:
    """A stranger is at the door before process 1 comes, and while it does; the job ends as an undisturbed one."""
    expected, _ = _expected(bench)
    bench.scene.begin(folder, *_TRAIN.needs)
    job = Job(bench, folder)
    first, until = job.start(0), time.monotonic() + LONG
    while not first.done.is_set() and time.monotonic() < until:
        with contextlib.suppress(OSError):
            socket.create_connection(("localhost", job.port), timeout=1).close()
            break
        time.sleep(0.05)
    stranger = Stranger(job.port, job.token, rng)

    def attack() -> None:
        with contextlib.suppress(OSError):
            ATTACKS[name](stranger)

    thread = threading.Thread(target=attack, daemon=True)
    thread.start()
    time.sleep(rng.uniform(0.5, 3.0))
    second = job.start(1)
    while not second.done.is_set() and "data: " not in second.said("out") + first.said("out"):
        # It goes on while process 1 looks for process 0, and stops before JAX opens the same port.
        if time.monotonic() - second.began > 3.0:
            break
        time.sleep(0.02)
    stranger.over.set()
    thread.join(10)
    found = job.result(name)
    for connection in stranger.kept:
        connection.close()
    if any("\x1b[2J" in process.said() + process.said("out") for process in job.processes):
        return Verdict("failed", "the escapes of a stranger came through")
    wrong = differing(found, expected)
    return Verdict("lost", wrong) if wrong else Verdict("survived")
