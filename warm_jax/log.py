"""Where a run's numbers go: lines for people, `metrics.jsonl` for programs, TensorBoard files for its viewer."""

import json
import math
import pathlib
import sys

import jax
import tensorboardX
from tqdm import tqdm


def say(text: str) -> None:
    """Prints lines above any progress bar, from the first process only."""
    if jax.process_index() == 0:
        if sys.stderr.isatty():
            tqdm.write(text)
        else:
            print(text, flush=True)


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
        rows = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [row for row in rows if row.endswith("\n") and not _is_later(row, start_step)]
        part = path.with_name(".metrics.jsonl.part")
        part.write_text("".join(kept))
        part.replace(path)
        self._path = path
        self._board = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start_step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends one row."""
        if self._path is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no nan
        with self._path.open("a") as lines:  # and closed: only then a bucket, mounted by FUSE, has the row
            lines.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes everything."""
        if self._board is not None:
            self._board.close()


def _is_later(row: str, step: int) -> bool:
    """Whether a row is of a later step; one that somebody else wrote stays."""
    try:
        return json.loads(row)["step"] > step
    except (ValueError, KeyError, TypeError):
        return False
