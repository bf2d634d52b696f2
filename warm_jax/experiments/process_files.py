"""A process from a file of the user's own: Python code that is run, by design, where the user's config names it.

One that only the `config.json` of a workdir names may be somebody else's: it is refused until the user names it, too.

The file defines

    make(image_shape, power) -> warm_jax.diffusion.process.Process

from (height, width, channels) and the data's mean DCT power `[height, width]`, float64, which is 1 everywhere as long
as nothing has been measured. What it raises, or gives that is no process, is a line that names the file.
"""

import hashlib
import pathlib

import numpy as np
from jaxtyping import UInt8

from warm_jax.diffusion import soundness
from warm_jax.diffusion.bnr import Power
from warm_jax.diffusion.process import Process
from warm_jax.experiments import config_files
from warm_jax.runtime import workdirs


def _find(file: str | None) -> pathlib.Path:
    if not file:
        raise ValueError("process.file is unset; name the file of your process with --config.process.file=FILE.py")
    if file.startswith(workdirs.UNSEEN):
        name = file.removeprefix(workdirs.UNSEEN)
        raise ValueError(
            f"this run's process is code in {name}, which would be run; look at it, and then name it with "
            f"--config.process.file={name} (warm_jax.load: process_file)"
        )
    path = pathlib.Path(file)
    if not path.is_file():
        raise ValueError(f"process.file is {file}, and no such file is there; its path is from the working directory")
    return path.resolve()


def digest(file: str | None) -> UInt8[np.ndarray, "32"]:
    """SHA-256 of the file."""
    return np.frombuffer(hashlib.sha256(_find(file).read_bytes()).digest(), np.uint8)


def load(
    file: str | None, image_shape: tuple[int, int, int], power: Power, trained: UInt8[np.ndarray, "32"] | None
) -> Process:
    """The process of a file, checked by `soundness`; `trained` is the `digest` that a run was begun with.

    ValueError, in one line, where there is no such file, it was changed since, it raises, or is unsound.
    """
    path = _find(file)
    if trained is not None and not np.array_equal(digest(file), trained):
        raise ValueError(f"{file} is not what this run was trained with; restore it, or begin another run")
    try:
        make = config_files.read(path).get("make")
        if not callable(make):
            raise soundness.UnsoundError("this file defines no make(image_shape, power)")
        process = make(image_shape, np.asarray(power, np.float64))
        soundness.check(process, image_shape)
    except soundness.UnsoundError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # whatever a file of Python may raise
        raise ValueError(f"{file}: {config_files.why(error, path)}") from error
    return process
