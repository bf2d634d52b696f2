"""Restoring photographs of known, or estimated, blur and noise with the EMA weights of a checkpoint.

    python -m warm_jax --config=cifar10:amortised --mode=restore --images=FOLDER --out=FOLDER
    …  --blur=1.5 --noise=25/255                 pixels, and σ in grey levels; by default both are estimated
    …  --estimate=sample --count=4               draws from the posterior in place of its mean

Written are NAME.png, or NAME_0.png … for draws, restore.json with the levels and what failed, and before_after.png.
An image that is broken, or of levels that the model does not know, does not stop the others; what is restored already
is kept, and its result stays until the next one of the same photograph is made. `posterior.py` says how it
is done, `restoration/` has the parts: levels, limits, tiles and files.
"""

import dataclasses
import os
import pathlib
import time
from collections import Counter
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, PyTree
from ml_collections import ConfigDict

from warm_jax.experiments import experiment
from warm_jax.restoration import before_after, estimation, ledger, limits, photographs, posterior, tiles
from warm_jax.runtime import log, preemption, workdirs
from warm_jax.sampling import runs

_ESTIMATES = ("mean", "sample")


class Asked(NamedTuple):
    """What the command line asks for, as text where it is parsed here."""

    images: str  # a folder, or one file
    blur: str = "auto"
    noise: str = "auto"
    estimate: str = "mean"
    count: int = 4  # draws of each image, for "sample"
    add_noise: bool = False
    ema: float | None = None  # the σ_rel of an EMA that `experiments/posthoc_ema.py` makes; None: the plain one


@dataclasses.dataclass(frozen=True)
class Run:
    """What `prepare` checked and `restore` needs."""

    source: runs.Run
    out: pathlib.Path
    asked: Asked
    given: estimation.Given
    limits: limits.Limits
    outputs: dict[pathlib.Path, tuple[str, ...]]  # of each image, the names of its results
    names: dict[pathlib.Path, str]  # what each image is called in restore.json and in messages

    @property
    def experiment(self) -> experiment.Experiment:
        """The experiment."""
        return self.source.experiment


def limits_of(exp: experiment.Experiment) -> limits.Limits:
    """The levels that an experiment of EDM's family is trained on.

    Noise from `beta_min` to `beta_max`, and no further than three standard deviations `P_std` from `P_mean` in ln β.
    """
    of = exp.config.process
    least, most = limits.trained_noise(of.beta_min, of.beta_max, of.P_mean, of.P_std)
    by_training = "three P_std from P_mean in training"
    ratios = None if exp.process.follow is None else (of.bnr_min, of.bnr_max)
    return limits.Limits(
        least=least,
        most=most,
        why_least="process.beta_min" if of.beta_min == least else by_training,
        why_most="process.beta_max" if of.beta_max == most else by_training,
        ratios=ratios,
        zero=ratios is not None and of.bnr_zero > 0,
        line=exp.process.blur,
    )


