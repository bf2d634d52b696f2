"""Pictures of a run while it trains."""

import math
import pathlib

import jax
import numpy as np
from jaxtyping import PyTree, UInt8

from warm_jax.experiments import experiment
from warm_jax.runtime import mesh, pictures, pod
from warm_jax.sampling import batches

_IMAGES = 64


def sheet(images: UInt8[np.ndarray, "n h w c"], columns: int, classes: int) -> UInt8[np.ndarray, "gh gw c"]:
    """The images in a grid; where a column is a class, with the classes' numbers above."""
    if columns != classes:
        scale = pictures.scale_for_people(images)
        return pictures.grid(images, columns).repeat(scale, 0).repeat(scale, 1)
    rows = [("", images[start : start + columns]) for start in range(0, len(images), columns)]
    return pictures.labelled_rows(rows, heads=["class", *map(str, range(classes))])


class Preview:
    """Samples while training: one compilation, the same noise and classes every time, a PNG a step in `grids/`."""

    def __init__(self, exp: experiment.Experiment, workdir: pathlib.Path):
        self.folder, self.classes = workdir / "grids", exp.config.data.num_classes
        # A column a class, so that rows can be compared at a glance.
        self.columns = self.classes if 1 < self.classes <= 16 else math.isqrt(_IMAGES)
        count = min(_IMAGES, exp.config.sample.batch_size) // self.columns * self.columns or self.columns
        self.seeds = np.arange(count)
        self.labels = np.arange(count) % self.classes if self.classes else None
        self.draw = batches.Sampler(exp, batch_size=count)

    def __call__(self, step: int, ema: PyTree) -> str:
        """Draws with the weights `ema` and writes the grid of step `step`; says where it is, or why there is none."""
        try:
            ema = mesh.whole(self.draw.mesh, ema)
            self.draw.compile(ema)
            pod.gather("preview", "")
            images = self.draw(ema, self.seeds, self.labels).images
        except FloatingPointError as error:  # a picture is not worth a run
            return f"none: {error}"
        path = self.folder / f"{step:08d}.png"
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(exist_ok=True)
                pictures.save_png(path, sheet(images, self.columns, self.classes))
            except OSError as error:  # as of a full disk
                return f"none: {error}"
        return str(path)
