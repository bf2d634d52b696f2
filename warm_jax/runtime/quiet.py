"""Libraries that print: of a failure that the program handles, its own line is enough."""

import logging
import pathlib
import sys
import threading
import types

from absl import logging as absl_logging


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """False for what Orbax logs: every detail, and of a disk that is full two hundred lines."""
    return "orbax" not in pathlib.PurePath(record.pathname).parts


def _of_thread(what: threading.ExceptHookArgs) -> None:
    """Of a library's thread, as TensorBoard's writer: who started it sees that it has failed, and says so."""
    told = (what.exc_type, what.exc_value, what.exc_traceback)
    absl_logging.info("in thread %s", what.thread and what.thread.name, exc_info=told)


def _of_any(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """In the main thread as always; TensorStore's threads print so that nobody waits for them any more."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, trace)
    else:
        absl_logging.info("in a thread of a library", exc_info=(kind, error, trace))


def _at_exit(what: "sys.UnraisableHookArgs") -> None:
    """What is closed at exit, as TensorBoard's files, or by the garbage collector: nobody is there to hear it."""
    absl_logging.info("while closing %s", what.object, exc_info=(what.exc_type, what.exc_value, what.exc_traceback))


def quiet() -> None:
    """From now on what libraries say of their own failures is seen only with --verbosity=0."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_handler().addFilter(_is_worth_telling)
    threading.excepthook, sys.excepthook, sys.unraisablehook = _of_thread, _of_any, _at_exit
