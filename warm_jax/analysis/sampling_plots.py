"""Pictures of the analyses, by matplotlib's objects (`warm_jax[plot]`): no pyplot, so no state and no window.

12 inches wide, to be saved at 100 dpi or more. A ratio has the colour that it has in every picture (`colours`), and
among those of a figure a marker of its own.
"""

import math
import textwrap
from typing import Any

import matplotlib.backends.backend_agg
import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from warm_jax.analysis import colours
from warm_jax.analysis.manifold import Manifold
from warm_jax.analysis.sweep import Sweep
from warm_jax.runtime import rounding

_MARKERS = "osD^vP*X"
_UNITS = {
    "gap": "gap, nats per dimension",
    "departure": "departure, nats per dimension",
    "neighbour": "nearest-neighbour distance\nover the forward states' own, - 1",
    "energy": "energy distance over\nthe forward states' distance",
}
_METRICS = {
    "w2": "W2 to the data / ‖√P‖",
    "energy": "energy distance / the data's own distance",
    "imbalance": "imbalance n Σ p² - 1 of the images found",
    "nearest": "distance to the nearest image, rms of a pixel",
}


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(12, height), layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def _styles(bnrs: np.ndarray) -> list[dict[str, Any]]:
    """Colour and marker of each ratio."""
    return [{"color": colours.of_bnr(bnr), "marker": _MARKERS[i % len(_MARKERS)]} for i, bnr in enumerate(bnrs)]


def _spread(values: list[float], least: float) -> np.ndarray:
    """Positions in [0, 1] near `values`, in the same order and `least` apart where there is room."""
    order = np.argsort(values, kind="stable")
    placed, least = np.array(values, float)[order], min(least, 1 / max(len(values) - 1, 1))
    for _ in range(200):  # neighbours push each other off, and the ends hold
        for i in range(len(placed) - 1):
            push = max(0.0, least - (placed[i + 1] - placed[i])) / 2
            placed[i] -= push
            placed[i + 1] += push
        placed = np.clip(placed, 0, 1)
    back = np.empty_like(placed)
    back[order] = placed
    return back


def _name_ends(axes: Axes, ends: list[tuple[float, float, str, Any]]) -> None:
    """Writes the name of each curve beside its last point (x, y, name, colour), moved apart where they would meet."""
    transform = axes.transData + axes.transAxes.inverted()
    points = [transform.transform((x, y)) for x, y, _, _ in ends]
    heights = _spread([float(np.clip(point[1], 0, 1)) for point in points], 0.075)
    for (x, y, name, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            name, (x, y), (1.03, height), textcoords=axes.transAxes, color=colour, fontsize=10, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6}, annotation_clip=False,
        )  # fmt: skip


