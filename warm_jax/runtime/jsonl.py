"""Files of rows, a JSON object a line: appended to whole, and read past what is torn or foreign.

A process that was killed can leave half a row, and a disk a byte that is no UTF-8. A row that is appended then begins a
line of its own, and whoever reads leaves out what is no row and says so once: file, line and reason.
"""

import json
import pathlib

from warm_jax.runtime import log
from warm_jax.weights import archives


def append(path: pathlib.Path, row: dict[str, object]) -> None:
    """Adds one row at the end, on a line of its own. OSError, naming the file, where the disk is full."""
    archives.append_line(path, json.dumps(row))


def parse(line: bytes) -> dict:
    """The object in a line. ValueError where it holds none."""
    try:
        row = json.loads(line.decode())
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    return row


def read(path: pathlib.Path, needed: tuple[str, ...] = ()) -> list[dict]:
    """The rows that have all keys `needed`, in order; none where there is no file. One warning names what is no row."""
    found, wrong = [], []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = parse(line)
            if not set(needed) <= row.keys():
                raise ValueError(f"no {', '.join(key for key in needed if key not in row)}")
            found.append(row)
        except ValueError as error:
            wrong.append(f"{path}, line {number} is no row ({error})")
    if wrong:
        more = f"; nor are {len(wrong) - 1} more lines" if len(wrong) > 1 else ""
        log.warn(f"{wrong[0]}{more}; left out. Remove what is damaged to be rid of this warning")
    return found
