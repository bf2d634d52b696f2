"""The end of the process: within seconds of its last word, whatever its threads do."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

from warm_jax.runtime import preemption

SECONDS = 6.0  # for threads, and what is registered with atexit, to come to an end


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """When its body ends, by whatever it raises, the process ends with that status within `SECONDS`.

    Python waits for every thread before it ends. One that waits for a disk, or for something that was never begun, as
    the writers of a checkpoint that failed, would keep the process for ever.
    """
    status = 0
    try:
        yield
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        raise
    except BaseException as error:
        if preemption.leaving():  # a library has made something else of SystemExit
            status = preemption.EXIT_AGAIN
            raise SystemExit(status) from error
        status = 1
        raise
    finally:
        preemption.finishing()
        threading.Thread(target=_end, args=(status,), name="ending", daemon=True).start()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a closed pipe or terminal
                stream.flush()


def _end(status: int) -> None:
    time.sleep(SECONDS)
    os._exit(status)
