"""The picture of where models lose bits: by noise level and by frequency, and from the first model, image by image."""

import matplotlib.backends.backend_agg
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from warm_jax.analysis import colours
from warm_jax.analysis.likelihoods import Likelihoods
from warm_jax.runtime import rounding


def likelihoods(made: Likelihoods) -> Figure:
    """The bits of all models; of several, below, what each has more than the first. 1200 pixels wide."""
    rows = 1 if len(made.bnrs) == 1 else 2
    figure = Figure(figsize=(12, 0.6 + 4 * rows), dpi=100, layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    figure.suptitle(_title(made), fontsize=13, x=0.012, ha="left", wrap=True)
    panels = figure.subplots(rows, 2, squeeze=False)
    levels, rings = panels[0]
    for i, bnr in enumerate(made.bnrs):
        style = {"color": colours.of_bnr(float(bnr)), "linewidth": 1.8}
        levels.stairs(made.by_level[i], made.edges, baseline=None, label=f"BNR {bnr:g}", **style)
        rings.plot(made.by_ring[i], **style)
    _style(levels, "By noise level", "noise level β, of pixels in ±1", "bits a dimension, per e-fold of β")
    _style(rings, "By frequency, all levels", "ring of frequencies, half waves an image", "bits a dimension")
    if rows > 1:
        _differences(*panels[1], made)
    for axes in panels[:, 0]:
        axes.set_xscale("log")
        axes.set_xlim(made.edges[0], made.edges[-1])
    levels.legend(frameon=False, fontsize=11)
    return figure


def _differences(more: Axes, more_rings: Axes, made: Likelihoods) -> None:
    """What each model has more than the first, which is the line at zero."""
    for axes in (more, more_rings):
        axes.axhline(0, color=colours.of_bnr(float(made.bnrs[0])), linewidth=1.2)
    for i, bnr in enumerate(made.bnrs[1:], 1):
        colour = colours.of_bnr(float(bnr))
        _band(more, made, i, colour)
        more_rings.plot(made.by_ring[i] - made.by_ring[0], color=colour, linewidth=1.8)
    than = f"More than BNR {made.bnrs[0]:g}"
    _style(more, f"{than}, by noise level (bands: 2 s.e.)", "noise level β", "bits a dimension, per e-fold of β")
    _style(more_rings, f"{than}, by frequency", "ring of frequencies", "bits a dimension")


def _band(axes: Axes, made: Likelihoods, i: int, colour: str) -> None:
    """The difference of a model from the first, with two standard errors."""
    value, error = made.level_difference[i], 2 * made.level_difference_se[i]
    axes.stairs(value, made.edges, baseline=None, color=colour, linewidth=1.8)
    axes.stairs(value + error, made.edges, baseline=value - error, fill=True, color=colour, alpha=0.2)


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(xlabel, fontsize=11)
    axes.set_ylabel(ylabel, fontsize=11)
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _title(made: Likelihoods) -> str:
    """The sums, and how they differ from the first."""
    totals = [rounding.with_error(*pair) for pair in zip(made.total, made.total_se, strict=True)]
    text = f"Bits a dimension of {int(made.count):,} images: "
    text += ", ".join(f"{total} at BNR {bnr:g}" for total, bnr in zip(totals, made.bnrs, strict=True))
    if len(made.bnrs) > 1:
        less = zip(made.bnrs[1:], made.difference[1:], made.difference_se[1:], strict=True)
        text += f"\nmore than BNR {made.bnrs[0]:g}, image by image: "
        text += ", ".join(f"{rounding.with_error(value, error)} at {bnr:g}" for bnr, value, error in less)
    return text


def sentence(made: Likelihoods) -> str:
    """The title without line breaks, and what of the bits is no network's."""
    ends = np.mean(made.ends)
    return f"{_title(made).replace(chr(10), '; ')}; {ends:.4f} bits of each are prior and last term"
