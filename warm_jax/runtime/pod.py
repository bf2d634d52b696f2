"""Many processes as one: that they begin and end together, and agree.

Small messages go through the key-value store of JAX's coordinator, which lives in process 0, so nothing here waits for
a device. `coordinator.py` starts it; `peers.py` watches the other processes.
"""

import json
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Callable

from absl import logging

from warm_jax.runtime import coordinator, peers, preemption, rollcall

_ACKNOWLEDGE_SECONDS = 60.0
_KINDS = {kind.__name__: kind for kind in (ValueError, OSError, FileNotFoundError, InterruptedError)}


_pod: peers.Peers | None = None


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
    _pod = peers.Peers(place, coordinator.connect(place, seconds))


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
        pod.thread.join(peers.GRACE_SECONDS)
        coordinator.leave()
        return
    try:
        pod.put("warm_jax/news/failed", f"process {pod.place.process} failed: {why}")
        pod.put(f"warm_jax/gone/{pod.place.process}", "")
        until = time.monotonic() + 2 * peers.GRACE_SECONDS
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
        _pod.put("warm_jax/news/wrong", f"process {_pod.place.process}: {peers.first_line(error)}")
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
