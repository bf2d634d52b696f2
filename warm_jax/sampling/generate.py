"""Sampling: from the EMA weights of a checkpoint to PNG files, a grid or one npz."""

import dataclasses
import pathlib
import re
import time

import numpy as np
from ml_collections import ConfigDict

from warm_jax.experiments import experiment
from warm_jax.runtime import log, pod, preemption, workdirs
from warm_jax.sampling import runs, store, trajectories

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST_SEEDS = 10_000_000


def parse_seeds(text: str) -> np.ndarray:
    """Text such as 0-63,100 as seeds, each once, in the order given. ValueError names what is wrong."""
    seeds: list[np.ndarray] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise ValueError(f"--seeds={text}: {part!r} is neither a number nor a range; write for example 0-63,100")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < 2**32 or last - first >= _MOST_SEEDS:
            raise ValueError(
                f"--seeds={text}: {part!r} must rise, stay below 2^32, and name at most {_MOST_SEEDS:,} seeds"
            )
        seeds.append(np.arange(first, last + 1, dtype=np.int64))
    every = np.concatenate(seeds)
    return every[np.sort(np.unique(every, return_index=True)[1])]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What `prepare` checked and `sample` needs."""

    run: runs.Run
    seeds: np.ndarray
    out: pathlib.Path
    names: str = store.NPZ_NAMES[0]


def prepare(
    config: ConfigDict,
    workdir: pathlib.Path,
    seeds: str,
    out: str,
    step: int,
    *,
    trajectory: bool = False,
    ema: float | None = None,
    names: str = store.NPZ_NAMES[0],
) -> Drawing:
    """Checks everything that can be checked, compiles nothing. ValueError or OSError for bad input.

    `step` is a checkpoint's, -1 the latest's; `out` a folder, a file.npz or a file.png; empty: `samples/` of the
    workdir. `trajectory`: whether the way there is to be drawn too. `ema`: the σ_rel of an EMA made of stored averages,
    None: the plain one. `names`: how the arrays of an npz are called, one of `store.NPZ_NAMES`.
    """
    numbers, run = parse_seeds(seeds), runs.open_run(config, workdir, step, ema)
    if trajectory:
        if pod.count() > 1:
            raise ValueError(f"--trajectory draws in one process, and here are {pod.count()}; give --processes=1")
        shape = (*experiment.image_side(config), config.data.channels)
        trajectories.check(len(numbers), config.sample.steps, config.sample.batch_size, shape)
    target = pathlib.Path(out) if out else workdir / "samples"
    if names != store.NPZ_NAMES[0] and target.suffix != ".npz":
        raise ValueError(f"--npz_names={names} is of --out=FILE.npz, and --out is {out or 'a folder'}")
    one_file = target.suffix in (".npz", ".png")
    if target.is_dir() if one_file else target.is_file():
        kind = "is a folder" if one_file else "is a file"
        raise ValueError(f"--out={target} {kind}; name FILE.npz, FILE.png or a folder")
    workdirs.check_writable(target.parent if one_file else target)
    pod.check_shared(target.parent if one_file else target)
    if target.is_dir() and not (target / "samples.json").exists() and store.drawn_images(target):
        raise ValueError(f"{target} has images that were not made by --mode=sample; name another --out")
    return Drawing(run, numbers, target, names)


@preemption.noted()
def sample(drawing: Drawing, trajectory: bool = False) -> int:
    """Draws the seeds that are not there yet and writes them. Returns the exit status.

    With `trajectory` all are drawn, to the same bytes, and what they looked like on the way is written beside them. Of
    several processes each draws every n-th seed, and they meet only at the end.
    """
    run, out = drawing.run, drawing.out
    step, weights = runs.load_weights(run)
    settings = run.experiment.config.sample
    one_file, made = out.suffix in (".npz", ".png"), runs.made_with(run, step, weights)
    own = drawing.seeds[pod.index() :: pod.count()]

    def open_store() -> store.File | store.Folder:
        part = pod.index() if pod.count() > 1 else None
        return store.File(out, made, part, drawing.names) if one_file else store.Folder(out, made)

    kept = open_store()
    todo, draw = own if trajectory else kept.missing(own), run.sampler(trajectory)
    followed: list[trajectories.Trajectory] = []
    share = f" (process 0 of {pod.count()})" if pod.count() > 1 else ""
    log.say(f"checkpoint of step {step}; {len(todo)} of {len(own)} images to draw{share}, {draw.batch_size} at a time")
    log.say(experiment.precision_policy(run.experiment))
    if len(todo):
        with preemption.at_once(f"while compiling; images in {out} are kept; the same command goes on from there"):
            draw.compile(weights)
        log.say(f"compiled the sampler in {draw.compile_seconds:.1f} s")
    pod.first_then_all("stale images are gone", kept.begin)  # nothing is lost before the new images can be made
    if pod.index() > 0:
        kept = open_store()
    if len(todo):
        started, nfe = time.perf_counter(), 0
        labels = np.full(len(todo), -1 if settings.class_label is None else settings.class_label)
        bar = log.progress(len(todo), unit="image", doing="sampling")
        try:
            for seeds, samples in draw.stream(weights, todo, labels, preemption.requested):
                kept.add(seeds, samples)
                followed += [samples.trajectory] if trajectory else []
                nfe = samples.nfe
                bar.update(len(seeds))
        finally:
            kept.settle()
        bar.close()
        seconds = time.perf_counter() - started
        log.say(f"NFE {nfe} ({settings.solver}, {settings.steps} steps), {bar.n / seconds:.1f} images/s")
    untold = trajectory and sum(len(part.states) for part in followed) < len(own)
    stopped = bool(preemption.requested()) and bool(untold or len(kept.missing(own)))
    if stopped or pod.count() > 1:
        kept.pause()  # process 0 reads there what the others drew
    if any(pod.gather("drawn", "stopped" if stopped else "")):
        log.say(f"{preemption.requested()}: kept what was drawn in {out}; the same command goes on from there")
        return preemption.EXIT_AGAIN

    def finish() -> None:
        log.say((open_store() if pod.count() > 1 else kept).finish(drawing.seeds))

    pod.first_then_all("finished", finish)
    if trajectory:
        whole = trajectories.Trajectory(*(np.concatenate(parts) for parts in zip(*followed, strict=True)))
        log.say(trajectories.write(out, drawing.seeds, whole, run.experiment.sampled, draw.levels[draw.kept]))
    return 0
