"""How exact the solvers are on Gaussian data: numbers of a second implementation, in numpy float64."""

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
STEPS = (5, 9, 18, 40, 80, 256)  # of Heun, at these evaluations:
NFE = (9, 17, 35, 79, 159, 511)
