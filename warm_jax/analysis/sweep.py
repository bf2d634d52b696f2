r"""BNR × NFE → quality: the paper's two ablations, for checkpoints and, with no training at all, for the oracles.

A sweep is cells of (BNR, steps, seed), each measured once. What is measured is a line of a file of JSON lines, keyed by
a hash of all it depends on, so that a sweep which was cut off goes on and one with other settings begins anew.

The oracles show what BNR costs a perfect network, which is the solver's error alone:

* Gaussian: the sampler is linear, so its W2 to the data is a closed form of its gains (docs/method.md §15).
* Empirical: the last step returns x̂0, which at β = 0.002 is one of the images nearly always, at any BNR and NFE: the
  distance to the nearest image, `nearest`, says that and no more. What a coarse sampler gets wrong is how often it
  finds each. `imbalance` is the χ² divergence n Σ p_k² - 1 of the frequencies p_k from 1/n, and Σ p_k² the chance that
  two runs meet in one image, which pairs of samples estimate without bias; `energy` weighs the same error by how far
  apart in pixels the images are that come too often and too rarely.
"""

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.analysis import distances, manifold
from warm_jax.diffusion import dct, oracle, sampler
from warm_jax.diffusion.bnr import Power
from warm_jax.diffusion.process import warm


class Cell(NamedTuple):
    """What is measured at once."""

    bnr: float
    steps: int
    seed: int


class Sweep(NamedTuple):
    """One metric. Arrays only: `np.savez(path, **result._asdict())` holds them all. Axes: r BNRs, s step counts.

    Attributes:
      metric: Its name, a string in an array of no axis.
      bnrs: `[r]`, rising.
      steps: `[s]`, rising.
      nfe: Evaluations a sample, as measured, `[s]`.
      values: One a seed, `[r, s, k]`; NaN where not measured.
      mean: Over seeds, `[r, s]`.
      half: Half-width of its 95 % interval (Student's t), `[r, s]`; NaN of a single seed, 0 of a closed form.
    """

    metric: np.ndarray
    bnrs: np.ndarray
    steps: np.ndarray
    nfe: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    half: np.ndarray


Scores = dict[str, float]
Measure = Callable[[Cell], tuple[int, Scores]]


# ── Any sweep ────────────────────────────────────────────────────────────────────────────────────────────────────────


def cells(bnrs: Sequence[float | int], steps: Sequence[int], seeds: Sequence[int] = (0,)) -> list[Cell]:
    """All combinations, a whole table for the first seed before the next."""
    for name, values in (("ratios", bnrs), ("numbers of steps", steps), ("seeds", seeds)):
        if not len(values) or len(set(values)) < len(values):
            raise ValueError(f"a sweep needs {name}, each named once, not {list(values)}")
    if not all(0 <= bnr < math.inf for bnr in bnrs) or min(steps) < 1:
        raise ValueError(f"ratios are finite and at least 0, steps at least 1, not {list(bnrs)} and {list(steps)}")
    return [Cell(float(bnr), int(number), int(seed)) for seed in seeds for bnr in bnrs for number in steps]


def _key(cell: Any, depends: Any) -> str:
    parts = json.dumps([cell._asdict(), depends], sort_keys=True, default=list)
    return hashlib.sha256(parts.encode()).hexdigest()[:12]