def _without_results(files: list[pathlib.Path], images: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """The photographs, without what an earlier run wrote into a folder `out` among them. ValueError for none."""
    top, kept = out.resolve(), files
    if images.is_dir() and images.resolve() in top.parents:
        kept = [path for path in files if top not in path.resolve().parents]
    if not kept:
        raise ValueError(f"--images={images}: all of its images are in --out={out}; name the folder of the photographs")
    return kept


def _names(files: list[pathlib.Path]) -> dict[pathlib.Path, str]:
    """What images are called: the files' names; of two with one name, also the folders that tell them apart."""
    top, count = os.path.commonpath([path.parent for path in files]), Counter(path.name for path in files)
    return {path: path.name if count[path.name] == 1 else path.relative_to(top).as_posix() for path in files}


def _outputs(named: dict[pathlib.Path, str], asked: Asked) -> dict[pathlib.Path, tuple[str, ...]]:
    """Names of results; of two images with one stem, the whole names. ValueError where that does not help."""
    stems = Counter([path.stem for path in named] + [pathlib.Path(ledger.SHEET).stem])
    names = {
        path: path.stem if stems[path.stem] == 1 else name.replace(".", "_").replace("/", "_")
        for path, name in named.items()
    }
    numbers = [f"_{i}" for i in range(asked.count)] if asked.estimate == "sample" else [""]
    outputs = {path: tuple(f"{name}{number}.png" for number in numbers) for path, name in names.items()}
    every = Counter(name for of_one in outputs.values() for name in of_one)
    twice = [name for name, count in every.items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} would be the result of two images; rename one of them")
    return outputs


def _check_given(known: limits.Limits, given: estimation.Given, channels: int, add_noise: bool) -> None:
    """Raises ValueError where levels that were given can be those of no image, of colour or grey."""
    refused = []
    for factor in sorted({1.0, channels**0.5}):  # `Restorer.noise_factor`
        try:
            known.for_noise_times(factor).check(given, add_noise)
            return
        except ValueError as error:
            refused.append(error)
    raise refused[0]


def prepare(config: ConfigDict, workdir: pathlib.Path, asked: Asked, out: str, step: int) -> Run:
    """Checks everything that can be checked, compiles nothing. ValueError or OSError for bad input.

    `step` is a checkpoint's, -1 the latest's; `out` a folder, empty: `restored/` of the workdir.
    """
    experiment.build(config)
    limits.check_system(config.process.system)
    given = estimation.parse(asked.blur, asked.noise)
    if asked.estimate not in _ESTIMATES:
        raise ValueError(f"--estimate={asked.estimate}; choose one of {', '.join(_ESTIMATES)}")
    if not 1 <= asked.count <= 10_000:
        raise ValueError(f"--count={asked.count}; it must be from 1 to 10,000")
    if config.sample.guidance != 1:
        raise ValueError(f"sample.guidance is {config.sample.guidance}; a restoration is not guided: leave it at 1")
    if not asked.images:
        raise ValueError("--mode=restore needs --images=FOLDER, or one file")
    images, target = workdirs.local(asked.images.removeprefix("folder:")), pathlib.Path(out or workdir / "restored")
    files = _without_results(photographs.list_images(images), images, target)
    source = runs.open_run(config, workdir, step, asked.ema)
    known = limits_of(source.experiment)
    _check_given(known, given, source.experiment.process.image_shape[2], asked.add_noise)
    names = _names(files)
    outputs = _outputs(names, asked)
    ledger.check_out(target, outputs)
    return Run(source, target, asked, given, known, outputs, names)


def _most_tiles(run: Run) -> int:
    """The most tiles that any of the images needs at one level, by the files' headers."""
    tile, most = run.experiment.process.image_shape[:2], 1
    images = 3 if run.experiment.process.image_shape[2] == 1 else 1
    images *= run.asked.count if run.asked.estimate == "sample" else 1
    for size in filter(None, map(photographs.size, run.outputs)):
        height, width = (max(pair) for pair in zip(size, tile, strict=True))
        most = max(most, images * len(tiles.tiling(height, width, tile, tiles.halves(tile)).corners))
    return most


def restorer_of(run: Run, weights: PyTree) -> posterior.Restorer:
    """The restorer of a run; it works on no more tiles at a time than its images have."""
    return posterior.Restorer(run.experiment, weights, min(run.experiment.config.sample.batch_size, _most_tiles(run)))


# ── One image ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _restored(
    run: Run, restore: posterior.Restorer, photograph: photographs.Photograph
) -> tuple[Float32[np.ndarray, "n h w c"], dict[str, object]]:
    """The results of one photograph, and what is to be said of it. ValueError for levels that the model cannot do."""
    given, (height, width, channels), image = run.given, photograph.pixels.shape, photograph.pixels
    notes, own = [*photograph.notes], run.experiment.process.image_shape[2]
    if channels == 3 and (image == image[..., :1]).all():  # its noise is one, too
        image = image[..., :1]
        notes.append("grey, stored as RGB")
    found, factor = estimation.estimate(image, given), restore.noise_factor(image.shape[2])
    served = run.limits.for_noise_times(factor).serve(found, run.asked.add_noise)
    notes += served.notes
    alpha, beta = served.levels
    if served.added:
        image = posterior.noisier(image, found.beta, beta)
    if image.shape[2] != own:
        notes.append("grey, by a model of colour: at √3 times the noise" if own == 3 else "colours one by one")
    if run.asked.estimate == "sample":
        made = restore.samples(image, alpha, beta, run.asked.count)
    else:
        made = restore(image, alpha, beta)[None]
    return made if image.shape[2] == channels else made.repeat(channels, 3), {
        "height": height,
        "width": width,
        "channels": channels,
        "bits": photograph.bits,
        "blur": found.alpha,
        "noise": found.beta,
        "estimated": [name for name, value in zip(("blur", "noise"), given, strict=True) if value is None],
        "restored_as": {"alpha": alpha, "beta": beta, "bnr": alpha / beta},
        "notes": notes,
    }


