"""Signals: SIGTERM, SIGINT and SIGHUP ask a program to save and leave with status 75; a second one ends it at once.

The first is answered within moments, in one line on stderr. Python runs its handlers in the main thread, which may be
in a compiler for minutes; so a thread answers, woken by the signal itself (`signal.set_wakeup_fd`). What then happens
depends on where the program is: within `noted()` it asks `requested()` between its steps and stops by itself; within
`at_once()`, where nothing would be lost, the process leaves without waiting.
"""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: saved after a signal, and worth running again
NOTHING_BEGUN = "nothing was begun; the same command begins, or goes on from what is saved"

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_UNWIND_SECONDS = 3.0  # for the main thread to remove its temporary files
_received: list[str] = []
_heard: list[str] = []
_depth = 0
_whole_process = False  # whether `listen` was called
_alone = True  # False once there are other processes, which would wait for one that leaves
_texts: list[str] = []  # what is kept, where the process can leave at once; empty where it cannot
_answered = threading.Event()
_leaving = threading.Event()


def _note(number: int, frame: types.FrameType | None = None) -> None:
    """In the main thread; where nothing would be lost, unwinds it."""
    if not _received:
        _received.append(signal.Signals(number).name)
    if _leaves_at_once():
        _answered.wait(1.0)
        sys.exit(EXIT_AGAIN)


def _leaves_at_once() -> bool:
    return bool(_texts) and _whole_process and _alone


def _answer(source: int, terminals: tuple[int, ...]) -> None:
    """A thread of its own: says what the first signal leads to, and ends the process at the second."""
    count = 0
    while numbers := os.read(source, 64):
        for number in numbers:
            if number == 0:
                os.close(source)
                return
            if number not in _SIGNALS:  # some other library's
                continue
            count += 1
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                _close_terminals(terminals)
            if count > 1:
                _say(f"{name} again: this process ends at once; what is saved is whole")
                os._exit(EXIT_AGAIN)
            if not _received:
                _received.append(name)
            if not _leaves_at_once():
                _say(f"{name}: stopping after this step; again: at once")
            else:
                _say(f"{name}: {_texts[-1]}")
                _leaving.set()
                # At first there is nothing to remove, and imports make something else of what is raised in them.
                _leave_later(0.0 if _texts[-1] is NOTHING_BEGUN else _UNWIND_SECONDS)
            _answered.set()


def _leave_later(seconds: float) -> None:
    """The main thread may be in a compiler, or wait for other threads."""
    if not seconds:
        os._exit(EXIT_AGAIN)
    timer = threading.Timer(seconds, os._exit, [EXIT_AGAIN])
    timer.daemon = True
    timer.start()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # past Python's buffer, which another thread may hold
        os.write(2, f"{text}\n".encode())


def _close_terminals(terminals: tuple[int, ...]) -> None:
    """What is written to a terminal that was closed would raise: it goes to the null device."""
    gone = [number for number in terminals if not os.isatty(number)]
    if gone:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in gone:
            os.dup2(nowhere, number)
        os.close(nowhere)


def _install() -> tuple[list, int, int, threading.Thread]:
    """Handlers and the thread that answers; what `_uninstall` needs."""
    for before_this in (_received, _heard, _answered, _leaving):
        before_this.clear()
    source, target = os.pipe()
    os.set_blocking(target, False)
    terminals = tuple(number for number in (1, 2) if os.isatty(number))
    answering = threading.Thread(target=_answer, args=(source, terminals), name="signals", daemon=True)
    answering.start()
    wakeup = signal.set_wakeup_fd(target, warn_on_full_buffer=False)
    before = []
    for number in _SIGNALS:
        ignored = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN  # by nohup
        before.append((number, signal.getsignal(number) if ignored else signal.signal(number, _note)))
    return before, wakeup, target, answering


_forking = threading.local()


def _before_fork() -> None:
    """A signal to a child, before it has forgotten, would be written into its parent's pipe."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    """In a child that was forked: its signals are its own, and not its parent's."""
    if signal.getsignal(signal.SIGTERM) is _note:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def _uninstall(before: list, wakeup: int, target: int, answering: threading.Thread) -> None:
    for number, handler in before:
        signal.signal(number, handler)
    signal.set_wakeup_fd(wakeup)
    os.write(target, b"\0")
    answering.join(1.0)
    os.close(target)


def listen() -> None:
    """From now on signals are answered, to the end of the process. Until it is within `noted` it leaves at once."""
    global _whole_process
    if not _whole_process:
        _install()
        _whole_process = True
        _texts.append(NOTHING_BEGUN)


def together() -> None:
    """From now on there are other processes: this one stops only where all do, at a step that they agree on."""
    global _alone
    _alone = False


def leaving() -> bool:
    """Whether a signal has come within `at_once`, which unwinds the main thread with SystemExit."""
    return _leaving.is_set()


def finishing() -> None:
    """From now on signals change nothing: the process is about to end, with a status that is known."""
    if _whole_process:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Within, the first signal is noted, and a second one ends the process at once.

    Also a decorator. Where one is within another, the outer one counts: what came before the inner one is not
    forgotten. Only the main thread can do this; in another nothing changes.
    """
    global _depth, _texts
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    texts, _texts = _texts, []
    installed = _install() if _depth == 0 and not _whole_process else None
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        _texts = texts
        if installed:
            _uninstall(*installed)


@contextlib.contextmanager
def at_once(kept: str) -> Iterator[None]:
    """Within, the first signal ends the command, which says `kept`: what remains, and that it can be run again.

    For what takes long and would lose nothing, as compiling. Of one among several processes, and in a script or a
    notebook, the signal is only noted.
    """
    if received() and _whole_process:
        _answered.wait(1.0)  # by what was true when it came
    _texts.append(kept)
    try:
        if received() and _leaves_at_once():
            _say(f"{received()}: {kept}")
            sys.exit(EXIT_AGAIN)
        yield
    finally:
        _texts.pop()


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
