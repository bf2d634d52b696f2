"""A trained model as a restorer: an image of known blur and noise is a state of its process, so the model restores it.

    restore = warm_jax.restorer("runs/restoration")
    clean = restore(image, alpha=1.5, beta=25 / 127.5)             # float32 [h, w, c] in [-1, 1], of any size
    draws = restore.samples(image, 1.5, 25 / 127.5, count=4)       # [4, h, w, c], from the posterior

The photograph x = B_α x0 + β ε is the state at t = β of the process with BNR α / β (docs/method.md §14). One evaluation
of the model gives the posterior mean of x0, D̂ + R̂, which no estimate beats in mean squared error. Draws from the
posterior are made by running the process back from there, step by step, with fresh noise.

Why `ancestral`: (x0, x_t) have the law of the corruption only if time is reversed on the forward process itself, a
Markov chain that adds blur and noise; each ancestral step draws from p(x_j | x_i, x0 = x̂0), its reversal. The
ordinary differential equation has the right marginals, but takes one state to one image; churn beyond the forward
process's own noise forgets the photograph.

The steps are of first order, and too few of them make draws too much alike: of Gaussian images (power about 1/f²,
28×28, computed in closed form) the mean is the posterior's exactly, and of its variance there is, at 18 / 36 / 100 /
400 steps,

    α = 1, β = 0.3   0.76  0.87  0.95  0.98
    α = 0, β = 0.2   0.80  0.89  0.95  0.98
    α = 2, β = 0.1   0.68  0.82  0.92  0.97
"""

import dataclasses
import itertools
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree

from warm_jax import api
from warm_jax.diffusion import dct, guidance, process, sampler
from warm_jax.experiments import experiment
from warm_jax.restoration import limits, tiles
from warm_jax.runtime import mesh

# Samples hold the whole image, in frequencies too, matrices of its sides, and all draws of it.
SAMPLE_PIXELS, SAMPLE_SIDE, SAMPLE_NUMBERS = 1 << 22, 1 << 13, 1 << 28


def _of_size(small: process.Process, shape: tuple[int, int, int]) -> process.Process:
    """The process on images of another size, for those whose attenuation is their blur's (EDM's family)."""
    height, width, _ = shape
    return dataclasses.replace(
        small, image_shape=shape, attenuation=lambda t: dct.attenuation(small.blur(t), height, width)
    )


