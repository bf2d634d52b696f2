"""The way of samples from noise to images, for people: a strip of pictures and an animation.

States are not bounded: they are shown as σ_d x / √(σ_d² a₀² + s²), then clipped to [-1, 1] as any image. Here s and a₀
are the noise (rms over frequencies) and what is left of the mean colour at the state's level, and σ_d is
`model.sigma_data`. So every level is shown with about the contrast of the images, and the last state, where s = 0 and
a₀ = 1, as the sample itself.
"""

import math
import pathlib
import secrets
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from warm_jax.diffusion.process import Process
from warm_jax.runtime import pictures

MOST_SEEDS = 64
MOST_BYTES = 8 * 2**30  # of states and estimates, on all devices together
FRAMES = 48  # at most so many levels are kept
_COLUMNS = 10  # of the strip
_SECONDS, _LEAST, _MOST, _HOLD = 4.0, 0.06, 0.25, 2.5  # of an animation; of one frame; of the last one


class Trajectory(NamedTuple):
    """What some images looked like at each kept level, the highest first; the last is the end of the path.

    Attributes:
      states: x, scaled as the head of this file says. The last is the sample.
      clean: What the model made of them: x̂0 (of `stochastic`, of the state after its step up; of `heun`, at the first
        of a step's two evaluations); of `ihdm` the next, less blurred image. The last is the sample again.
    """

    states: UInt8[np.ndarray, "b n h w c"]
    clean: UInt8[np.ndarray, "b n h w c"]


def spread(count: int, most: int) -> Int[np.ndarray, " m"]:
    """At most `most` ≥ 2 of the numbers 0, …, `count` - 1, spread evenly, with the first and the last."""
    return np.unique(np.round(np.linspace(0, count - 1, min(count, most))).astype(np.int64))


def scales(process: Process, levels: Float[np.ndarray, " m"], sigma_data: float) -> Float[np.ndarray, " m"]:
    """What states at `levels` are multiplied with to be shown: σ_d / √(σ_d² a₀² + s²), float32."""
    t = jnp.asarray(levels, jnp.float32)
    mean_colour = np.asarray(process.attenuation(t)[..., 0, 0, 0], np.float64)
    noise = np.asarray(process.noise(t), np.float64)
    if process.colour is not None:
        noise = noise * np.sqrt(np.mean(np.square(process.colour(t)), axis=(-3, -2, -1), dtype=np.float64))
    return (sigma_data / np.hypot(sigma_data * mean_colour, noise)).astype(np.float32)


def captions(process: Process, levels: Float[np.ndarray, " m"]) -> dict[str, list[str]]:
    """What is known of each level, in three digits: its t where that is not the noise, noise, and blur in pixels."""
    t = jnp.asarray(levels, jnp.float32)
    noise, blur = np.asarray(process.noise(t)), np.asarray(process.blur(t))
    values = {} if np.array_equal(noise, t) else {"t": np.asarray(t)}
    values |= {"noise": noise} if noise.any() else {}
    values |= {"blur": blur} if process.blurs else {}

    def number(value: float) -> str:
        return np.format_float_positional(value, 3, fractional=False, trim="-")

    return {name: [number(value) for value in column.tolist()] for name, column in values.items()}


def check(count: int, steps: int, batch_size: int, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError where the states of `count` seeds are too many, or too large: all are kept at once."""
    if count > MOST_SEEDS:
        raise ValueError(
            f"--trajectory keeps every state of {count} seeds; at most {MOST_SEEDS}: name fewer, as --seeds=0-5"
        )
    needed = 2 * 4 * steps * batch_size * math.prod(image_shape)
    if needed > MOST_BYTES:
        raise ValueError(
            f"--trajectory keeps 2 × {steps} steps × {batch_size} images of {math.prod(image_shape):,} numbers, "
            f"{needed / 2**30:.1f} GiB; at most {MOST_BYTES / 2**30:.0f}: lower sample.batch_size or sample.steps"
        )


def strip(
    path: Trajectory, seeds: Int[np.ndarray, " b"], texts: dict[str, list[str]], estimate: str
) -> UInt8[np.ndarray, "gh gw c"]:
    """For each seed a row of states and a row of what the model made of them; some levels, named by `texts`."""
    columns, rows = spread(path.states.shape[1], _COLUMNS), []
    for i, seed in enumerate(seeds.tolist()):
        rows.append((f"seed {seed}: state", pictures.shrink(path.states[i, columns], 64)))
        rows.append((f"   {estimate}", pictures.shrink(path.clean[i, columns], 64)))
    heads = ["\n".join(texts), *("\n".join(values[column] for values in texts.values()) for column in columns)]
    return pictures.labelled_rows(rows, heads=heads)


def frames(path: Trajectory, texts: dict[str, list[str]], estimate: str) -> list[Image.Image]:
    """The pictures of the animation, one a level: all states in a grid at the left, at the right what was made of them.

    Of colour images each has a palette of its own, of 256 colours, and what lies between is dithered.
    """
    count, levels, height, _, channels = path.states.shape
    across = math.ceil(math.sqrt(count))
    side = min(96, max(28, 320 // across))
    scale, made, bar = max(1, round(side / height)), [], 18
    for level in range(levels):
        halves = [pictures.grid(pictures.shrink(which[:, level], side), across) for which in path]
        halves = [half.repeat(scale, 0).repeat(scale, 1) for half in halves]
        high, wide = halves[0].shape[:2]
        canvas = np.full((high + bar, 2 * wide + 8, channels), 255, np.uint8)
        canvas[bar:, :wide], canvas[bar:, wide + 8 :] = halves
        sheet = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
        draw, font, black = ImageDraw.Draw(sheet), ImageFont.load_default(12), (0,) * channels if channels > 1 else 0
        draw.text((2, 1), ", ".join(f"{name} {values[level]}" for name, values in texts.items()), fill=black, font=font)
        draw.text((wide + 10, 1), estimate, fill=black, font=font)
        made.append(sheet if channels == 1 else sheet.quantize(palette=sheet.quantize(256)))
    return made


def write(
    out: pathlib.Path, seeds: Int[np.ndarray, " b"], path: Trajectory, process: Process, levels: Float[np.ndarray, " m"]
) -> str:
    """Writes trajectory.png and trajectory.gif into the folder `out`, or beside the file; says what is where.

    `levels`: those of the `path`.
    """
    stem = f"{out.stem}_trajectory" if out.suffix in (".npz", ".png") else "trajectory"
    folder = out.parent if out.suffix in (".npz", ".png") else out
    estimate = "x0 estimate" if process.target is None else "next, less blurred"
    texts = captions(process, levels)
    pictures.save_png(folder / f"{stem}.png", strip(path, seeds, texts, estimate))
    images = frames(path, texts, estimate)
    each = min(_MOST, max(_LEAST, _SECONDS / len(images)))
    milliseconds = [round(1000 * each)] * (len(images) - 1) + [round(1000 * _HOLD)]
    part = folder / f".{stem}.gif.{secrets.token_hex(4)}"
    try:
        images[0].save(
            part, format="GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, disposal=1
        )
        part.replace(folder / f"{stem}.gif")
    finally:
        part.unlink(missing_ok=True)
    return f"{stem}.png and {stem}.gif ({len(images)} levels of {len(seeds)} seeds) in {folder}"
