"""The EMA of any length of a training with `train.posthoc_ema`, made of the averages that it stored.

    posthoc/STEP           the averages after each `train.posthoc_every` steps, all kept
    checkpoints/STEP       has those of its own step too, so that there is an EMA of every checkpoint

They are float32, as the parameters (EDM2's are float16): a short length takes large coefficients of both signs (with 78
snapshots at σ_rel 0.02 their magnitudes sum to 39), which make up to 2 % of float16's rounding of 5·10⁻⁴. A snapshot of
k lengths takes 4k bytes a parameter. `diffusion/ema.py` has the mathematics.
"""

import pathlib
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from warm_jax.diffusion import ema
from warm_jax.experiments import experiment
from warm_jax.runtime import checkpoint, log, mesh, pod, workdirs

FOLDER = "posthoc"
MOST_ERROR = 0.1  # ‖profile - wanted‖ / ‖wanted‖
_TRIED = np.round(np.arange(0.005, ema.MOST, 0.005), 3)  # lengths, to say which can be had


class Plan(NamedTuple):
    """How the EMA of length `sigma_rel` at `step` is made: of the averages of `lengths` at `steps`, the last its own.

    `fit` has a coefficient for each, those of one step next to each other.
    """

    sigma_rel: float
    step: int
    steps: tuple[int, ...]
    lengths: tuple[float, ...]
    fit: ema.Fit

    def note(self) -> dict[str, object]:
        """What to store beside whatever is made with it."""
        error = float(f"{self.fit.error:.3g}")  # the digits after these are LAPACK's, and another machine has others
        return {"sigma_rel": self.sigma_rel, "averages": len(self.fit.coefficients), "profile_error": error}


# Snapshots that this process found damaged, and when each was written: `plan` does without them.
_damaged: dict[pathlib.Path, int] = {}


class _DamagedError(ValueError):
    """A snapshot that cannot be read: its step, and why."""


def _is_whole(snapshot: pathlib.Path) -> bool:
    """Whether nothing is known against a snapshot; one that was restored is another."""
    return snapshot not in _damaged or _damaged[snapshot] != snapshot.stat().st_mtime_ns


def check(workdir: pathlib.Path, sigma_rel: float, config: ConfigDict) -> tuple[float, ...]:
    """The lengths that the training of `workdir` tracks; of one that has not begun, those that `config` says.

    ValueError where there are none, or no EMA has the length `sigma_rel`.
    """
    ema.check_sigma_rel(sigma_rel, "--ema")
    begun = (workdir / "config.json").exists()
    lengths = experiment.averages(workdirs.load_config(workdir) if begun else config)
    if not lengths:
        raise ValueError(
            f"--ema={sigma_rel:g}: {workdir} was trained with the plain EMA alone (train.posthoc_ema is empty); leave "
            "--ema out, or train anew with --config.train.posthoc_ema='(0.05,0.1)'"
        )
    return lengths


def plan(workdir: pathlib.Path, step: int, sigma_rel: float) -> Plan:
    """The plan for the checkpoint of `step`; reads which snapshots there are, and none of them.

    It does without those that `make` found damaged before. ValueError where training kept no averages, no EMA has this
    length, or the snapshots cannot give it.
    """
    lengths = check(workdir, sigma_rel, workdirs.load_config(workdir))
    own = workdir / "checkpoints" / str(step)
    if not (own / "averages").is_dir():
        raise ValueError(
            f"--ema={sigma_rel:g}: {own} holds the plain EMA alone, as that of an export does which was imported; "
            "leave --ema out, or name the workdir that was trained with --workdir"
        )
    folder = workdir / FOLDER
    found = checkpoint.Checkpoints(folder, writable=False).steps() if folder.is_dir() else []
    before = sorted(number for number in found if number < step)
    steps = (*(number for number in before if _is_whole(folder / str(number))), step)
    lost = [number for number in before if number not in steps]
    profiles = [ema.Profile(number, ema.gamma(length)) for number in steps for length in lengths]

    def fit(length: float) -> ema.Fit:
        return ema.fit(profiles, ema.Profile(step, ema.gamma(length)))

    made = Plan(float(sigma_rel), step, steps, lengths, fit(sigma_rel))
    if made.fit.error > MOST_ERROR:
        good = [length for length in _TRIED.tolist() if fit(length).error <= MOST_ERROR]
        reach = f"from {good[0]:g} to {good[-1]:g}" if good else f"of {', '.join(f'{one:g}' for one in lengths)}"
        damaged = f" (those of {', '.join(map(str, lost))} are damaged: restore them)" if lost else ""
        raise ValueError(
            f"--ema={sigma_rel:g}: the {len(steps) - 1} snapshots in {folder} up to step {step}{damaged} come no "
            f"closer to this length than {made.fit.error:.0%} of its profile ({MOST_ERROR:.0%} are allowed); ask for "
            f"one {reach}, or train with a smaller train.posthoc_every"
        )
    return made


def make(workdir: pathlib.Path, step: int, sigma_rel: float, shapes: PyTree) -> tuple[Plan, PyTree[np.ndarray]]:
    """The plan for the checkpoint of `step` and its EMA, as `plan` and `reconstruct` give them.

    A snapshot that is damaged is passed over with a warning, as long as the others suffice. Of several processes all
    must call it: what one of them cannot read is passed over by all.
    """
    while True:
        wanted = plan(workdir, step, sigma_rel)
        made, lost = None, ""
        try:
            made = reconstruct(workdir, wanted, shapes)
        except _DamagedError as error:
            lost, reason = str(error.args[0]), error.args[1]
            log.warn(f"{reason}; the EMA is made of the other snapshots, if they suffice")
        steps = set(filter(None, pod.gather("snapshots", lost)))
        if not steps:
            return wanted, made
        for snapshot in (workdir / FOLDER / one for one in steps):
            _damaged[snapshot] = snapshot.stat().st_mtime_ns


def reconstruct(workdir: pathlib.Path, wanted: Plan, shapes: PyTree) -> PyTree[np.ndarray]:
    """The EMA of a plan as numpy arrays, `shapes` being the parameters'; one snapshot after the other is read.

    ValueError where one cannot be read.
    """
    one = mesh.replicated(mesh.make_mesh(1, local=True))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    total = jax.tree.map(lambda x: np.zeros(x.shape, np.float64), shapes)
    bar = log.progress(len(wanted.steps), unit="snapshot", doing="averaging")
    readers = {name: checkpoint.Checkpoints(workdir / name, writable=False) for name in ("checkpoints", FOLDER)}
    for number, x in zip(wanted.steps, wanted.fit.coefficients.reshape(-1, len(wanted.lengths)), strict=True):
        name = "checkpoints" if number == wanted.step else FOLDER
        try:
            stored = readers[name].restore(number, averages=(like,) * len(wanted.lengths))["averages"]
        except ValueError as error:
            bar.close()
            if name == FOLDER:
                raise _DamagedError(number, str(error).replace("checkpoint", "snapshot", 1)) from error
            raise ValueError(f"its averages are missing or damaged: {error}; name another --checkpoint") from error
        for coefficient, average in zip(x, stored, strict=True):
            total = jax.tree.map(lambda sum_, a, c=coefficient: sum_ + c * np.asarray(a, np.float64), total, average)
        bar.update()
    bar.close()
    return jax.tree.map(lambda sum_, x: sum_.astype(x.dtype), total, shapes)
