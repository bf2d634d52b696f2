"""How exact the solvers are on Gaussian data: numbers of a second implementation, in numpy float64."""

import itertools

import numpy as np

N = 32
LAM = np.pi**2 * ((np.arange(N) / N)[:, None] ** 2 + (np.arange(N) / N) ** 2)
POWER = 1 / (LAM + 0.5 * (np.pi / N) ** 2)
POWER *= 0.25 / POWER.mean()

# W2 / ‖√P‖ of Heun from the prior, found by an independent numpy float64 implementation; NFE 9, 17, 35, 79, 159, 511.
HEUN = {
    0.0: [1.1989, 0.2261, 0.0433, 0.0073, 0.0023, 0.0021],
    0.5: [1.2763, 0.2607, 0.0515, 0.0090, 0.0027, 0.0021],
    1.0: [1.2307, 0.2637, 0.0569, 0.0103, 0.0029, 0.0021],
    2.0: [1.1126, 0.2159, 0.0514, 0.0105, 0.0031, 0.0021],
    10.0: [0.7628, 0.3115, 0.1191, 0.0265, 0.0065, 0.0021],
}
MULTISTEP = {0.0: [0.0539, 0.0105, 0.0023], 0.5: [0.0589, 0.0118, 0.0026]}  # NFE 17, 35, 79
# Quadratic in √s, integrated exactly: `multistep3` below, at NFE 9, 17, 35.
MULTISTEP3 = {0.0: [0.0497, 0.0185, 0.0025], 0.5: [0.0572, 0.0213, 0.0029], 2.0: [0.0802, 0.0272, 0.0073]}
STEPS = (5, 9, 18, 40, 80, 256)  # of Heun, at these evaluations:
NFE = (9, 17, 35, 79, 159, 511)


def _weights(nodes: np.ndarray, w_j: float) -> np.ndarray:
    """The mean of each Lagrange polynomial on `nodes` under d(w^-2) from nodes[0] down to w_j, by Gauss-Legendre."""
    y, gauss = np.polynomial.legendre.leggauss(40)
    w = nodes[0] + (w_j - nodes[0]) * (y + 1) / 2
    density = gauss * w**-3.0
    lagrange = [np.prod([(w - b) / (a - b) for b in nodes if b != a], axis=0) * np.ones_like(w) for a in nodes]
    return np.array([density @ one for one in lagrange]) / density.sum()


def multistep3(clean, x, levels, attenuation):
    """x after `levels`, by arrays in the DCT basis: `clean(x, t)` is x̂0, `attenuation(t)` a; the s of EDM's family."""
    past = []
    for t_i, t_j in itertools.pairwise(levels):
        past = [(t_i**0.5, clean(x, t_i)), *past][:3]
        mean = past[0][1]
        if t_j > 0:
            weights = _weights(np.array([w for w, _ in past]), t_j**0.5)
            mean = sum(weight * one for weight, (_, one) in zip(weights, past, strict=True))
        x = t_j / t_i * x + (attenuation(t_j) - t_j / t_i * attenuation(t_i)) * mean
    return x
