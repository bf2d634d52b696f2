"""Where a run's numbers go: lines for people, `metrics.jsonl` for programs, TensorBoard files for its viewer."""

import json
import math
import pathlib
import sys
import threading

import jax
import tensorboardX
from tqdm import tqdm

from warm_jax.runtime import letters
from warm_jax.weights import archives


def say(text: str) -> None:
    """Prints lines above any progress bar, from the first process only."""
    if jax.process_index() == 0:
        text = letters.printable(text)
        if sys.stderr.isatty():
            tqdm.write(text)
        else:
            print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning to stderr, from every process: each may have its own trouble."""
    where = f" (process {jax.process_index()})" if jax.process_count() > 1 else ""
    tqdm.write(f"WARNING{where}: {letters.printable(text)}", file=sys.stderr)


class _Lines:
    """What a progress bar writes to where nobody watches, as lines."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, *, initial: int = 0, unit: str, doing: str) -> tqdm:
    """A progress bar with rate and time left, from the first process only; in a file, a line every ten seconds."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=doing,
        disable=jax.process_index() != 0,
        file=sys.stderr if watched else _Lines(),
        mininterval=0.2 if watched else 10,
        ncols=None if watched else 80,
    )


class Log:
    """Scalars by step, to `metrics.jsonl` and `tb/` of a workdir.

    Args:
      workdir: An existing folder.
      start_step: Numbers of later steps, left by a run that was cut off, are dropped: they will come again.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        self._path = self._board = None
        if jax.process_index() != 0:
            return
        path = workdir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and not _is_later(line, start_step)]
        unreadable = [number for number, line in enumerate(lines, 1) if _step(line) is None]
        if unreadable:
            said = ", ".join(map(str, unreadable[:5])) + (", …" if len(unreadable) > 5 else "")
            warn(f"{path}: no numbers of a step in line {said}; what ends in the middle is dropped, the rest stays")
        archives.write_atomically(path, b"".join(kept))
        self._path = path
        before = set(threading.enumerate())
        # A queue for more than a row: where it is full, and its thread died of a full disk, one would wait for ever.
        self._board = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start_step + 1, max_queue=1000)
        self._threads = set(threading.enumerate()) - before

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends one row; warns where the disk is full, since numbers are not worth a run."""
        if self._path is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no nan
        try:
            archives.append_line(self._path, json.dumps({"step": step, **finite}))
        except OSError as error:
            warn(f"step {step}: {self._path} cannot be written ({error.strerror or error})")
        if self._board and not all(thread.is_alive() for thread in self._threads):
            warn(f"step {step}: no more is written to tb/: its writer has failed")
            self._board = None
        for name, value in scalars.items() if self._board else ():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes everything."""
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                warn(f"the last numbers of tb/ are lost ({error.strerror})")


def _step(line: bytes) -> int | None:
    """The step of a row; None where it is none: cut off, damaged, or somebody else's."""
    try:
        step = json.loads(line.decode())["step"]
        return step if isinstance(step, int) else None
    except archives.DAMAGED:
        return None


def _is_later(line: bytes, step: int) -> bool:
    """Whether a row is of a later step; one that somebody else wrote stays."""
    found = _step(line)
    return found is not None and found > step
