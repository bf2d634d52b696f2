"""Signals: SIGTERM and SIGINT ask a program to save and leave; it asks here, between steps, whether one has come."""

import contextlib
import signal
import threading
import types
from collections.abc import Iterator

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: saved after a signal, and worth running again

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received: list[str] = []
_heard: list[str] = []
_depth = 0


def _note(number: int, frame: types.FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
    for either in _SIGNALS:
        signal.signal(either, signal.SIG_DFL)


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Within, the first SIGTERM or SIGINT is noted, and a second one ends the process at once.

    Also a decorator. Where one is within another, the outer one counts: what came before the inner one is not
    forgotten. Only the main thread can do this; in another nothing changes.
    """
    global _depth
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _depth == 0:
        _received.clear()
        _heard.clear()
        before = [signal.signal(number, _note) for number in _SIGNALS]
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            for number, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(number, handler)


def received() -> str:
    """The name of the signal that came to this process, or an empty string."""
    return _received[0] if _received else ""


def hear(what: str) -> None:
    """Notes that a signal came to another process: "SIGTERM on process 3"."""
    if not _heard:
        _heard.append(what)


def requested() -> str:
    """The signal that came, here or to another process, or an empty string."""
    return received() or (_heard[0] if _heard else "")
