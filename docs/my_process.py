"""Blur of half a pixel a unit of noise, and noise that turns from white to the images' own colour as it grows."""

import dataclasses

import jax.numpy as jnp

from warm_jax.diffusion import coloured, dct, process


def make(image_shape, power):
    height, width, _ = image_shape
    full = jnp.asarray(coloured.equal_snr(power), jnp.float32)[..., None]  # [h, w, 1]

    def colour(t):  # factor on the noise of each frequency, [..., h, w, 1]
        return full ** (t / (1 + t))[..., None, None, None]

    def attenuation(t):  # what is left of each frequency
        return dct.attenuation(0.5 * t, height, width)

    hot = process.hot(image_shape)  # noise(t) = t, EDM's levels in training and sampling
    return dataclasses.replace(hot, blurs=True, blur=lambda t: 0.5 * t, attenuation=attenuation, colour=colour)