def _read(path: pathlib.Path) -> dict[str, dict]:
    """The rows by key. A last line that was cut off is taken off the file; ValueError for other damage."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:  # what comes next must not be glued to it
        with path.open("r+b") as file:
            file.truncate(len(whole))
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            found[row["key"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({error}); remove it, and what is lost is measured again"
            ) from error
    return found


def sweep(
    wanted: Sequence[Any],
    measure: Callable[[Any], tuple[int, Scores]],
    path: pathlib.Path | None = None,
    depends: Any = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict]:
    """Measures what is not in the file yet, and yields the row of every cell, in order.

    Args:
      wanted: What to measure: `Cell`s, or other named tuples of numbers.
      measure: cell -> (NFE, {name: score}). What it raises ends the sweep; what is done is kept.
      path: The file of rows, one appended when its cell is finished; None: nothing is kept.
      depends: All else that the scores depend on (configs, checkpoints, counts), as JSON knows it: part of the key.
      stop: Asked before each measurement; True ends the sweep there.

    A row: {"key", what the cell has, "nfe", "scores"}.
    """
    done = _read(path) if path is not None else {}
    for cell in wanted:
        key = _key(cell, depends)
        if key not in done:
            if stop():
                return
            nfe, scores = measure(cell)
            row = {"key": key, **cell._asdict(), "nfe": int(nfe)}
            done[key] = {**row, "scores": {name: float(score) for name, score in scores.items()}}
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[key]) + "\n")
        yield done[key]


def collect(rows: Sequence[dict], metric: str) -> Sweep:
    """The table of one score, from any rows; ValueError where no row has it or a cell came twice."""
    rows = [row for row in rows if metric in row["scores"]]
    if not rows:
        raise ValueError(f"nothing that was measured has a score {metric!r}")
    bnrs, steps, seeds = (sorted({row[name] for row in rows}) for name in ("bnr", "steps", "seed"))
    values, nfe = np.full((len(bnrs), len(steps), len(seeds)), np.nan), np.zeros(len(steps), int)
    for row in rows:
        where = bnrs.index(row["bnr"]), steps.index(row["steps"]), seeds.index(row["seed"])
        if not np.isnan(values[where]):
            raise ValueError(
                f"BNR {row['bnr']:g}, {row['steps']} steps, seed {row['seed']} has two rows, of two sweeps"
            )
        values[where], nfe[where[1]] = row["scores"][metric], row["nfe"]
    half = np.full(values.shape[:2], np.nan)
    if len(seeds) > 1:
        mean, half = distances.interval(values)
    else:
        mean = values[..., 0]
    return Sweep(np.array(metric), np.array(bnrs, float), np.array(steps), nfe, values, mean, half)


# ── The oracles ──────────────────────────────────────────────────────────────────────────────────────────────────────


def gaussian_w2(power: Power, bnrs: Sequence[float | int], steps: Sequence[int], solver: str = "heun") -> Sweep:
    """W2 / ‖√P‖ between Gaussian data of DCT power `power` `[h, w]` and what the sampler makes of the prior, exactly.

    The sampler of the Gaussian oracle is linear and acts on each frequency alone: run on β_max in every one it shows
    the standard deviation |gain| of its samples, and W2 is ‖ |gain| - √P ‖. `solver` must be deterministic. In float64.
    """
    if solver in sampler.RANDOM:
        raise ValueError(f"{solver} draws noise, so its gains do not tell its samples' law; choose heun or multistep")
    shape, std = (*np.shape(power), 1), np.sqrt(np.asarray(power, np.float64))

    @functools.partial(jax.jit, static_argnums=1)
    def gains(bnr: Array, number: int) -> tuple[Array, Array]:
        process = warm(shape, lambda beta: bnr * beta)
        levels = process.levels(number)
        x = dct.idct2(jnp.full((1, *shape), levels[0]))
        out, record = sampler.sample(oracle.gaussian(process, power), process, x, levels, solver=solver)
        return dct.dct2(out)[0, ..., 0], record.nfe

    def measure(cell: Cell) -> tuple[int, Scores]:
        with jax.enable_x64(True):
            gain, nfe = gains(jnp.asarray(cell.bnr, jnp.float64), cell.steps)
        return int(nfe), {"w2": float(np.linalg.norm(np.abs(gain) - std) / np.linalg.norm(std))}

    table = collect(list(sweep(cells(bnrs, steps), measure)), "w2")
    return table._replace(half=np.zeros_like(table.half))


def against_data(
    samples: Float[Array, "b h w c"], images: Float[Array, "n h w c"], spread: Float[Array, ""]
) -> dict[str, Array]:
    """`energy`, `imbalance` and `nearest` of samples against the law that draws each of `images` equally often.

    energy: 2 E|X - Y| - E|X - X'| - E|Y - Y'| over E|Y - Y'|, no unit; unbiased, so below 0 half of the time where
      the samples are perfect. What concerns the data is exact: over all images, and all pairs of them.
    imbalance: n Σ p_k² - 1, where p_k is how often image k is the one nearest to a sample; unbiased; 0 to n - 1.
    nearest: Mean distance to the nearest image, per √dim: the rms of a pixel's error.

    `spread` is E|Y - Y'|, `data_spread(images)`.
    """
    x = samples.reshape(len(samples), -1)
    across = distances.distances(x, images.reshape(len(images), -1))
    energy = 2 * jnp.mean(across) - distances.apart(distances.distances(x, x)) - spread
    found = jnp.argmin(across, axis=1)
    meet = distances.apart((found[:, None] == found).astype(x.dtype))
    return {
        "energy": energy / spread,
        "imbalance": len(images) * meet - 1,
        "nearest": jnp.mean(jnp.min(across, axis=1)),
    }


def data_spread(images: Float[Array, "n h w c"]) -> Float[Array, ""]:
    """The mean distance per √dim of two images that are drawn with replacement: over all pairs, i = j too."""
    y = images.reshape(len(images), -1)
    return jnp.mean(distances.distances(y, y))


def empirical_measure(images: Float[np.ndarray, "n h w c"], count: int = 256, solver: str = "heun") -> Measure:
    """A `Measure` of the exact sampler of a data set: `against_data` of `count` samples; one program a step count.

    The same seed starts from the same noise at every BNR and NFE, so differences between cells are less noisy than
    their intervals say.
    """
    if count < 2:
        raise ValueError(f"pairs of samples need at least 2 of them, not {count}")
    data = jnp.asarray(images)
    spread = data_spread(data)

    @functools.partial(jax.jit, static_argnums=3)
    def run(data: Array, bnr: Array, key: PRNGKeyArray, number: int) -> tuple[Array, dict[str, Array]]:
        process, predict = manifold.empirical(data, bnr)
        start_key, solver_key = jax.random.split(key)
        x = process.prior(start_key, (count, *process.image_shape))
        keys = jax.random.split(solver_key, count)
        samples, record = sampler.sample(predict, process, x, process.levels(number), solver=solver, keys=keys)
        return record.nfe, against_data(samples, data, spread)

    def measure(cell: Cell) -> tuple[int, Scores]:
        nfe, scores = run(data, jnp.float32(cell.bnr), jax.random.key(cell.seed), cell.steps)
        return int(nfe), {name: float(score) for name, score in scores.items()}

    return measure


def empirical_sweep(
    images: Float[np.ndarray, "n h w c"],
    bnrs: Sequence[float | int],
    steps: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    count: int = 256,
    solver: str = "heun",
    path: pathlib.Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Sweep]:
    """The three scores of `against_data` for the exact sampler of `images`, by name. Resumable with a `path`.

    `say` is told of each cell; what it raises ends the sweep, and what is done is kept.
    """
    digest = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
    depends = {"images": digest, "shape": list(np.shape(images)), "count": count, "solver": solver}
    rows = []
    for row in sweep(cells(bnrs, steps, seeds), empirical_measure(images, count, solver), path, depends):
        rows.append(row)
        say(f"BNR {row['bnr']:g}, {row['steps']} steps, seed {row['seed']}: energy {row['scores']['energy']:.4g}")
    return {name: collect(rows, name) for name in rows[0]["scores"]}
