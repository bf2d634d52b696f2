"""Blur as matrices over the pixels of small images, in numpy float64 from scipy's DCT: answers not made by warm_jax."""

import numpy as np
import scipy.fft

H, W = 6, 8
SHAPE = (H, W, 1)
LAM = np.pi**2 * ((np.arange(H) / H)[:, None] ** 2 + (np.arange(W) / W) ** 2)
POWER = 0.3 / (LAM + 0.3)  # of Gaussian data
Q = np.kron(*(scipy.fft.dct(np.eye(n), axis=0, norm="ortho") for n in (H, W)))  # flat pixels to flat frequencies


def matrix(factor):
    """idct · diag(factor) · dct over flat pixels, for a factor `[H, W]` on each frequency."""
    return Q.T @ np.diag(np.ravel(factor)) @ Q


def gauss(alpha):
    """What a blur of `alpha` pixels leaves of each frequency."""
    return np.exp(-(alpha**2) * LAM / 2)


def filtered(x, factor):
    """Images `[..., h, w, c]` with each frequency multiplied by `factor` `[h, w]`."""
    z = scipy.fft.dctn(np.asarray(x, np.float64), axes=(-3, -2), norm="ortho")
    return scipy.fft.idctn(np.asarray(factor)[..., None] * z, axes=(-3, -2), norm="ortho")


def blurred(x, alpha):
    """Images `[..., h, w, c]` of any size, blurred by `alpha` pixels."""
    h, w = x.shape[-3:-1]
    lam = np.pi**2 * ((np.arange(h) / h)[:, None] ** 2 + (np.arange(w) / w) ** 2)
    return filtered(x, np.exp(-(alpha**2) * lam / 2))


def linear_alpha_bar(steps=1000):
    """ᾱ_0 = 1, ᾱ_k = Π (1 - β_i) of Ho et al. 2020, section 4, as a plain product: `[steps + 1]`."""
    return np.append(1.0, np.cumprod(1 - np.linspace(1e-4, 0.02, steps) * 1000 / steps))


def cosine_alpha_bar(t):
    """ᾱ(t) of Hoogeboom and Salimans 2022, appendix A: the logsnr from 10 to -10 along a cosine."""
    low, high = np.arctan(np.exp(-5.0)), np.arctan(np.exp(5.0))
    logsnr = -2 * np.log(np.tan(low + np.asarray(t, np.float64) * (high - low)))
    return 1 / (1 + np.exp(-logsnr))


def blurring_schedule(t, blur_max=20.0, d_min=0.001, lam=LAM):
    """(α_t `[h, w]`, σ_t) of Hoogeboom and Salimans 2022 at a scalar t > 0."""
    alpha_bar = cosine_alpha_bar(t)
    sigma_blur = blur_max * np.sin(np.pi * t / 2) ** 2
    d = (1 - d_min) * np.exp(-lam * sigma_blur**2 / 2) + d_min
    return np.sqrt(alpha_bar) * d, np.sqrt(1 - alpha_bar)