def _number(value: float, digits: int = 2) -> str:
    """`digits` significant ones, without an exponent where that is short."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(places, 0)}f}" if 1e-4 <= abs(value) < 1e5 else f"{value:.{digits - 1}e}"


def _threshold(values: np.ndarray, half: np.ndarray) -> float | None:
    """Up to where a signed logarithmic scale is linear: a power of ten near the size of the noise. None: everywhere."""
    noise = half[np.isfinite(half) & (half > 0)]
    size = np.nanmax(np.abs(values), initial=0.0)
    threshold = 10.0 ** math.ceil(math.log10(max(np.median(noise) if noise.size else 0.0, size / 1e4, 1e-12)))
    return threshold if size > 10 * threshold else None


def _scale(axes: Axes, values: np.ndarray, half: np.ndarray) -> None:
    """The y axis of values of either sign, and its zero."""
    axes.axhline(0, color="0.6", linewidth=0.8)
    threshold = _threshold(values, half)
    if threshold is not None:
        axes.set_yscale("symlog", linthresh=threshold)


# ── Manifold ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sentence(result: Manifold, row: int) -> str:
    """What is seen at the fewest and the most evaluations, from the averages over ln β of one measure.

    Of five exact BNRs one would seem off once in four pictures: to ask whether any is, the intervals are widened for
    their number (Bonferroni). Most off is then the largest whose own interval does not hold 0.
    """
    name, lines, freedom = str(result.measures[row]), [], len(result.seeds) - 1
    wider = scipy.stats.t.ppf(1 - 0.025 / len(result.bnrs), freedom) / scipy.stats.t.ppf(0.975, freedom)
    for j in dict.fromkeys((0, len(result.nfe) - 1)):
        size, half = np.abs(result.average[row, :, j]), result.average_half[row, :, j]
        most, least = int(np.nanargmax(np.where(size > half, size, 0))), int(np.nanargmin(size))
        values = [rounding.with_error(result.average[row, i, j], half[i]) for i in range(len(half))]
        if not np.any(size > wider * half):
            lines.append(f"at NFE {result.nfe[j]} no BNR is measurably off")
        elif len(size) == 1:
            lines.append(f"at NFE {result.nfe[j]} BNR {result.bnrs[0]:g} is off ({name} {values[0]})")
        else:
            first = f"at NFE {result.nfe[j]} BNR {result.bnrs[most]:g} is most off ({name} {values[most]})"
            lines.append(f"{first}, BNR {result.bnrs[least]:g} least ({values[least]})")
    sentence = "; ".join(lines)
    return f"{sentence[0].upper()}{sentence[1:]}."


def manifold(result: Manifold) -> Figure:
    """A column for each NFE, a row for each measure by density (else by distance), and the averages over ln β below.

    Bands and bars are 95 % intervals. The sampler runs from left to right: β falls. The axes of departures are
    logarithmic beyond the noise and linear within.
    """
    rows = [i for i in range(len(result.measures)) if np.isfinite(result.mean[i]).any()]
    density = [i for i in rows if result.measures[i] in ("gap", "departure")]
    shown = density or rows
    extra = [i for i in rows if i not in shown]
    figure = _figure(3.1 * (len(shown) + 1) + 0.5)
    sentence = _sentence(result, rows[0] if density else rows[-1])
    lines = -(-len(sentence) // 110)
    figure.suptitle(textwrap.fill(sentence, len(sentence) // lines + 12), fontsize=12)  # lines of about one length
    parts = figure.subfigures(2, 1, height_ratios=[len(shown), 1], hspace=0.03)
    grid = parts[0].subplots(len(shown), len(result.nfe), sharex=True, sharey="row", squeeze=False)
    below = parts[1].subplots(1, len(shown) + len(extra), squeeze=False)[0]
    styles, named = _styles(result.bnrs), []
    for row, measure in enumerate(shown):
        for column in range(len(result.nfe)):
            ends = _against_levels(grid[row, column], result, measure, column, styles)
            if column == len(result.nfe) - 1:
                named.append((grid[row, column], ends))
        grid[row, 0].set_ylabel(_UNITS[str(result.measures[measure])])
    for column, nfe in enumerate(result.nfe):
        grid[0, column].set_title(f"NFE {nfe}", fontsize=11)
        grid[-1, column].set_xlabel("noise level β (pixels span -1 to 1), falling")
    for axes, measure in zip(below, [*shown, *extra], strict=True):
        ends = _against_nfe(axes, result.nfe, result.average[measure], result.average_half[measure], result.bnrs)
        axes.set_ylabel(_UNITS[str(result.measures[measure])])
        axes.set_title("averaged over ln β", fontsize=10)
        if axes is below[-1]:
            named.append((axes, ends))
    figure.draw_without_rendering()
    for axes, ends in named:
        _name_ends(axes, ends)
    return figure


def _against_levels(axes: Axes, result: Manifold, measure: int, column: int, styles: list[dict]) -> list:
    """One measure at one NFE; the ends of its curves, for their names."""
    ends = []
    axes.set_xscale("log")
    _scale(axes, result.mean[measure], result.half[measure])
    for bnr, mean, half, style in zip(
        result.bnrs, result.mean[measure, :, column], result.half[measure, :, column], styles, strict=True
    ):
        there = np.isfinite(mean)
        x, y, h = result.levels[column, there], mean[there], half[there]
        axes.fill_between(x, y - h, y + h, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(x, y, **style, markersize=3.5, linewidth=1.5)
        ends.append((x[-1], y[-1], f"BNR {bnr:g}", style["color"]))
    if not axes.xaxis_inverted():
        axes.invert_xaxis()
    axes.grid(alpha=0.25)
    return ends


def _against_nfe(axes: Axes, nfe: np.ndarray, mean: np.ndarray, half: np.ndarray, bnrs: np.ndarray) -> list:
    """Curves over NFE with error bars, one a BNR, side by side at each NFE; their ends."""
    ends = []
    known = np.nan_to_num(half)
    low, high = np.nanmin(mean - known), np.nanmax(mean + known)
    if low <= 0:
        _scale(axes, mean, half)
    elif high > 5 * low:  # else a logarithmic axis has no power of ten to be labelled
        axes.set_yscale("log")
    room = max((nfe.max() / nfe.min()) ** 0.06, 1.1)  # of a single NFE too
    axes.set(xscale="log", xlim=(nfe.min() / room, nfe.max() * room))
    for i, (bnr, style) in enumerate(zip(bnrs, _styles(bnrs), strict=True)):
        x = nfe * 1.02 ** (i - (len(bnrs) - 1) / 2)
        axes.errorbar(x, mean[i], known[i], **style, markersize=4, linewidth=1.3, capsize=2)
        ends.append((x[-1], mean[i, -1], f"BNR {bnr:g}", style["color"]))
    axes.set_xticks(nfe, [str(n) for n in nfe])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("NFE (evaluations of the network)")
    axes.grid(alpha=0.25)
    return ends


# ── Sweep ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sweep(result: Sweep) -> Figure:
    """The table of a metric as a heat map with its numbers, and the same as curves over NFE with 95 % intervals.

    Low is taken for good. Colours are of the logarithm, beyond the noise where values are of both signs.
    """
    metric = _METRICS.get(str(result.metric), str(result.metric))
    figure = _figure(5.2)
    figure.suptitle(_best(result), fontsize=12)
    left, right = figure.subplots(1, 2)
    if np.nanmin(result.mean) > 0:
        norm = "log"
    else:
        threshold, span = _threshold(result.mean, result.half), (np.nanmin(result.mean), np.nanmax(result.mean))
        norm = Normalize(*span) if threshold is None else SymLogNorm(threshold, vmin=span[0], vmax=span[1])
    image = left.imshow(result.mean, cmap="cividis", aspect="auto", origin="lower", norm=norm)
    for (i, j), value in np.ndenumerate(result.mean):
        half = result.half[i, j]
        text = rounding.with_error(value, half).replace(" ± ", "\n± ") if half > 0 else _number(value, 3)
        dark = image.norm(value) < 0.55
        left.text(j, i, text, ha="center", va="center", fontsize=10, color="white" if dark else "black")
    left.set_xticks(range(len(result.nfe)), [str(n) for n in result.nfe])
    left.set_yticks(range(len(result.bnrs)), [f"{bnr:g}" for bnr in result.bnrs])
    left.set(xlabel="NFE (evaluations of the network)", ylabel="BNR = blur / noise (pixels per unit)")
    figure.colorbar(image, ax=left)
    ends = _against_nfe(right, result.nfe, result.mean, result.half, result.bnrs)
    right.set_ylabel(metric)
    figure.draw_without_rendering()
    _name_ends(right, ends)
    return figure


def _best(result: Sweep) -> str:
    """Which BNR is lowest and which highest at the fewest and the most evaluations, where they can be told apart."""
    lines = []
    for j in dict.fromkeys((0, len(result.nfe) - 1)):
        here, half = result.mean[:, j], np.nan_to_num(result.half[:, j])
        low, high = int(np.nanargmin(here)), int(np.nanargmax(here))
        at, least, most = f"at NFE {result.nfe[j]}", _number(here[low]), _number(here[high])
        if len(here) == 1:
            lines.append(f"{at} BNR {result.bnrs[low]:g} gives {least}")
        elif least == most:
            lines.append(f"{at} all ratios give {least}")
        elif here[high] - half[high] <= here[low] + half[low]:
            lines.append(f"{at} the ratios cannot be told apart ({least} to {most})")
        else:
            lines.append(
                f"{at} BNR {result.bnrs[low]:g} is lowest ({least}), BNR {result.bnrs[high]:g} highest ({most})"
            )
    sentence = "; ".join(lines)
    return f"{sentence[0].upper()}{sentence[1:]}."
