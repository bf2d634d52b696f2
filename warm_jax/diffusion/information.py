r"""Levels from the spectrum: grids on which each step removes the same information.

A Gaussian image with DCT power P, seen at level t, tells

    I(t) = Σ_f ½ ln(1 + P[f] a(t)[f]² / s(t)[f]²)      nats

of itself (docs/method.md §4). I falls with t. On these grids it rises by the same amount with each step, between the
ends of the process's own grid; in training its levels are uniform in I. (arXiv 2603.19222 chooses schedules from the
spectrum of each image.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.diffusion.bnr import Power
from warm_jax.diffusion.noise import GAUSSIAN
from warm_jax.diffusion.process import Process

_FINE, _HALVINGS = 1000, 30  # steps of the process's own grid in which a level is looked for; then of bisection


def require(process: Process, power: Power) -> None:
    """Raises ValueError where a process has no such levels, or `power` is none of its images."""
    if power.shape != process.image_shape[:2]:
        raise ValueError(f"the spectrum is {power.shape}, the images are {process.image_shape[:2]}; measure it again")
    highest = jnp.asarray([process.highest], jnp.float32)
    if process.law is not GAUSSIAN or process.target is not None or not float(process.noise(highest)[0]) > 0:
        raise ValueError(
            "levels by information are of processes that add Gaussian noise, and of which x0 is predicted: leave them "
            "at the system's own"
        )


def nats(process: Process, power: Power, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """I(t); s(t) > 0."""
    ratio = process.attenuation(t) / process.deviation(t)
    return jnp.sum(0.5 * jnp.log1p(jnp.asarray(power, t.dtype)[..., None] * jnp.square(ratio)), axis=(-3, -2, -1))


def _own(process: Process, power: Power) -> tuple[np.ndarray, np.ndarray]:
    """The process's own levels above its end, falling, and I there; float32."""
    require(process, power)
    levels = jnp.asarray(process.levels(_FINE)[:-1], jnp.float32)
    return np.asarray(levels), np.asarray(jax.jit(lambda t: jax.lax.map(lambda t: nats(process, power, t), t))(levels))


def grid(process: Process, power: Power) -> Callable[[int], np.ndarray]:
    """n -> n levels from the highest to the lowest of the process's own grid, equally far apart in I, and its end."""
    fine, found = _own(process, power)

    def levels(n: int) -> np.ndarray:
        if n == 1:
            return np.array([fine[0], 0.0], np.float64)
        wanted = np.linspace(found[0], found[-1], n)
        after = np.clip(np.searchsorted(found, wanted), 1, len(fine) - 1)

        def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            more, less = bounds  # noise
            middle = (more + less) / 2
            enough = jax.lax.map(lambda t: nats(process, power, t), middle) >= jnp.asarray(wanted, jnp.float32)
            return jnp.where(enough, more, middle), jnp.where(enough, middle, less)

        more, less = jax.jit(lambda bounds: jax.lax.fori_loop(0, _HALVINGS, halve, bounds))(
            (jnp.asarray(fine[after - 1]), jnp.asarray(fine[after]))
        )
        inside = (np.asarray(more, np.float64) + np.asarray(less, np.float64)) / 2
        return np.concatenate([fine[:1], inside[1:-1], fine[-1:], [0.0]]).astype(np.float64)

    return levels


def uniform(process: Process, power: Power) -> Callable[[PRNGKeyArray, int], Float[Array, " n"]]:
    """(key, n) -> levels `[n]` for training, I of which is uniform between the ends of the process's own grid."""
    fine, found = _own(process, power)

    def draw(key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        wanted = jax.random.uniform(key, (n,), jnp.float32, found[0].item(), found[-1].item())
        return jnp.interp(wanted, jnp.asarray(found), jnp.asarray(fine))

    return draw
