"""Weights files: sha256, safetensors in and out. PyTorch's files: `pth`; NVIDIA's network pickles: `edm_pickle`."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from warm_jax.weights import archives


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_file(path: str | os.PathLike, expected: str, instructions: str) -> str:
    """The sha256 of `path`, beginning with `expected`; FileNotFoundError or ValueError that end with `instructions`."""
    if not Path(path).is_file():
        what = f"no weights at {path}{', which is a folder' if Path(path).is_dir() else ''}"
        raise FileNotFoundError(f"{what if path else 'no file of weights is given'}. {instructions}")
    digest = sha256(path)
    if not digest.startswith(expected):
        wrong = f"{path} has sha256 {digest}, expected {expected}…: truncated, or another file"
        raise ValueError(f"{wrong}. {instructions}")
    return digest


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Shaped[np.ndarray, "..."]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named arrays, and strings about them, in one piece or not at all. Of up to one string: equal bytes."""
    # The library writes what it finds in memory, whatever the strides say.
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    content = save(arrays, metadata=None if metadata is None else dict(metadata))
    archives.write_atomically(path, content)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings that a safetensors file says about its arrays; empty for anything else."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata; ValueError for a file that is cut short, or no safetensors at all."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
        return load(Path(path).read_bytes()), metadata or {}
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): cut short, or another format") from None
