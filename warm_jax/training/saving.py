"""Saving while training: all processes or none, and a full disk ends no run."""

from collections.abc import Callable

from warm_jax.runtime import checkpoint, log, pod
from warm_jax.training.step import State, to_store

LOST = "each later checkpoint is tried; until one is saved, what came since the last is lost if the run ends"
NOTHING_LOST = "nothing of it is lost; what --ema makes of the averages around this step is less exact"


def save(
    checkpoints: checkpoint.Checkpoints,
    step: int,
    state: State,
    wait: bool = False,
    beside: checkpoint.Checkpoints | None = None,
) -> None:
    """Saves unless the last losses were not finite: the last good checkpoint stays the newest.

    With `beside` it is a snapshot, of the averages alone, where the checkpoints that come to `beside` still fit.
    """
    if int(state.nonfinite) == 0:
        items = whole = to_store(state)
        if beside is not None:
            items = {"train": None, "ema": None, "averages": state.averages}

        def check_room() -> None:
            checkpoints.check_room(items, [] if beside is None else [whole] * beside.to_come())

        pod.first_then_all("room", check_room)
        error = None
        try:
            checkpoints.save(step, **items, wait=wait)
        except OSError as failed:
            error = failed
        said = "; ".join(filter(None, pod.gather("saved", str(error or ""))))
        if said:  # all go on, or none
            raise error or OSError(said)


def attempt(work: Callable[[], None], step: int, metrics: log.Log, meaning: str = LOST) -> None:
    """Saves, or says loudly why that failed and goes on: what is in memory is worth more than what is on disk."""
    try:
        work()
    except OSError as error:
        log.warn(f"step {step}: {error}. Training goes on, and {meaning}. Make room")
        metrics.write(step, {"failed_saves": 1.0})
