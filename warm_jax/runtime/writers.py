"""Files written by a few threads, while the devices make what comes next."""

import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))  # more contend for the interpreter; a disk behind a network waits


class Writers:
    """Threads that write one batch of files while the next one is made.

    At most one batch waits to be written. What a thread raises, as OSError of a full disk, is raised by the next
    `write` or `wait`, when all of the batch have ended.
    """

    def __init__(self) -> None:
        self._pool = futures.ThreadPoolExecutor(THREADS, thread_name_prefix="writer")
        self._writing: list[futures.Future] = []

    def write(self, save: Callable[..., None], files: Sequence[tuple[Any, ...]]) -> None:
        """Begins to call `save` with each of `files`, once the batch before is written."""
        self.wait()
        parts = (files[i::THREADS] for i in range(THREADS))
        self._writing = [self._pool.submit(_each, save, part) for part in parts if part]

    def wait(self) -> None:
        """Returns when all is written."""
        writing, self._writing = self._writing, []
        futures.wait(writing)
        for one in writing:
            one.result()


def _each(save: Callable[..., None], files: Sequence[tuple[Any, ...]]) -> None:
    for arguments in files:
        save(*arguments)
