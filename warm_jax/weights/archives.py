"""Files of numbers that are there whole or not at all: atomic writing, and npz archives that notice their damage.

An npz of `write_npz` begins with an array `sha256`, of the names, types, shapes and bytes of all others. A zip checks
each member's bytes by CRC-32, but not its directory: a flipped bit there can name, order or drop members. Files of
other programs, and of versions that wrote no digest, are read without.
"""

import errno
import hashlib
import io
import os
import secrets
import shutil
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

# What numpy, zipfile and json raise on files that are cut, altered or something else.
DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
DIGEST = "sha256"
LEFTOVER = r"\.(?P<name>.+)\.[0-9a-f]{8}(\.part)?"  # what a killed process leaves of an atomic write


def write_atomically(path: str | os.PathLike, content: bytes, sync: bool = False) -> None:
    """The file is there whole, or as it was; with `sync` also after a power failure.

    OSError, naming the file, where the disk is full.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # of its own, on any host
    try:
        with part.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:  # SystemExit too, which a signal raises
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise no_room(path, error) from error
        raise


def append_line(path: str | os.PathLike, text: str) -> None:
    """Adds a line at the end of a file, also after one that is torn. OSError, naming it, where the disk is full."""
    path, line = Path(path), text.encode() + b"\n"
    try:
        # Opened and closed for each line: only then a bucket, mounted by FUSE, has it.
        with path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                line = b"\n" + line
            file.write(line)
    except OSError as error:
        raise no_room(path, error) from error


def no_room(path: Path, error: OSError) -> OSError:
    """`error`, or of a full disk one that names `path`, what is free and what to do."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    free = shutil.disk_usage(path.parent).free / 2**20
    why = "the disk is full" if error.errno == errno.ENOSPC else "the quota is used up"
    return OSError(
        f"{path} cannot be written: {why} ({free:,.1f} MiB are free there); make room and give the same command again, "
        "which goes on, or write elsewhere"
    )


def _digest(arrays: dict[str, Shaped[np.ndarray, "..."]]) -> str:
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def npz_bytes(**arrays: Shaped[np.ndarray, "..."]) -> bytes:
    """The content of an npz of these arrays and their digest."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    content = io.BytesIO()
    # First in the file: a directory that was cut short keeps it.
    np.savez(content, **{DIGEST: np.asarray(_digest(arrays))}, **arrays)
    return content.getvalue()


def write_npz(path: str | os.PathLike, **arrays: Shaped[np.ndarray, "..."]) -> None:
    """An npz that is there whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, npz_bytes(**arrays), sync=True)


def read_npz(path: str | os.PathLike, without: tuple[str, ...] = ()) -> dict[str, Shaped[np.ndarray, "..."]]:
    """All arrays of an npz, pickled ones refused; ValueError, naming it, for a file that is damaged or no npz.

    Arrays that are called as one of `without` are not read, empty ones are in their place, and a digest is not checked.
    """
    with Path(path).open("rb") as stream:
        try:
            with np.load(stream, allow_pickle=False) as file:
                arrays = {name: np.empty(0) if name in without else file[name] for name in file.files}
                expected, whole = arrays.pop(DIGEST, None), not set(without) & arrays.keys()
                if expected is not None and whole and str(expected) != _digest(arrays):
                    raise ValueError("its arrays are not those that were written")
        except (*DAMAGED, OSError) as error:
            raise ValueError(f"{path} is not a readable npz file: {error!r}") from error
    return arrays
