"""A self-test of some seconds: what a backend may get wrong without saying so, against numbers from elsewhere."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from warm_jax.data import sources
from warm_jax.diffusion import bnr, dct, oracle, process, sampler
from warm_jax.doctor.judge import Check
from warm_jax.experiments import experiment
from warm_jax.runtime import mesh
from warm_jax.training import step

# Of numbers around 1: float32 leaves 1e-6; TF32's ten bits leave 1e-3, bfloat16's seven 1e-2.
MOST_ERROR = 2e-5
# W2 / ‖√P‖ of Heun's 17 evaluations at BNR 0.5, by a numpy float64 implementation that is not this one.
GAUSSIAN_W2 = 0.2607
_TRAIN_STEPS = 8


def _measured(subject: str, measure: Callable[[], tuple[str, float]], least: float | int, most: float) -> Check:
    started = time.perf_counter()
    try:
        said, value = measure()
        return Check(subject, said, value, least, most, time.perf_counter() - started)
    except Exception as error:  # whatever a broken backend raises: the other checks go on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return Check(subject, "", math.nan, least, most, time.perf_counter() - started, reason)


def _images() -> np.ndarray:
    return np.random.RandomState(0).normal(size=(4, 64, 64, 3))


def round_trip() -> tuple[str, float]:
    """The largest error of idct2(dct2(x)), with what a product at default precision loses beside it."""
    x = _images()
    error = float(np.abs(np.asarray(jax.jit(lambda x: dct.idct2(dct.dct2(x)))(jnp.asarray(x, jnp.float32))) - x).max())
    q = dct.matrix(64)
    plain = jax.jit(lambda q, x: q @ x)(jnp.asarray(q, jnp.float32), jnp.asarray(x[0, ..., 0], jnp.float32))
    lost = float(np.abs(np.asarray(plain, np.float64) - q @ x[0, ..., 0]).max())
    kind = "float32" if lost < MOST_ERROR else "less than float32, for convolutions alone"
    return f"largest error {error:.1e}, limit {MOST_ERROR:.0e}; default products lose {lost:.1e} ({kind})", error


def blur() -> tuple[str, float]:
    """The largest difference of a blur of 2 pixels from scipy's DCT in float64."""
    x, alpha = _images(), 2.0
    frequencies = np.pi * np.arange(64) / 64
    a = np.exp(-(alpha**2) * (frequencies[:, None] ** 2 + frequencies**2) / 2)[..., None]
    expected = scipy.fft.idctn(a * scipy.fft.dctn(x, axes=(1, 2), norm="ortho"), axes=(1, 2), norm="ortho")
    found = np.asarray(jax.jit(lambda x: dct.blur(x, alpha))(jnp.asarray(x, jnp.float32)))
    error = float(np.abs(found - expected).max())
    return f"largest error {error:.1e} against float64, limit {MOST_ERROR:.0e}", error


def gaussian() -> tuple[str, float]:
    """W2 / ‖√P‖ of Heun's samples of Gaussian data of power P, by the exact predictor, in the device's float32.

    That sampler acts on each frequency alone: run on β_max in every one, it shows their standard deviations.
    """
    frequencies = np.pi * np.arange(32) / 32
    power = 1 / (frequencies[:, None] ** 2 + frequencies**2 + 0.5 * (np.pi / 32) ** 2)
    power *= 0.25 / power.mean()
    warm = process.warm((32, 32, 1), bnr.constant(0.5))
    predict = oracle.gaussian(warm, power)

    def gains(levels: Float[Array, " n"]) -> Float[Array, "h w"]:
        x = dct.idct2(jnp.full((1, 32, 32, 1), levels[0]))
        return dct.dct2(sampler.sample(predict, warm, x, levels, solver="heun")[0])[0, ..., 0]

    gain = np.asarray(jax.jit(gains)(jnp.asarray(warm.levels(9), jnp.float32)), np.float64)
    value = float(np.linalg.norm(np.abs(gain) - np.sqrt(power)) / np.linalg.norm(np.sqrt(power)))
    return f"W2 {value:.4f} after 17 evaluations, known to be {GAUSSIAN_W2:.4f}", value


def training(config: ConfigDict) -> tuple[str, float]:
    """How much of the loss is left after some steps on one batch, with the same noise each time."""
    exp = experiment.on(experiment.build(config), mesh.make_mesh(1, local=True))
    source = sources.open_source("bundled")
    images, labels = source.read(np.arange(config.train.batch_size))
    compiled, state = step.compile_step(exp), step.init_state(exp)
    number = int(config.train.warmup_images / config.train.batch_size) + 1  # the full learning rate
    losses = []
    for _ in range(_TRAIN_STEPS):
        same = mesh.replicated(exp.mesh)
        state = state._replace(step=jax.device_put(np.int32(number), same))
        totals = jax.device_put(step.zero_totals(), same)
        state, _, value = compiled(state, totals, images, labels.astype(np.int32))
        losses.append(float(value))
    if not np.isfinite(losses).all():
        return f"the loss is not finite: {losses}", math.nan
    return f"loss {losses[0]:.0f} to {losses[-1]:.0f} in {_TRAIN_STEPS} steps", losses[-1] / losses[0]


def matmul() -> tuple[str, float]:
    """TFLOP/s of a square product, the best of three."""
    on_cpu = jax.default_backend() == "cpu"
    n = 1024 if on_cpu else 8192
    said, best = [], 0.0
    for dtype in (jnp.float32,) if on_cpu else (jnp.float32, jnp.bfloat16):
        a = jnp.ones((n, n), dtype)
        product = jax.jit(lambda a: a @ a)
        product(a).block_until_ready()
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            product(a).block_until_ready()
            seconds.append(time.perf_counter() - started)
        best = 2 * n**3 / min(seconds) / 1e12
        said.append(f"{best:.3g} TFLOP/s {jnp.dtype(dtype).name}")
    return f"{', '.join(said)}, {n} × {n} on one device", best


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """On a CPU compiles with less care: well compiled, the train step takes a core half a minute."""
    before = jax.config.read("jax_disable_most_optimizations")
    try:
        jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu" or before)
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def run(smoke: ConfigDict | None) -> Iterator[Check]:
    """Each measurement as it is made; a train step of `smoke`, where there is that config."""
    yield _measured("DCT", round_trip, 0, MOST_ERROR)
    yield _measured("blur", blur, 0, MOST_ERROR)
    yield _measured("sampler", gaussian, GAUSSIAN_W2 - 2e-4, GAUSSIAN_W2 + 2e-4)
    if smoke is not None:
        with _quickly():
            yield _measured("train step", lambda: training(smoke), 0, 0.95)
    yield _measured("speed", matmul, 0, math.inf)
