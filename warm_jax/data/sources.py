"""One string says where the images are: `bundled`, `idx:PATH`, …"""

import pathlib

from warm_jax.data import idx
from warm_jax.data.arrays import Source

__all__ = ["Source", "open_source"]

_KINDS = ("bundled", "idx:PATH")


def open_source(
    spec: str, *, image_size: int | tuple[int, int] | None = None, channels: int | None = None, on_error: str = "raise"
) -> Source:
    """The images that `spec` names.

    With `image_size` (one side, or height and width) or `channels` the images must have just that: nothing is resized
    here. A broken image raises ValueError, or with `on_error="skip"` is left out, and counted and named in a warning
    and in `.skipped`.
    ValueError or OSError, in one line, for anything that is not there or not right.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"data.on_error is {on_error!r}; it must be 'raise' or 'skip'")
    source = _open(spec)
    _check_shape(source, image_size, channels)
    return source


def _open(spec: str) -> Source:
    kind, _, path = spec.partition(":")
    if spec == "bundled":
        return idx.bundled()
    if not path:
        raise ValueError(f"no such data source: {spec!r}; it must be one of {', '.join(_KINDS)}")
    if kind == "idx":
        return idx.open_idx(pathlib.Path(path).expanduser())
    raise ValueError(f"no such kind of data source: {spec!r}; it must be one of {', '.join(_KINDS)}")


def _check_shape(source: Source, image_size: int | tuple[int, int] | None, channels: int | None) -> None:
    height, width, depth = source.image_shape
    wanted = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size or (height, width))
    prepare = f"python -m warm_jax.main --mode=prepare --images={source.spec} --out=FILE.zip"
    if (height, width) != wanted:
        raise ValueError(
            f"{source.spec}: images are {height}×{width}, not data.image_size {wanted[0]}×{wanted[1]}; "
            f"resize them once: {prepare}"
        )
    if channels not in (None, depth):
        raise ValueError(
            f"{source.spec}: images have {depth} channels, not data.channels {channels}; convert them once: {prepare}"
        )
