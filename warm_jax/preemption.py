"""Signals: SIGTERM and SIGINT ask a program to save and leave; it asks here, between steps, whether one has come."""

import signal
import types

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: saved after a signal, and worth running again

_received: list[str] = []


def install() -> None:
    """Notes the first SIGTERM or SIGINT; a second one ends the process at once, as if this had never been called."""
    _received.clear()

    def note(number: int, frame: types.FrameType | None) -> None:
        _received.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def requested() -> str:
    """The name of the signal that came, or an empty string."""
    return _received[0] if _received else ""
