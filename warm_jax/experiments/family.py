"""The systems of the comparison by name: how a config's `process` section becomes a `Process`, and what goes with it.

This table is all that tells one system from another: everything else is the same code.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from warm_jax.diffusion import bnr, coloured, information, process, systems
from warm_jax.diffusion.process import Process
from warm_jax.experiments import process_files

START_IMAGES = 2048  # at most so many images are kept to start from


class Measured(NamedTuple):
    """What a process may need to know of the data: mean DCT power, and low DCT coefficients of images to start from.

    `digest` is the SHA-256 of the process's own file, where it has one: what it was when this was measured.
    """

    power: Float[np.ndarray, "h w"]
    start: Float[np.ndarray, "n k l c"] | None = None
    digest: UInt8[np.ndarray, "32"] | None = None


class System(NamedTuple):
    """A row of the table.

    Attributes:
      build: (image shape, config.process, measured) -> its process.
      preconditionings: The names in `denoiser.CHOICES` that make sense, its own first.
      measures: Whether the process always needs the data's power, or the images that it starts from.
    """

    build: Callable[[tuple[int, int, int], ConfigDict, Measured], Process]
    preconditionings: tuple[str, ...]
    measures: bool = False


def _levels(settings: ConfigDict) -> dict[str, float]:
    return {name: settings[name] for name in ("beta_min", "beta_max", "rho", "P_mean", "P_std")}


def _schedule(settings: ConfigDict, name: str, ratio: float | str | None, measured: Measured) -> bnr.Schedule:
    """A BNR schedule by name; ValueError with the choices."""
    schedules = {
        "constant": lambda: bnr.constant(ratio),
        "information_budget": lambda: bnr.capped(
            bnr.information_budget(measured.power, settings.information_budget), settings.bnr_max
        ),
    }
    if name not in schedules:
        raise ValueError(f"unknown BNR schedule {name!r}; choose one of {', '.join(schedules)}")
    return schedules[name]()


def _hot(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    return process.hot(shape, **_levels(settings))


def _warm(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    if settings.schedule == "constant" and settings.bnr == 0:
        return process.hot(shape, **_levels(settings))
    schedule = _schedule(settings, settings.schedule, settings.bnr, measured)
    return process.warm(shape, schedule, **_levels(settings))


def _amortised(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    draw = bnr.log_uniform(settings.bnr_min, settings.bnr_max, settings.bnr_zero)
    return process.amortised(shape, draw, **_levels(settings))


def _pfgmpp(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    return process.pfgmpp(shape, settings.augmented_dims, **_levels(settings))


def _ddpm(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    return systems.ddpm(shape, settings.schedule, settings.steps)


def _blurring(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    return systems.blurring(shape, settings.blur_max, settings.d_min)


def _start(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured, alpha: float) -> systems.Start:
    starts = {
        "images": lambda: systems.blurred_images(shape, measured.start, alpha),
        "colours": lambda: systems.mean_colours(shape, measured.start),
    }
    if settings.start not in starts:
        raise ValueError(f"process.start is {settings.start!r}; choose one of {', '.join(starts)}")
    return starts[settings.start]()


def _ihdm(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    start = _start(shape, settings, measured, settings.blur_max)
    return systems.ihdm(shape, start, settings.steps, settings.blur_min, settings.blur_max, settings.noise)


def _cold(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    blurs = systems.cold_blurs(systems.cold_kernels(settings.kernels, settings.steps), settings.kernel_size)
    start = _start(shape, settings, measured, blurs[-1].item())
    return systems.cold(shape, start, blurs, settings.symmetry_noise)


def _colour(settings: ConfigDict, measured: Measured) -> coloured.Colour:
    """The colour that `process.colour` names; ValueError with the choices."""
    power = measured.power
    colours = {
        "equal_snr": lambda: coloured.equal_snr(power),
        "flipped_snr": lambda: coloured.flipped_snr(power),
        "power_law": lambda: coloured.power_law(power, settings.theta),
        "band": lambda: coloured.band(power, settings.band_low, settings.band_high, settings.band_floor),
    }
    if settings.colour not in colours:
        raise ValueError(f"process.colour is {settings.colour!r}; choose one of {', '.join(colours)}")
    return colours[settings.colour]()


def _coloured(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    return coloured.coloured(_ddpm(shape, settings, measured), _colour(settings, measured))


def _coloured_warm(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    white = process.warm(shape, bnr.constant(settings.bnr), blurs=settings.bnr > 0, **_levels(settings))
    return coloured.coloured(white, _colour(settings, measured))


def _heat_flow(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    return coloured.heat_flow(shape, settings.scale_min)


def _own(shape: tuple[int, int, int], settings: ConfigDict, measured: Measured) -> Process:
    return process_files.load(settings.file, shape, measured.power, measured.digest)


_HEADS = ("edm", "spectral", "clean", "clean_residual", "noise_residual")
SYSTEMS = {
    "hot": System(_hot, ("edm", "spectral", "noise_residual")),
    "warm": System(_warm, _HEADS),
    "amortised": System(_amortised, _HEADS, measures=True),
    "pfgmpp": System(_pfgmpp, ("edm", "noise_residual")),
    "ddpm": System(_ddpm, ("noise", "edm")),
    "blurring": System(_blurring, ("noise", "edm")),
    "ihdm": System(_ihdm, ("one_step",), measures=True),
    "cold": System(_cold, ("direct",), measures=True),
    "coloured": System(_coloured, ("noise", "edm"), measures=True),
    "coloured_warm": System(_coloured_warm, _HEADS, measures=True),
    "heat_flow": System(_heat_flow, ("velocity", "edm", "clean")),
    "own": System(_own, (*_HEADS, "noise", "velocity"), measures=True),
}


def of(config: ConfigDict) -> System:
    """The system that `process.system` names; ValueError with the choices, and for a BNR on a system that has none."""
    name, ratio = config.process.system, config.process.get("bnr")
    if name not in SYSTEMS:
        raise ValueError(f"process.system is {name!r}; choose one of {', '.join(SYSTEMS)}")
    if ratio is not None and name not in ("warm", "coloured_warm") and not (name == "hot" and ratio == 0):
        why = "draws it for each image, from bnr_min to bnr_max" if name == "amortised" else "has none"
        raise ValueError(
            f"process.bnr is {ratio}; {name} {why}: leave process.bnr unset, or use :warm, whose process.bnr is one "
            "number, or :amortised, which is sampled at any sample.bnr"
        )
    return SYSTEMS[name]


def sampled_bnr(config: ConfigDict) -> float | str | None:
    """The BNR that samples follow, or the name of their schedule; None for a system without one."""
    trained, sample = config.process, config.sample
    if trained.system not in ("warm", "amortised"):
        return trained.get("bnr")
    if "information_budget" in (sample.schedule, trained.get("schedule")):
        return "information_budget"
    if trained.system == "warm":
        return trained.bnr
    # The paper's choice, or the nearest that was trained.
    return min(max(0.5, trained.bnr_min), trained.bnr_max) if sample.bnr is None else sample.bnr


def to_sample(config: ConfigDict, trained: Process, measured: Measured) -> Process:
    """The process that `sample.bnr` and `sample.schedule` ask for, on the grid of `sample.beta_min` and `sample.rho`.

    ValueError where the model knows no other, or where the BNR lies outside what it was trained on.
    """
    followed, levels, choice = _followed(config, trained, measured), _levels_asked(config.sample), config.sample.levels
    if choice not in (None, "edm", "information"):
        raise ValueError(
            f"sample.levels is {choice!r}; choose edm or information, or leave it unset for the system's own"
        )
    if levels and choice == "information":
        raise ValueError(f"sample.levels is information, but sample.{next(iter(levels))} is of EDM's grid: unset one")
    if choice == "information":
        return dataclasses.replace(followed, grid=information.grid(followed, measured.power))
    if choice == "edm" and "rho" not in config.process:
        raise ValueError(f"sample.levels is edm, but {config.process.system} has not EDM's grid: leave it unset")
    if not levels:
        return followed
    if "rho" not in config.process:
        name, value = next(iter(levels.items()))
        raise ValueError(f"sample.{name} is {value}, but {config.process.system} has not EDM's grid: leave it unset")
    own = {name: config.process[name] for name in ("beta_min", "beta_max", "rho")}
    return dataclasses.replace(followed, grid=process.edm_grid(**own | levels))


def to_train(config: ConfigDict, made: Process, measured: Measured) -> Process:
    """The process with the levels that `train.levels` asks for, its own where that is unset. ValueError as above."""
    choice = config.train.get("levels")  # older configs have no such key
    if choice not in (None, "information"):
        raise ValueError(f"train.levels is {choice!r}; it must be information, or unset for the system's own")
    if choice is None:
        return made
    return dataclasses.replace(made, draw_levels=information.uniform(made, measured.power))


def _levels_asked(sample: ConfigDict) -> dict[str, float]:
    return {name: sample[name] for name in ("beta_min", "rho") if sample[name] is not None}


def _followed(config: ConfigDict, trained: Process, measured: Measured) -> Process:
    """The process at the BNR that is asked for; of all but an amortised model the trained one."""
    settings, wanted, schedule = config.process, config.sample.bnr, config.sample.schedule
    if trained.follow is None:
        known = settings.get("schedule", "constant") if settings.system == "warm" else None
        if schedule is not None and schedule != known:
            raise ValueError(f"sample.schedule is {schedule}; only an amortised model can be sampled on any: unset it")
        if wanted is not None and (known == "information_budget" or wanted != settings.get("bnr")):
            at = f"on the {known} schedule" if known == "information_budget" else f"at BNR {settings.get('bnr')}"
            raise ValueError(
                f"sample.bnr is {wanted}, but this network was trained {at} and knows no other; leave it unset, "
                "or train with another process.bnr, or an :amortised model"
            )
        return trained
    if wanted is not None and wanted != 0 and not settings.bnr_min <= wanted <= settings.bnr_max:
        raise ValueError(
            f"sample.bnr is {wanted}; this network was trained from {settings.bnr_min} to {settings.bnr_max}"
            f"{', and at 0' if settings.bnr_zero > 0 else ''}"
        )
    if wanted == 0 and settings.bnr_zero == 0:
        raise ValueError("sample.bnr is 0; this network was trained with process.bnr_zero = 0 and never saw it")
    if schedule == "information_budget" and wanted is not None:
        raise ValueError(f"sample.bnr is {wanted} and sample.schedule is {schedule}; set one of them")
    follow = _schedule(settings, schedule or "constant", sampled_bnr(config), measured)
    if schedule == "information_budget":  # which asks for less and less at high noise: no less than was trained
        budget = follow
        follow = lambda beta: jnp.maximum(budget(beta), settings.bnr_min * beta)  # noqa: E731
    return trained.follow(follow)
