"""Many processes as one: the only file that knows `jax.distributed`.

Small messages go through the key-value store of JAX's coordinator, which lives in process 0, so nothing here waits for
a device. A thread in each process looks there twice a second: a signal that came to one process is heard by all, and a
process that fails takes the others with it instead of leaving them to wait for it. So does one that hangs: each counts
there while it lives, and where process 0 sees one stand still for `HUNG_SECONDS`, or another process has as long no
answer from process 0, the job ends with one line that says so, before JAX finds it out and prints its stack.
"""

import collections
import json
import os
import pathlib
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable

from absl import logging

from warm_jax.runtime import door, preemption, rollcall

_LOOK_SECONDS = 0.4
_ACKNOWLEDGE_SECONDS = 60.0
_GRACE_SECONDS = 4.0  # for a process to end by itself when another has failed
HUNG_SECONDS = 30.0  # without a sign of life; JAX waits for longer
_JAX_SECONDS = 100
_KINDS = {kind.__name__: kind for kind in (ValueError, OSError, FileNotFoundError, InterruptedError)}


class _Pod:
    """What this process knows of the others."""

    def __init__(self, place: rollcall.Place, client):
        self.place, self.client = place, client
        self.asked: collections.Counter[str] = collections.Counter()
        self.stops: dict[str, int] = {}
        self.wrong = ""
        self.closing = threading.Event()
        self.silent = 0.0  # seconds since process 0 has answered
        self.first = place.hosts[0] if place.hosts else "its host"
        self.thread = threading.Thread(target=self._watch, name="pod", daemon=True)
        self.thread.start()
        if place.process:
            threading.Thread(target=self._guard, name="pod-guard", daemon=True).start()

    def key(self, name: str) -> str:
        """A key of its own for each call; all processes make the same calls in the same order."""
        self.asked[name] += 1
        return f"warm_jax/{name}/{self.asked[name]}"

    def put(self, key: str, value: str) -> None:
        """Stores a value; the first one stays."""
        try:
            self.client.key_value_set(key, value)
        except Exception as error:  # jaxlib's, which says the kind only in its text
            if "ALREADY_EXISTS" not in str(error):
                raise

    def get(self, key: str) -> str:
        """Waits for a value, for ever: where its maker is lost, this process is ended.

        ValueError where a process has found its input wrong, and so will not come.
        """
        while True:
            try:
                return self.client.blocking_key_value_get(key, 1_000)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                if self.wrong:
                    raise ValueError(self.wrong) from error

    def _watch(self) -> None:
        published, acknowledged, beats = False, set(), 0
        others = {number: _Pulse() for number in range(1, self.place.processes)}
        if not self.place.process:
            self.put("warm_jax/news/host", platform.node())
        while not self.closing.wait(_LOOK_SECONDS):
            try:
                if preemption.received() and not published:
                    self.put("warm_jax/news/signal", f"{preemption.received()} on process {self.place.process}")
                    published = True
                if self.place.process:
                    beats += 1
                    said = f"{beats} {platform.node()}"
                    self.client.key_value_set(f"warm_jax/alive/{self.place.process}", said, allow_overwrite=True)
                elif hung := self._hung(others):
                    self._end_all(hung)
                news = dict(self.client.key_value_dir_get("warm_jax/news/"))
                self.silent = 0.0
                self._hear(news, acknowledged)
            except Exception as error:
                if not self.closing.is_set() and "DEADLINE_EXCEEDED" not in str(error):
                    _leave_with(f"lost process 0 at {self.place.coordinator} ({_first_line(error)})")

    def _hear(self, news: dict[str, str], acknowledged: set[str]) -> None:
        for key, value in sorted(news.items(), key=lambda item: item[0].endswith("failed")):
            name = key.removeprefix("warm_jax/news/")
            if name == "signal":
                preemption.hear(door.shown(value))
            elif name.startswith("stop/") and key not in acknowledged:
                self.stops[name] = int(value)
                self.put(f"warm_jax/heard/{name}/{self.place.process}", "")
                acknowledged.add(key)
            elif name == "wrong":
                self.wrong = door.shown(value, 2000)
            elif name == "failed":
                self._follow(door.shown(value, 2000))
            elif name == "host":
                self.first = door.shown(value)
            elif name == "hung":
                _leave_with(door.shown(value))

    def _hung(self, others: dict[int, "_Pulse"]) -> str:
        """In process 0: which of the others has stood still for too long; empty where none has."""
        alive = dict(self.client.key_value_dir_get("warm_jax/alive/"))
        for number, pulse in others.items():
            if pulse.silent(alive.get(f"warm_jax/alive/{number}", "")) >= HUNG_SECONDS:
                host = pulse.said.partition(" ")[2] or "a host that never said its name"
                return f"process {number} on {door.shown(host)} has given no sign of life for {HUNG_SECONDS:g} s"
        return ""

    def _end_all(self, why: str) -> None:
        """In process 0, which keeps what the others have to read: it goes last."""
        self.put("warm_jax/news/hung", why)
        time.sleep(4 * _LOOK_SECONDS)
        _leave_with(why)

    def _guard(self) -> None:
        """Ends this process where process 0, for whose answer the other thread waits, gives none.

        Of a time in which this process was stopped itself, as a laptop that slept, little counts.
        """
        tick = HUNG_SECONDS / 30
        while not self.closing.wait(tick):
            self.silent += tick
            if self.silent >= HUNG_SECONDS:
                where = f"process 0 on {self.first} ({self.place.coordinator})"
                _leave_with(f"{where} has not answered for {HUNG_SECONDS:g} s")

    def _follow(self, what: str) -> None:
        """Another process has failed: the main thread may wait for it in a collective, so it is not asked."""
        if not self.closing.wait(_GRACE_SECONDS):
            try:
                self.put(f"warm_jax/gone/{self.place.process}", "")
            finally:
                _leave_with(what)


