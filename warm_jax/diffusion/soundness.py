"""Whether a process is one: what its functions give at every level of its grid, before anything stands on them.

For processes that are written outside of the package. What is wrong is one line that names function, level and
frequency.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from warm_jax.diffusion import sampler
from warm_jax.diffusion.process import Process

_STEPS, _DRAWS = 32, 256
_RISE = 1e-3  # of ln SNR from one level to the next: what rounding to float32 may do


class UnsoundError(ValueError):
    """A process that is none."""


def check(process: object, image_shape: tuple[int, int, int]) -> None:
    """Raises UnsoundError where sampling or training would fail or find something else than x0.

    Shapes and finite values of all functions, and of their derivatives in t; a clean end, a = 1 and s = 0; s > 0
    elsewhere, c > 0, a ≥ 0; a signal-to-noise ratio that nowhere rises with t; known solvers. Errors that the functions
    raise themselves are not caught.
    """
    if not isinstance(process, Process):
        raise UnsoundError(f"it gives {type(process).__name__}; it must give a warm_jax.diffusion.process.Process")
    if tuple(process.image_shape) != image_shape:
        raise UnsoundError(f"image_shape is {process.image_shape}; the images are {image_shape}")
    unknown = [solver for solver in process.solvers if solver not in sampler.SOLVERS]
    if unknown or not process.solvers:
        raise UnsoundError(f"solvers is {process.solvers}; choose from {', '.join(sampler.SOLVERS)}")
    if "perturb" in process.solvers and process.colour is not None:
        raise UnsoundError("solver perturb adds white noise, and this process has a colour; leave it out of solvers")
    levels = _levels(process)
    values = _values(process, levels)
    _check_ranges(process, levels, values)
    _check_fall(levels, values)
    _check_draws(process)


def _levels(process: Process) -> np.ndarray:
    """The grid of 32 steps, the clean end first, float32."""
    found = np.asarray(process.levels(_STEPS))
    if found.shape != (_STEPS + 1,) or not np.all(np.isfinite(found)):
        raise UnsoundError(f"grid({_STEPS}) gives {found.shape} levels; it must give {_STEPS + 1} finite ones")
    if not np.all(np.diff(found) < 0) or found[-1] != 0 or found[0] > process.highest * (1 + 1e-6):
        raise UnsoundError(
            f"grid({_STEPS}) must fall from at most highest, {process.highest:g}, to 0; it gives {found[0]:g}, "
            f"{found[1]:g}, …, {found[-1]:g}"
        )
    return found[::-1].astype(np.float32)


def _values(process: Process, levels: np.ndarray) -> dict[str, np.ndarray]:
    """noise, blur `[n]`, attenuation and colour `[n, h, w]` at the levels; finite, and differentiable above 0."""
    n, (height, width, _) = len(levels), process.image_shape
    functions: dict[str, tuple[Callable[[Array], Array], tuple[int, ...]]] = {
        "noise": (process.noise, (n,)),
        "blur": (process.blur, (n,)),
        "attenuation": (process.attenuation, (n, height, width, 1)),
    }
    if process.colour is not None:
        functions["colour"] = (process.colour, (n, height, width, 1))
    values, t = {}, jnp.asarray(levels)
    for name, (function, shape) in functions.items():
        value = np.asarray(jax.jit(function)(t))
        if value.shape != shape:
            raise UnsoundError(f"{name} gives {value.shape} for {n} levels; it must give {shape}")
        _require_finite(name, value, levels)
        # That of a blur of √ has no derivative at its end, and needs none.
        if name != "blur":
            slope = np.asarray(jax.jit(lambda t, f=function: jax.jvp(f, (t,), (jnp.ones_like(t),))[1])(t[1:]))
            _require_finite(f"the derivative of {name}", slope, levels[1:])
        values[name] = value[..., 0] if value.ndim == 4 else value
    return values


def _require_finite(name: str, value: np.ndarray, levels: np.ndarray) -> None:
    wrong = np.argwhere(~np.isfinite(value))
    if len(wrong):
        raise UnsoundError(f"{name} is {value[tuple(wrong[0])]} at {_place(wrong[0], levels)}")


def _place(index: np.ndarray, levels: np.ndarray) -> str:
    frequency = f", frequency ({index[1]}, {index[2]})" if len(index) > 1 else ""
    return f"level {levels[index[0]]:.6g}{frequency}"


def _check_ranges(process: Process, levels: np.ndarray, values: dict[str, np.ndarray]) -> None:
    noise, left = values["noise"], values["attenuation"]
    for name, wrong, limit in (
        ("noise", noise[1:] <= 0, "above 0"),
        ("attenuation", left[1:] < 0, "at least 0"),
        ("blur", values["blur"][1:] < 0, "at least 0"),
        ("colour", values.get("colour", np.ones(len(levels)))[1:] <= 0, "above 0"),
    ):
        found = np.argwhere(wrong)
        if len(found):
            value = values[name][1:][tuple(found[0])]
            raise UnsoundError(f"{name} is {value:.6g} at {_place(found[0], levels[1:])}; it must be {limit}")
    if noise[0] != 0 or np.abs(left[0] - 1).max() > 1e-5:
        raise UnsoundError(
            f"level 0 must be the clean image, without noise and with attenuation 1; there noise is {noise[0]:.6g} and "
            f"attenuation from {left[0].min():.6g} to {left[0].max():.6g}"
        )
    uneven = np.argwhere(np.abs(left - left[:, :1, :1]) > 1e-5)
    if not process.blurs and len(uneven):
        raise UnsoundError(
            f"blurs is False, but attenuation at {_place(uneven[0], levels)} is not that of the mean; set blurs=True"
        )


def _check_fall(levels: np.ndarray, values: dict[str, np.ndarray]) -> None:
    with np.errstate(divide="ignore"):
        log_snr = 2 * (np.log(values["attenuation"][1:]) - np.log(values["noise"][1:])[:, None, None])
    log_snr = log_snr - 2 * np.log(values["colour"][1:]) if "colour" in values else log_snr
    with np.errstate(invalid="ignore"):
        rise = np.nan_to_num(np.diff(log_snr, axis=0), nan=0.0)  # nothing is left at either level
    at = np.unravel_index(np.argmax(rise), rise.shape)
    if rise[at] > _RISE:
        before, after = np.exp(log_snr[at]), np.exp(log_snr[(at[0] + 1, *at[1:])])
        raise UnsoundError(
            f"the signal-to-noise ratio, (attenuation / noise / colour)², rises at frequency ({at[1]}, {at[2]}): from "
            f"{before:.4g} at level {levels[at[0] + 1]:.6g} to {after:.4g} at {levels[at[0] + 2]:.6g}; it must fall"
        )


def _check_draws(process: Process) -> None:
    drawn: Float[np.ndarray, " n"] = np.asarray(process.draw_levels(jax.random.key(0), _DRAWS))
    if drawn.shape != (_DRAWS,):
        raise UnsoundError(f"draw_levels gives {drawn.shape} for {_DRAWS}; it must give ({_DRAWS},)")
    wrong = drawn[~(np.isfinite(drawn) & (drawn > 0))]
    if len(wrong):
        raise UnsoundError(f"draw_levels gives {wrong[0]}; levels in training must be finite and above 0")
