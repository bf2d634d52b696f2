"""Checkpoints: the only file that knows Orbax.

A checkpoint is a folder named by its step, with two items: `ema`, the weights to sample from, and `train`, what the
optimiser needs besides; and a third, `averages`, where training keeps some. Each is written beside its place and
renamed when whole, and restored against a tree of shapes *with the target's sharding*, so it opens on any number of
devices and processes. All processes save, each the parts that it holds; each reads by itself what is only read.

A fourth item, `digests`, has a digest of every array of the others (`runtime/digests.py`), written with them or not at
all. Whatever is restored is compared with it. Checkpoints of versions that wrote none open with a note.
"""

import pathlib
import shutil
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers, handlers

from warm_jax.runtime import digests, log, pod

ITEMS = ("train", "ema", "averages")
DIGESTS = "digests"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's own: which items there are


def _kept(last: int | None, every: int) -> checkpoint_managers.AnyPreservationPolicy:
    """The newest `last` (None: all), and those at multiples of `every` (0: none)."""
    policies = [checkpoint_managers.LatestN(last)]
    if every:
        policies.append(checkpoint_managers.EveryNSteps(every))
    return checkpoint_managers.AnyPreservationPolicy(policies)


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      folder: Where they are; made if it is not there and `writable`.
      keep_last: How many of the newest are kept, at least 1; None: all.
      keep_every: Those at multiples of this step are kept for good; 0: none.
      writable: False to read what is there, and not even make the folder.
    """

    def __init__(self, folder: pathlib.Path, *, keep_last: int | None = 1, keep_every: int = 0, writable: bool = True):
        self.folder, self._keep_last, self._together = folder, keep_last, writable
        me, together = jax.process_index(), set(range(jax.process_count()))
        if writable:
            folder.mkdir(parents=True, exist_ok=True)
        # Named, so that Orbax waits by the coordinator, with a time-out, and not by a collective of all devices.
        processes = ocp.options.MultiprocessingOptions(
            primary_host=0 if writable else me,
            active_processes=together if writable else {me},
            # Of the folder too: two of them may save the same step.
            barrier_sync_key_prefix=f"all_{folder.name}" if writable else f"only_{me}",
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_kept(keep_last, keep_every),
            create=False,
            cleanup_tmp_directories=writable,
            multiprocessing_options=processes,
        )
        readers = {name: ocp.StandardCheckpointHandler(multiprocessing_options=processes) for name in ITEMS}
        readers[DIGESTS] = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
        registry = handlers.create_default_handler_registry(**readers)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, handler_registry=registry)

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, newest first; waits for what is being saved."""
        self.wait()
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def to_come(self) -> int:
        """How many will be saved before the first is deleted: of them there must be room for one more than are kept."""
        return max(1, (self._keep_last or 0) + 1 - len(self.steps()))

    def check_room(self, state: PyTree, left: PyTree = None) -> None:
        """Raises OSError where the disk has less room than the arrays of `state` take. What it does not say, passes.

        `left`: the arrays of what must still fit after it.
        """
        needed, more = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (state, left))
        disk = shutil.disk_usage(self.folder)
        if disk.total and disk.free < needed + more:
            beside = f", checkpoints beside it another {more / 2**20:,.2f} MiB" if more else ""
            raise OSError(
                f"a checkpoint was not saved in {self.folder}: it takes {needed / 2**20:,.2f} MiB{beside}, and "
                f"{disk.free / 2**20:,.2f} MiB are free there"
            )

    def save(
        self, step: int, train: PyTree | None, ema: PyTree | None, averages: PyTree | None = None, *, wait: bool = False
    ) -> None:
        """Saves in the background (the arrays are copied first); with `wait` it is on disk when this returns.

        `train` is None for converted weights, which can be sampled but not trained on from their step. Nothing is done
        where there is a checkpoint of this step. OSError where
        this or the save before it failed, as where the disk filled up meanwhile: the checkpoints before are as they
        were, and it can be tried again.
        """
        trees = dict(zip(ITEMS, (train, ema, averages), strict=True))
        trees = {name: tree for name, tree in trees.items() if tree is not None}
        try:
            if step not in self._manager.all_steps():
                items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
                items[DIGESTS] = ocp.args.JsonSave({name: digests.of_tree(tree) for name, tree in trees.items()})
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # whatever Orbax and TensorStore make of a disk that does not take more
            raise self._not_saved(error) from error
        if wait:
            self.wait()

    def _not_saved(self, error: Exception) -> OSError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if jax.process_index() == 0:  # what there is of it takes room, and is no checkpoint
            for part in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free / 2**20
        return OSError(f"a checkpoint could not be saved in {self.folder} ({reason}; {free:,.0f} MiB are free there)")

    def restore(self, step: int, **abstract: PyTree[jax.ShapeDtypeStruct]) -> dict[str, PyTree]:
        """The named items (`train=`, `ema=`) of one checkpoint, on the shardings of their abstract trees.

        ValueError, naming step and item, where one cannot be read or is not what was saved. Processes that save
        together restore together: what one of them cannot read is an error in all.
        """
        expected, restored, wrong = self._digests(step), {}, []
        for name, tree in abstract.items():  # all, also after an error: other processes wait for this one
            try:
                arguments = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree)})
                restored[name] = self._manager.restore(step, args=arguments)[name]
            except Exception as error:  # whatever a damaged file makes of Orbax's readers
                wrong.append(f"item {name}: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}")
        reason = self._said("read", wrong)
        if not reason:
            differing = {}
            for name, tree in restored.items() if expected is not None else ():
                stored = expected.get(name, {})
                differing[name] = digests.differing(digests.of_tree(tree, digests.version_of(stored)), stored)
            reason = self._said("verified", [f"item {name}: {why}" for name, why in differing.items() if why])
        if reason:
            raise ValueError(f"checkpoint {step} in {self.folder} cannot be read ({reason})")
        if expected is None:
            log.say(f"note: checkpoint {step} in {self.folder} has no digests (an older version's): damage is not seen")
        return restored

    def _digests(self, step: int) -> dict[str, dict[str, str]] | None:
        """Item → path → digest, as they were saved; None in a checkpoint of a version that wrote none.

        Empty where they are damaged: then nothing is what was saved.
        """
        path = self.folder / str(step)
        try:
            if not (path / DIGESTS).exists() and f'"{DIGESTS}"' not in (path / _METADATA).read_text("utf-8", "replace"):
                return None
            return digests.read(path / DIGESTS)
        except (OSError, ValueError, RecursionError):
            return {}

    def _said(self, what: str, wrong: list[str]) -> str:
        """What is wrong in any process that restores with this one, in all of them."""
        reason = "; ".join(wrong)
        return "; ".join(filter(None, pod.gather(what, reason))) if self._together else reason

    def restore_latest(self, **abstract: PyTree[jax.ShapeDtypeStruct]) -> tuple[int, dict[str, PyTree]] | None:
        """(step, items) of the newest checkpoint that is whole; None where there is none at all.

        One that was damaged is passed over with a warning. ValueError where all are.
        """
        return next(self._readable(abstract), None)

    def _readable(self, abstract: dict[str, PyTree]) -> Iterator[tuple[int, dict[str, PyTree]]]:
        steps, reason = self.steps(), ""
        for step in steps:
            try:
                items = self.restore(step, **abstract)
            except ValueError as error:
                reason = str(error)
                logging.warning("%s; trying the one before", reason)
                continue
            yield step, items
        if steps and reason:
            raise ValueError(
                f"none of the checkpoints {steps} in {self.folder} can be read: {reason}; "
                "move the folder away to start anew"
            )

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints newer than `step`, which `restore_latest` could not read, to `damaged-STEP`.

        They are not deleted: what could not be read today may be whole.
        """
        for newer in self.steps():
            if newer > step and jax.process_index() == 0:
                aside = self.folder / f"damaged-{newer}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(newer)).rename(aside)
                logging.warning("checkpoint %d is set aside as %s", newer, aside)
        self._manager.reload()

    def remove_after(self, step: int) -> None:
        """Deletes those of steps after `step`, which will be made again, and what an earlier deletion left."""
        for left in self.folder.glob("removed-*") if jax.process_index() == 0 else ():
            shutil.rmtree(left, ignore_errors=True)
        for newer in self.steps():
            if newer > step and jax.process_index() == 0:
                # Renamed first: half of one must not be taken for one.
                gone = self.folder / f"removed-{newer}"
                shutil.rmtree(gone, ignore_errors=True)
                (self.folder / str(newer)).rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        self._manager.reload()

    def wait(self) -> None:
        """Until what is being saved is on disk. OSError where it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error

    def close(self) -> None:
        """Waits for what is being saved, and ends."""
        try:
            self.wait()
        finally:
            self._manager.close()