class _Pulse:
    """How long another process has said nothing new."""

    def __init__(self):
        self.said, self._seconds, self._looked = "", 0.0, time.monotonic()

    def silent(self, said: str) -> float:
        """Seconds since it said something new. Of a time in which this process was stopped itself, little counts."""
        now = time.monotonic()
        self._seconds = 0.0 if said != self.said else self._seconds + min(now - self._looked, 2.0)
        self.said, self._looked = said, now
        return self._seconds


def _leave_with(why: str) -> None:
    """Ends the process: the main thread may be in a collective, which waits for ever."""
    print(f"error: {why}; this process ends with it", file=sys.stderr, flush=True)
    os._exit(1)


_pod: _Pod | None = None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def count() -> int:
    """How many processes there are; asks no device."""
    return _pod.place.processes if _pod else 1


def index() -> int:
    """The number of this process; asks no device."""
    return _pod.place.process if _pod else 0


def start(place: rollcall.Place | None, facts: dict[str, object], seconds: float) -> None:
    """Makes this process one of a pod, before JAX has looked at any device. None: it stays alone.

    Raises as `rollcall.meet`: TimeoutError where a process is missing, ValueError where one has other `facts`.
    """
    global _pod
    if place is None:
        return
    rollcall.meet(place, facts, seconds)
    preemption.together()
    import jax
    from jax._src import distributed

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host, port = rollcall.address(place)
    here = door.LOOPBACK.get(host)  # of a job on one machine the port is not open to others
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=None if place.local_device is None else [place.local_device],
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(seconds)),
        coordinator_bind_address=here and (f"[{here}]:{port}" if ":" in here else f"{here}:{port}"),
        heartbeat_timeout_seconds=_JAX_SECONDS,
        shutdown_timeout_seconds=60,
    )
    _pod = _Pod(place, distributed.global_state.client)


