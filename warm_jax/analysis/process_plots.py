"""The picture of processes side by side: a panel each, frequencies upwards, from the data at the left to noise."""

import math

import matplotlib
import matplotlib.backends.backend_agg
import numpy as np
from matplotlib.figure import Figure

from warm_jax.analysis.processes import Ratio

_ACROSS = 4


def processes(ratios: dict[str, Ratio]) -> Figure:
    """log10 of the signal-to-noise ratio; the black line is where signal and noise are equal."""
    across = min(_ACROSS, len(ratios))
    down = math.ceil(len(ratios) / across)
    size = (7.2, 4.6) if len(ratios) == 1 else (3.0 * across + 1.2, 2.6 * down + 1.0)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    figure.suptitle("Signal-to-noise ratio by frequency along the path; black: 1", fontsize=12, x=0.012, ha="left")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for one in axes[len(ratios) :]:
        one.set_axis_off()
    for one, (name, found) in zip(axes, ratios.items(), strict=False):
        share, height = np.linspace(0, 1, len(found.levels)), np.log10(1 + found.k)
        mesh = one.pcolormesh(
            share,
            height,
            np.log10(found.ratio).T,
            cmap=matplotlib.colormaps["RdBu"],
            vmin=-4,
            vmax=4,
            shading="nearest",
        )
        one.plot(found.drowned, height, color="black", linewidth=1.4)
        one.set_xlim(0, 1)
        one.set_ylim(height[0], height[-1])
        one.set_title(name, fontsize=11, loc="left")
        ticks = [k for k in (0, 1, 3, 7, 15, 31, 63, 127, 255) if k < len(found.k)]
        one.set_yticks(np.log10(1 + np.array(ticks)), [str(k) for k in ticks])
        one.set_xticks([0, 0.5, 1], ["data", f"{found.levels[len(share) // 2]:.3g}", f"{found.levels[-1]:.3g}"])
    for one in axes[: len(ratios) : across]:
        one.set_ylabel("half waves over the side")
    for one in axes[max(0, len(ratios) - across) : len(ratios)]:
        one.set_xlabel("level t, evenly over the grid")
    figure.colorbar(mesh, ax=axes.tolist(), label="log10 SNR (±4 and beyond)", fraction=0.03)
    return figure
