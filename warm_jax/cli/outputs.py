"""What each mode writes, and so must be alone to write."""

import contextlib
import pathlib

from warm_jax.cli import flags
from warm_jax.runtime import locks

_DEFAULTS = {"sample": "samples", "restore": "restored", "export": "export", "inspect": "inspect"}  # of the workdir
_TRAINED = ("config.json", "data.json", "init.json", "origin.json", "measured.npz", "parameters.txt", "metrics.jsonl")


def _converted() -> pathlib.Path | None:
    """The workdir that --mode=convert makes; None where it makes none."""
    given = flags.path(flags.FROM_EDM) or flags.path(flags.FROM_EXPORT)
    name = pathlib.Path(given).stem if flags.FROM_EDM.value else pathlib.Path(given).absolute().name
    return pathlib.Path(flags.path(flags.WORKDIR) or pathlib.Path("runs") / name) if given else None


def _output(mode: str, workdir: pathlib.Path) -> locks.Output | None:
    out = pathlib.Path(flags.path(flags.OUT)) if flags.OUT.value else None
    run = workdir if mode == "train" else _converted() if mode == "convert" else None
    if run is not None:
        return locks.file(run / "checkpoints", _TRAINED, (run / "grids",))
    if mode == "evaluate":  # beside a training too
        return locks.file(workdir / "evaluations", (), (workdir / "evaluations",))
    if mode == "analyze":
        return locks.file(workdir / "figures", ("report.html",), (workdir / "figures",))
    if mode == "compare":
        return locks.file(workdir / "compare.jsonl", ("compare.md", "compare.png"))
    if mode in _DEFAULTS:
        target = out or workdir / _DEFAULTS[mode]
        picture = target.suffix.lower() in (".png", ".jpg", ".jpeg")
        if mode == "restore" and picture and not target.exists():  # refused, before a lock would make such a folder
            return None
        return locks.file(target) if mode == "sample" and target.suffix in (".npz", ".png") else locks.folder(target)
    if mode in ("prepare", "stats", "convert") and out is not None:
        return locks.file(out)
    return None


def lock(held: contextlib.ExitStack, mode: str, workdir: pathlib.Path) -> OSError | None:
    """Locks what `mode` writes until `held` ends; an error where nothing can be written there, for whoever checks that.

    Raises locks.HeldError where another process writes there.
    """
    output = _output(mode, workdir)
    try:
        if output is not None:
            held.enter_context(locks.writing(output, mode))
    except locks.HeldError:
        raise
    except OSError as error:
        return error
    return None