def end(status: int, why: str = "") -> None:
    """Leaves the pod. With the exit status of a failure the process ends here, and the others soon after.

    It does not wait for them: they may wait for it, in a collective.
    """
    global _pod
    if _pod is None:
        return
    pod, _pod = _pod, None
    pod.closing.set()
    if status in (0, preemption.EXIT_AGAIN):
        import jax

        pod.thread.join(_GRACE_SECONDS)
        jax.distributed.shutdown()
        return
    try:
        pod.put("warm_jax/news/failed", f"process {pod.place.process} failed: {why}")
        pod.put(f"warm_jax/gone/{pod.place.process}", "")
        until = time.monotonic() + 2 * _GRACE_SECONDS
        # What the others have to read is kept by process 0: it goes last.
        for number in range(1, pod.place.processes if pod.place.process == 0 else 0):
            left = max(1, int(1000 * (until - time.monotonic())))
            pod.client.blocking_key_value_get(f"warm_jax/gone/{number}", left)
        time.sleep(0.5 if pod.place.process == 0 else 0)
    except Exception as error:
        logging.debug("leaving without the others: %s", error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# ── Agreement ────────────────────────────────────────────────────────────────────────────────────────────────────────


def gather(name: str, value: str) -> list[str]:
    """What each process says, by number, in all of them. All must call it, in the same order as other calls here."""
    if _pod is None:
        return [value]
    key = _pod.key(name)
    _pod.put(f"{key}/{_pod.place.process}", value)
    return [_pod.get(f"{key}/{number}") for number in range(_pod.place.processes)]


def from_first(name: str, make: Callable[[], str]) -> str:
    """What `make` returns in process 0, in all; what it raises there is raised in all."""
    if _pod is None:
        return make()
    key = _pod.key(name)
    if _pod.place.process == 0:
        try:
            answer = {"value": make()}
        except (ValueError, OSError) as error:
            kind = next(name for name, kind in reversed(_KINDS.items()) if isinstance(error, kind))
            _pod.put(key, json.dumps({"kind": kind, "error": str(error)}))
            raise
        _pod.put(key, json.dumps(answer))
        return answer["value"]
    answer = json.loads(_pod.get(key))
    if "error" in answer:
        raise _KINDS[answer["kind"]](answer["error"])
    return answer["value"]


def first_then_all(name: str, work: Callable[[], object]) -> None:
    """Process 0 does `work`, and no other goes on before it is done; what it raises there is raised in all."""

    def done() -> str:
        work()
        return ""

    from_first(name, done)


def all_or_none(name: str, error: Exception | None) -> None:
    """Raises in every process where one had an error: its own, or a ValueError that says whose.

    The others may be in another call of this file, waiting for this process: they are told there.
    """
    if error and _pod:
        _pod.put("warm_jax/news/wrong", f"process {_pod.place.process}: {_first_line(error)}")
    if error:
        raise error
    gather(name, "")


def check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError, in every process, where `folder` is not one and the same folder for all of them."""
    if _pod is None:
        return
    name = f".shared-{from_first('shared', lambda: secrets.token_hex(8))}"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()

    first_then_all("written", write)
    until, found = time.monotonic() + 10, False
    while not found and time.monotonic() < until:
        found = (folder / name).exists()
        time.sleep(0 if found else 0.2)  # a network file system may be late
    error = (
        None if found else ValueError(f"{folder} is not the folder that process 0 sees; it must be on a shared disk")
    )
    try:
        all_or_none("seen", error)
    finally:
        if _pod.place.process == 0:
            (folder / name).unlink(missing_ok=True)


class Stop:
    """After which step all processes stop when a signal has come to one of them: the same step in all.

    Process 0 names a step that no other can have passed, since a step needs all and none is more than `ahead` steps
    further than its devices; and it goes on when all have heard it, which they do while they wait for their devices.
    """

    def __init__(self, ahead: int):
        self._margin = ahead + 2
        self._name = _pod.key("stop").removeprefix("warm_jax/") if _pod else ""

    def reached(self, step: int) -> bool:
        """Whether `step`, which was just begun, is the last one."""
        if _pod is None:
            return bool(preemption.requested())
        if self._name not in _pod.stops and _pod.place.process == 0 and preemption.requested():
            _pod.put(f"warm_jax/news/{self._name}", str(step + self._margin))
            for number in range(1, _pod.place.processes):
                _pod.client.blocking_key_value_get(
                    f"warm_jax/heard/{self._name}/{number}", int(1000 * _ACKNOWLEDGE_SECONDS)
                )
            _pod.stops[self._name] = step + self._margin
        return step >= _pod.stops.get(self._name, step + 1)


def any_requested() -> bool:
    """Whether a signal has come to any process: the same answer in all, who must all ask."""
    return any(gather("requested", preemption.requested()))
