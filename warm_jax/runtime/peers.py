"""The other processes of a pod: messages by the key-value store of JAX's coordinator, and whether they live.

A thread in each process looks there twice a second: a signal that came to one process is heard by all, and a process
that fails takes the others with it instead of leaving them to wait for it. So does one that hangs: each counts there
while it lives, and where process 0 sees one stand still for `HUNG_SECONDS`, or another process has as long no answer
from process 0, the job ends with one line that says so, before JAX finds it out and prints its stack.
"""

import collections
import os
import platform
import sys
import threading
import time

from warm_jax.runtime import door, preemption, rollcall

_LOOK_SECONDS = 0.4
GRACE_SECONDS = 4.0  # for a process to end by itself when another has failed
HUNG_SECONDS = 30.0  # without a sign of life; JAX waits for longer


class Peers:
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
                    leave_with(f"lost process 0 at {self.place.coordinator} ({first_line(error)})")

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
                leave_with(door.shown(value))

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
        leave_with(why)

    def _guard(self) -> None:
        """Ends this process where process 0, for whose answer the other thread waits, gives none.

        Of a time in which this process was stopped itself, as a laptop that slept, little counts.
        """
        tick = HUNG_SECONDS / 30
        while not self.closing.wait(tick):
            self.silent += tick
            if self.silent >= HUNG_SECONDS:
                where = f"process 0 on {self.first} ({self.place.coordinator})"
                leave_with(f"{where} has not answered for {HUNG_SECONDS:g} s")

    def _follow(self, what: str) -> None:
        """Another process has failed: the main thread may wait for it in a collective, so it is not asked."""
        if not self.closing.wait(GRACE_SECONDS):
            try:
                self.put(f"warm_jax/gone/{self.place.process}", "")
            finally:
                leave_with(what)


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


def leave_with(why: str) -> None:
    """Ends the process: the main thread may be in a collective, which waits for ever."""
    print(f"error: {why}; this process ends with it", file=sys.stderr, flush=True)
    os._exit(1)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