class Restorer:
    """Restores images of any size, of levels that the model knows (they are not checked here: `limits`).

    Compiled once for all means, and for samples once for each size of image. An image smaller than a tile is mirrored
    up to it; as its noise then comes twice and counts for more than it tells, draws of it are too much alike near the
    lower and right border. (Of Gaussian images as below, 20×28 in a tile of 28×28, at
    α = 1 and β = 0.3 the last row has 0.69 of the variance that the first has, where they should be alike.)

    Args:
      exp: A trained experiment of EDM's family, on the devices of this process.
      weights: Its weights, replicated over them.
      batch_size: Tiles at a time, rounded up to a multiple of the devices; None: `sample.batch_size`.
      overlap: Pixels that neighbouring tiles share, (down, across); None: half a tile.
    """

    def __init__(
        self,
        exp: experiment.Experiment,
        weights: PyTree,
        batch_size: int | None = None,
        overlap: tuple[int, int] | None = None,
    ):
        wanted, devices = batch_size or exp.config.sample.batch_size, exp.mesh.size
        self.batch_size = -(-wanted // devices) * devices
        self.tile = exp.process.image_shape[:2]
        self.overlap = tiles.halves(self.tile) if overlap is None else overlap
        self._exp, self._weights = exp, weights
        same, split = mesh.replicated(exp.mesh), mesh.split(exp.mesh)
        self._clean = jax.jit(self._clean_tiles, in_shardings=(same, split, same, same), out_shardings=same)
        self._draw = jax.jit(self._samples, in_shardings=same, out_shardings=same)

    def __call__(self, image: Float32[np.ndarray, "h w c"], alpha: float, beta: float) -> Float32[np.ndarray, "h w c"]:
        """The posterior mean of the sharp and clean image: one evaluation, the best in mean squared error.

        Args:
          image: In [-1, 1] and beyond where noise took it; grey or RGB, whichever the model was trained on.
          alpha: Its blur, the standard deviation of a Gaussian in pixels, ≥ 0.
          beta: Its noise, in units of x, > 0: σ / 127.5 of one in grey levels of 256.

        Returns:
          The restored image, not clipped. FloatingPointError where it is not finite; ValueError for arguments beyond
          those ranges.
        """
        _check(image, alpha, beta)
        beta = beta * self.noise_factor(image.shape[2])
        return self._in_channels(image, beta, lambda x: self._mean(x, alpha, beta))

    def samples(
        self, image: Float32[np.ndarray, "h w c"], alpha: float, beta: float, count: int
    ) -> Float32[np.ndarray, "n h w c"]:
        """`count` draws from the posterior of the sharp and clean image; the arguments as above.

        Draw i is a function of i and the image. ValueError also for more than `SAMPLE_PIXELS` pixels, `SAMPLE_SIDE` of
        a side or `SAMPLE_NUMBERS` numbers in all.
        """
        _check(image, alpha, beta)
        if count < 1:
            raise ValueError(f"{count} draws; it must be at least 1")
        height, width = (max(pair) for pair in zip(image.shape, self.tile, strict=False))  # mirrored up to a tile
        for given, limit, what in (
            (height * width, SAMPLE_PIXELS, f"{width}×{height} pixels are too many to draw samples of"),
            (max(height, width), SAMPLE_SIDE, f"a side of {max(height, width)} pixels is too long to draw samples of"),
            (height * width * image.shape[2] * count, SAMPLE_NUMBERS, f"{count} draws are too many numbers at once"),
        ):
            if given > limit:
                remedy = "ask for fewer, or cut out a part" if "draws" in what else "cut out a part"
                raise ValueError(
                    f"{what}, the limit is {limit:,}; {remedy}, or take --estimate=mean, which goes tile by tile"
                )
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(_seed(image)), i))(jnp.arange(count))
        beta = beta * self.noise_factor(image.shape[2])
        return self._in_channels(image, beta, lambda x: self._posterior(x, alpha, beta, keys))

    def noise_factor(self, channels: int) -> float:
        """How much more noise the model is told of an image of so many channels: √3 of a grey one by a model of RGB.

        Three equal channels with one noise are no state of the process, whose channels have noise of their own. But
        with more noise, of colour alone, which tells nothing and hides nothing of grey, they are: at level √3 β. (Told
        β, a small model of CIFAR-10 left much of it: 1.4 to 1.9 dB less, on three photographs at σ of 10 and 25.)
        """
        own = self._exp.process.image_shape[2]
        return own**0.5 if channels == 1 else 1.0

    def _in_channels(self, image: np.ndarray, beta: float, restored: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """`restored`: images `[b, h, w, c]` of the model's channels, of noise `beta` -> `[*n, b, h, w, c]`.

        A grey image on an RGB model gets colours of noise, and then their mean; a colour image on a grey model is three
        images.
        """
        own, given = self._exp.process.image_shape[2], image.shape[2]
        if own == given:
            return restored(image[None])[..., 0, :, :, :]
        if given == 1:
            noise = np.random.default_rng([_seed(image), 2]).standard_normal((*image.shape[:2], own), np.float32)
            colours = image + np.float32(beta) * (noise - noise.mean(-1, keepdims=True))
            return restored(colours[None])[..., 0, :, :, :].mean(-1, keepdims=True)
        return np.moveaxis(restored(np.moveaxis(image, 2, 0)[..., None])[..., 0], -3, -1)

    # ── One evaluation ───────────────────────────────────────────────────────────────────────────────────────────────

    def _predictor(self, weights: PyTree, ratio: Array) -> tuple[process.Process, process.Predict]:
        """The process of a tile at BNR `ratio`, which only an amortised model heeds, and its predictor."""
        config = self._exp.config
        small = self._exp.process
        if small.follow is not None:
            small = small.follow(lambda beta: ratio * beta)
        model = self._exp.model.of(small)

        def predict(x: Array, t: Array) -> process.Prediction:
            one_hot = None
            if config.data.num_classes:
                label = -1 if config.sample.class_label is None else config.sample.class_label  # -1: none is told
                one_hot = jax.nn.one_hot(jnp.full(len(x), label), config.data.num_classes)
            return model.predict(weights, x, t, one_hot)

        return small, guidance.clip(predict, small) if config.sample.clip else predict

    def _clean_tiles(self, weights: PyTree, x: Array, ratio: Array, beta: Array) -> Array:
        """x̂0 of tiles `[b, h, w, c]`, all of one level."""
        _, predict = self._predictor(weights, ratio)
        prediction = predict(x, jnp.full(x.shape[:1], beta))
        return prediction.blurred + prediction.residual

    def _mean(self, images: np.ndarray, alpha: float, beta: float) -> np.ndarray:
        large = np.stack([tiles.reflected_up(image, self.tile) for image in images])
        one = tiles.tiling(*large.shape[1:3], self.tile, self.overlap)
        level = np.float32(alpha / beta), np.float32(beta)
        total, places = np.zeros_like(large), list(itertools.product(range(len(images)), range(len(one.corners))))
        for first in range(0, len(places), self.batch_size):
            part = places[first : first + self.batch_size]
            parts = [(i, *(slice(k, k + n) for k, n in zip(one.corners[j], self.tile, strict=True))) for i, j in part]
            cut = np.stack([large[where] for where in parts])
            cut = np.pad(cut, ((0, self.batch_size - len(cut)), (0, 0), (0, 0), (0, 0)))
            clean = jax.device_get(self._clean(self._weights, cut, *level))
            for (_, j), where, tile in zip(part, parts, clean, strict=False):
                total[where] += tile * one.rows[j][:, None, None] * one.columns[j][:, None]
        return _finite(total[:, : images.shape[1], : images.shape[2]])

    # ── Draws from the posterior ─────────────────────────────────────────────────────────────────────────────────────

    def _samples(self, weights: PyTree, x: Array, keys: Array, ratio: Array, levels: Array) -> Array:
        """Runs the process back from states `[b, h, w, c]`, one key each."""
        small, predict = self._predictor(weights, ratio)
        same, split = mesh.replicated(self._exp.mesh), mesh.split(self._exp.mesh)

        def shared(x: Array, t: Array) -> process.Prediction:
            x, t = jax.lax.with_sharding_constraint((x, t), split)
            return jax.lax.with_sharding_constraint(predict(x, t), same)  # every device blends all tiles

        whole = tiles.tiled(shared, self.tile, self.overlap, self.batch_size)
        return sampler.sample(whole, _of_size(small, x.shape[1:]), x, levels, solver="ancestral", keys=keys)[0]

    def _posterior(self, images: np.ndarray, alpha: float, beta: float, keys: Array) -> np.ndarray:
        # Sizes are not rounded up to share one program: what is mirrored has no noise of its own.
        large = np.stack([tiles.reflected_up(image, self.tile) for image in images])
        own = jax.vmap(lambda key: jax.random.split(key, len(images)))(keys).reshape(-1)
        states = len(images) * len(keys)  # one image after the other, draw by draw
        per_image = len(tiles.tiling(*large.shape[1:3], self.tile, self.overlap).corners)
        group = max(1, min(states, self.batch_size // per_image))
        levels = self.levels(beta).astype(np.float32)
        drawn = []
        for first in range(0, states, group):
            chosen = np.minimum(np.arange(first, first + group), states - 1)
            begun = large[chosen % len(images)]
            found = self._draw(self._weights, begun, own[chosen], np.float32(alpha / beta), levels)
            drawn.append(jax.device_get(found)[: states - first])
        whole = np.concatenate(drawn)[:, : images.shape[1], : images.shape[2]]
        return _finite(whole.reshape(len(keys), len(images), *whole.shape[1:]))

    def levels(self, beta: float) -> np.ndarray:
        """The levels that draws go through: `sample.steps` of the process's grid from β to the least trained, and 0."""
        of, steps = self._exp.config.process, self._exp.config.sample.steps
        least = limits.trained_noise(of.beta_min, of.beta_max, of.P_mean, of.P_std)[0]
        if beta <= least:
            return np.array([beta, 0.0])
        return process.hot((1, 1, 1), beta_min=least, beta_max=beta, rho=of.rho).levels(steps)


def _check(image: np.ndarray, alpha: float, beta: float) -> None:
    """Raises ValueError where they are no photograph's."""
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"an image of shape {image.shape}; it must be [height, width, channels], of 1 or 3 channels")
    if not 0 <= alpha < np.inf:
        raise ValueError(f"alpha={alpha}; blur must be a number of pixels, at least 0")
    if not 0 < beta < np.inf:
        raise ValueError(f"beta={beta}; noise must be more than 0, in units of x: σ / 127.5 of one in grey levels")


def _seed(image: np.ndarray) -> int:
    """A number below 2^32 that is a function of the image's content."""
    return zlib.crc32(np.ascontiguousarray(image).data)


def noisier(image: Float32[np.ndarray, "h w c"], beta: float, wanted: float) -> Float32[np.ndarray, "h w c"]:
    """The image of noise `beta` with more added, so that it has `wanted`; the noise is a function of the image."""
    noise = np.random.default_rng([_seed(image), 1]).standard_normal(image.shape, np.float32)
    return image + np.float32(np.sqrt(wanted**2 - beta**2)) * noise


def _finite(images: np.ndarray) -> np.ndarray:
    if not np.isfinite(images).all():
        raise FloatingPointError("the restored image is not finite; the weights are broken, or the image's numbers are")
    return images


def load(workdir: "str | pathlib.Path | api.Model", checkpoint: int = -1, **settings: Any) -> Restorer:
    """The restorer of a workdir's model, from its checkpoint of a step (-1: the latest), or of a loaded model.

    `settings` are of the config's `sample` section, as steps=50, batch_size=256. Errors as of `warm_jax.load`;
    ValueError also where such a system cannot restore.
    """
    if isinstance(workdir, api.Model):
        model = workdir.sampled_with(**settings) if settings else workdir
    else:
        model = api.load(workdir, checkpoint, **settings)
    limits.check_system(model.experiment.config.process.system)
    local = experiment.on(model.experiment, mesh.make_mesh(local=True))
    return Restorer(local, model.weights)
