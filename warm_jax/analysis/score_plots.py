"""Pictures of what scores say of samples: memorisation, and guidance weights and intervals. By matplotlib's objects."""

import textwrap

import matplotlib.backends.backend_agg
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from warm_jax.analysis.guided import Guided, best, interval_name
from warm_jax.analysis.memorisation import NEIGHBOURS, SPACES, Memorisation, share, verdict
from warm_jax.runtime import pictures, rounding

_SAMPLES, _HELD_OUT = "#0072b2", "#d55e00"


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(12, height), layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def memorisation(made: Memorisation) -> Figure:
    """Samples beside their nearest training images at the left; at the right the ratios of all, a space each."""
    figure = _figure(8.4)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    axes = left.subplots()
    drawn = _rows(made)
    axes.imshow(drawn[..., 0] if drawn.shape[2] == 1 else drawn, cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    axes.set_title("samples, and the training images nearest to them: by features, by pixels", fontsize=10)
    for axis, space, ratios, held in zip(right.subplots(2, 1), SPACES, made.ratios, made.held_out, strict=True):
        _ratios(axis, space, ratios, held)
    return figure


def _rows(made: Memorisation) -> np.ndarray:
    """A row for each shown sample: itself, then its neighbours in each space after a white column."""
    gap = np.full_like(made.samples[0], 255)[None]
    rows = []
    for i, number in enumerate(made.shown):
        parts = [made.samples[i : i + 1]]
        for space in range(len(SPACES)):
            parts += [gap, made.nearest[space, i]]
        ratio = " ".join(f"{made.ratios[space, number]:.2f}" for space in range(len(SPACES)))
        rows.append((f"{number}: {ratio}", np.concatenate(parts)))
    blank = [""] * (NEIGHBOURS - 1)
    heads = ["number: ratios", "sample", "", "features", *blank, "", "pixels", *blank]
    return pictures.labelled_rows([(label, pictures.shrink(images, 64)) for label, images in rows], heads=heads)


def _ratios(axes: Axes, space: str, ratios: np.ndarray, held: np.ndarray) -> None:
    """Histograms of the ratios on a logarithmic axis; what is beyond its ends counts there."""
    low, high = 0.05, 5.0
    bins = np.geomspace(low, high, 41)
    for values, name, style in (
        (ratios, "samples", {"color": _SAMPLES, "alpha": 0.6}),
        (held, "held-out images", {"color": _HELD_OUT, "histtype": "step", "linewidth": 1.8}),
    ):
        if len(values):
            label = f"{name}: {share(values)[0]:.1%} below 1"
            weights = np.full(len(values), 1 / len(values))
            axes.hist(np.clip(values, low, high * 0.999), bins, weights=weights, label=label, **style)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5], ["≤ 0.05", "0.1", "0.2", "0.5", "1", "2", "≥ 5"])
    axes.minorticks_off()
    axes.set(xlabel=f"ratio, in {space}", ylabel="share")
    axes.set_title(textwrap.fill(verdict(ratios, held), 68), fontsize=9, loc="left")
    axes.legend(fontsize=9, frameon=False, loc="upper left")


def guided(made: Guided) -> Figure:
    """The table of the score as a heat map, with its numbers and the NFE of each. Low is taken for good."""
    figure = _figure(1.8 + 0.75 * len(made.weights))
    figure.suptitle(best(made), fontsize=11)
    axes = figure.subplots()
    image = axes.imshow(made.mean, cmap="cividis", aspect="auto", origin="lower")
    for (i, j), value in np.ndenumerate(made.mean):
        half = made.half[i, j]
        text = f"{rounding.with_error(value, half if half > 0 else None)}\nNFE {made.nfe[i, j]}"
        dark = image.norm(value) < 0.55
        axes.text(j, i, text, ha="center", va="center", fontsize=10, color="white" if dark else "black")
    axes.set_xticks(range(len(made.intervals)), [interval_name(bounds) for bounds in made.intervals])
    axes.set_yticks(range(len(made.weights)), [f"{weight:g}" for weight in made.weights])
    axes.set(xlabel="guided noise levels, above the first up to the second", ylabel="guidance weight")
    figure.colorbar(image, ax=axes, label=str(made.metric))
    return figure
