"""Draws docs/process.png, the picture at the head of the README: a photograph along the process, by BNR.

    pip install scikit-image
    python docs/make_picture.py

The photograph is scikit-image's `astronaut`: Eileen Collins, by NASA, in the public domain ("no known copyright
restrictions"). A part of it is made 64 pixels large, as the images that such models are trained on, and drawn twice as
large. The left half of a noisy image is the state x, the right half the same without its noise. States are shown as
σ_d x / √(σ_d² + β²), σ_d = 0.5, so with the contrast of an image at every level; the residual about grey.
"""

import pathlib

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from warm_jax.analysis import colours
from warm_jax.analysis.corruption import Corruption, corruption
from warm_jax.runtime import pictures

LEVELS = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0)
BNRS = (0.0, 0.5, 2.0, np.inf)
SIDE, TIMES, GAP, LEFT, TOP = 64, 2, 6, 254, 34
SIGMA_DATA = 0.5


def photograph() -> np.ndarray:
    """`[SIDE, SIDE, 3]` on [-1, 1]; without scikit-image the program ends with the remedy."""
    try:
        from skimage import data
    except ImportError:
        raise SystemExit("error: the photograph comes from scikit-image: pip install scikit-image") from None
    face = Image.fromarray(data.astronaut()).crop((96, 0, 352, 256))
    return np.asarray(face.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 127.5 - 1


def rows(found: Corruption) -> list[tuple[str, str, str, np.ndarray]]:
    """(heading, lines below it, colour, images `[level, h, w, c]`) of each row."""
    noisy = found.states * (SIGMA_DATA / np.sqrt(SIGMA_DATA**2 + found.betas**2))[..., None, None, None]
    noisy[..., SIDE // 2 :, :] = found.blurred[..., SIDE // 2 :, :]
    hot, warm, more, cold = ((colours.of_bnr(bnr), images) for bnr, images in zip(found.bnrs, noisy, strict=True))
    first, last = LEVELS[0], LEVELS[-1]

    def blur(ratio: float) -> str:
        return f"blur {ratio * first:g} to {ratio * last:g} px"

    return [
        ("BNR 0: hot (EDM)", "noise alone", *hot),
        ("BNR 0.5: warm", f"noise and {blur(0.5)}", *warm),
        ("     D", "     to denoise: blurred image", warm[0], found.blurred[1]),
        ("     R", "     to deblur: residual", warm[0], found.residual[1]),
        ("BNR 2", f"noise and {blur(2)}", *more),
        ("cold", f"{blur(2)} alone", *cold),
    ]


def coarse(values: np.ndarray, step: int) -> np.ndarray:
    """Bytes in steps, which nobody sees and a PNG holds in fewer bytes; grey (127, 128) is one of them."""
    return np.minimum((values.astype(int) + step // 2) // step * step, 255).astype(np.uint8)


def main() -> None:
    drawn = rows(corruption(jax.random.key(0), photograph(), BNRS, LEVELS))
    step = SIDE * TIMES + GAP
    canvas = Image.new("RGB", (LEFT + len(LEVELS) * step - GAP, TOP + len(drawn) * step - GAP), "white")
    draw, large, small = ImageDraw.Draw(canvas), ImageFont.load_default(22), ImageFont.load_default(17)
    draw.text((8, TOP // 2), "left: x; right: without noise", fill="black", font=small, anchor="lm")
    for column, level in enumerate(LEVELS):
        middle = LEFT + column * step + SIDE * TIMES // 2
        draw.text((middle, TOP // 2), f"noise {level:g}", fill="black", font=small, anchor="mm")
    for row, (heading, below, colour, images) in enumerate(drawn):
        top = TOP + row * step
        draw.text((8, top + 36), heading, fill=colour, font=large)
        draw.text((8, top + 68), below, fill="black", font=small)
        for column, image in enumerate(coarse(np.asarray(pictures.to_uint8(images)), 4)):
            tile = Image.fromarray(image.repeat(TIMES, 0).repeat(TIMES, 1))
            canvas.paste(tile, (LEFT + column * step, top))
    canvas.save(pathlib.Path(__file__).with_name("process.png"), optimize=True)


if __name__ == "__main__":
    main()