def _line(name: str, entry: dict[str, object]) -> str:
    guessed = f" ({' and '.join(entry['estimated'])} estimated)" if entry["estimated"] else ""
    size, found = f"{entry['width']}×{entry['height']}", estimation.Levels(entry["blur"], entry["noise"])
    return "; ".join([f"{name}: {size}, {found}{guessed}, BNR {entry['restored_as']['bnr']:.3g}", *entry["notes"]])


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _made_with(run: Run, step: int, weights: PyTree) -> dict:
    """What the results depend on besides the images."""
    made = runs.made_with(run.source, step, weights)
    needed = ("clip", "class_label", "steps") if run.asked.estimate == "sample" else ("clip", "class_label")
    made["sample"] = {name: made["sample"][name] for name in needed}
    count = run.asked.count if run.asked.estimate == "sample" else 1
    levels_ = {"blur": run.given.alpha, "noise": run.given.beta, "add_noise": run.asked.add_noise}
    return {**made, **levels_, "estimate": run.asked.estimate, "count": count}


def _said_before(run: Run) -> list[str]:
    config, said = run.experiment.config, []
    if run.asked.estimate == "sample":
        said.append(f"draws from the posterior by ancestral steps ({config.sample.steps}), the reversal of the process")
        if config.sample.solver != "ancestral":
            said[-1] += f"; sample.solver={config.sample.solver} would not draw from it"
        if config.sample.steps < 100:
            said.append(
                "note: by few steps draws vary too little; for their right spread give --config.sample.steps=100"
            )
    if config.data.num_classes and config.sample.class_label is None and not config.data.label_dropout:
        said.append(
            "note: this network never saw an image without its class (data.label_dropout is 0) and is told none; "
            "name one with --config.sample.class_label, or train with data.num_classes=0"
        )
    return said


def _one(run: Run, restoring: posterior.Restorer, note: dict, key: str, path: pathlib.Path) -> bool:
    """Restores one image and notes it, unless that is done already; whether it was to be done."""
    content, out, name = photographs.load(path), run.out, run.names[path]
    claim = ledger.claim(key, path, content, run.outputs[path])
    if ledger.has(out, note, name, claim):
        return False
    ledger.check_free(note, name, claim)
    photograph = photographs.decode(content)
    made, entry = _restored(run, restoring, photograph)
    files = [photographs.encode(photograph, pixels) for pixels in made]
    ledger.put(out, note, name, {**claim, **entry}, files)
    log.say(_line(name, entry))
    return True


@preemption.noted()
def restore(run: Run) -> int:
    """Restores the images that the same settings have not restored yet, and writes them. Returns the exit status."""
    step, weights = runs.load_ema(run.source)
    out, done = run.out, []
    note, key = ledger.begin(out, _made_with(run, step, weights))
    log.say("\n".join([f"checkpoint of step {step}; {len(run.outputs)} images", *_said_before(run)]))
    restoring, started, fresh = restorer_of(run, weights), time.perf_counter(), 0
    bar = log.progress(len(run.outputs), unit="image", doing="restoring")
    stopped = False
    try:
        for path in run.outputs:
            if stopped := bool(preemption.requested()):
                break
            try:
                fresh += _one(run, restoring, note, key, path)
                done.append(path)
            except (ValueError, OSError, MemoryError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
                note["failures"][run.names[path]] = " ".join(str(error).split()) or type(error).__name__
                ledger.write(out, note)
            bar.update(1)
    finally:
        seconds = time.perf_counter() - started
        bar.close()
        for name, reason in note["failures"].items():
            log.warn(f"{name}: {reason}")
    before_after.write(out / ledger.SHEET, [[path, *(out / name for name in run.outputs[path][:3])] for path in done])
    if stopped:
        log.say(f"{preemption.requested()}: kept what was restored in {out}; the same command goes on")
        return preemption.EXIT_AGAIN
    log.say(f"{fresh} images restored in {seconds:.1f} s; {len(done)} of {len(run.outputs)} are in {out}")
    return 1 if note["failures"] else 0
