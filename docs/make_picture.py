"""Draws docs/process.png, the picture at the head of the README, from a bundled image.

python docs/make_picture.py
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from warm_jax.data import sources
from warm_jax.diffusion import bnr, process
from warm_jax.runtime import pictures

LEVELS = [0.01, 0.2, 0.5, 1.0, 2.0, 5.0]
ROWS = [("noise only (BNR 0, EDM): x", 0.0, 0), ("blur and noise (BNR 0.5): x", 0.5, 0)]
ROWS += [("    to denoise: blurred image D", 0.5, 1), ("    to deblur: residual R", 0.5, 2)]
SIDE, GAP, LEFT, TOP = 84, 6, 300, 30


def main() -> None:
    image, _ = sources.open_source("bundled").read(np.array([0]))
    x0, t = pictures.from_uint8(jnp.repeat(image, len(LEVELS), 0)), jnp.asarray(LEVELS)
    height, width = TOP + len(ROWS) * (SIDE + GAP), LEFT + len(LEVELS) * (SIDE + GAP)
    canvas = Image.new("L", (width, height), 255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
    for column, level in enumerate(LEVELS):
        draw.text((LEFT + column * (SIDE + GAP) + 8, 5), f"noise {level:g}", fill=0, font=font)
    for row, (name, ratio, which) in enumerate(ROWS):
        states = process.warm((28, 28, 1), bnr.constant(ratio)).corrupt(jax.random.key(0), x0, t)
        top = TOP + row * (SIDE + GAP)
        draw.text((8, top + SIDE // 2 - 12), name, fill=0, font=font)
        for column, picture in enumerate(np.asarray(pictures.to_uint8(states[which]))):
            tile = Image.fromarray(picture[..., 0]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            canvas.paste(tile, (LEFT + column * (SIDE + GAP), top))
    canvas.save(pathlib.Path(__file__).with_name("process.png"), optimize=True)


if __name__ == "__main__":
    main()
