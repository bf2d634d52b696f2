"""The picture of the solvers in a hurry: a row for each measure, a column for each BNR, a curve for each solver."""

import matplotlib
import matplotlib.backends.backend_agg
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from warm_jax.analysis.solvers import GRIDS, NAMES, Table, Way

_MARKERS = dict(zip(NAMES, "voDsP^", strict=True))
_METRICS = {
    "w2": "Gaussian data:\nW2 / ‖√P‖, exact",
    "strayed": "finite set: share of runs that\nmiss the exact flow's image",
    "energy": "finite set:\nenergy distance",
}


def solvers(ways: list[Way], tables: list[Table]) -> Figure:
    """Full lines: the fitted grid; dashed: EDM's. Bars are 95 % intervals. Low is good."""
    bnrs = tables[0].bnrs
    figure = Figure(figsize=(12, 3.0 * len(tables) + 1.1), layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    figure.suptitle(_title(ways, tables[-1]), fontsize=10)
    axes = figure.subplots(len(tables), len(bnrs), sharex=True, sharey="row", squeeze=False)
    colours = dict(zip(NAMES, matplotlib.colormaps["tab10"](np.arange(len(NAMES))), strict=True))
    for row, table in enumerate(tables):
        for j, bnr in enumerate(table.bnrs):
            column = axes[row, list(bnrs).index(bnr)]
            for solver in NAMES:
                for grid in GRIDS:
                    _curve(column, ways, table, j, solver, grid, colours[solver])
            column.grid(alpha=0.25)
        axes[row, 0].set_ylabel(_METRICS.get(str(table.metric), f"model:\n{table.metric}"))
        _scale(axes[row, 0], table)
    budgets = sorted({way.nfe for way in ways})
    for j, bnr in enumerate(bnrs):
        axes[0, j].set_title(f"BNR {bnr:g}", fontsize=11)
        axes[-1, j].set_xlabel("NFE (evaluations of the network)")
        axes[-1, j].set_xticks(budgets, [str(n) for n in budgets])
    lines = [Line2D([], [], color=colours[name], marker=_MARKERS[name], label=name) for name in NAMES]
    lines += [Line2D([], [], color="0.3", linestyle=style, label=f"{grid} grid") for grid, style in _STYLES.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    return figure


_STYLES = dict(zip(GRIDS, ("--", "-"), strict=True))


def _curve(axes: Axes, ways: list[Way], table: Table, j: int, solver: str, grid: str, colour: np.ndarray) -> None:
    chosen = [i for i, way in enumerate(ways) if (way.solver, way.grid) == (solver, grid)]
    chosen = [i for i in chosen if np.isfinite(table.mean[i, j])]
    if chosen:
        axes.errorbar(
            [ways[i].nfe for i in chosen], table.mean[chosen, j], np.nan_to_num(table.half[chosen, j]),
            color=colour, marker=_MARKERS[solver], linestyle=_STYLES[grid], markersize=4.5, linewidth=1.3,
            capsize=2, elinewidth=0.8, alpha=1.0 if grid == "fitted" else 0.6,
        )  # fmt: skip


def _scale(axes: Axes, table: Table) -> None:
    """Logarithmic where all is above 0, as W2 and a Fréchet distance are; from 0 to 1 for a share."""
    if str(table.metric) == "strayed":
        axes.set_ylim(-0.02, 1.02)
    elif np.nanmin(table.mean) > 0:
        axes.set_yscale("log")
    else:
        noise = np.nanmedian(table.half)
        axes.set_yscale("symlog", linthresh=float(noise) if noise > 0 else 1e-3)


def _title(ways: list[Way], table: Table) -> str:
    """The best solver of the fewest evaluations at each BNR, by the last measure."""
    least = min(way.budget for way in ways)
    found = []
    for j, bnr in enumerate(table.bnrs):
        within = [i for i, way in enumerate(ways) if way.budget == least and np.isfinite(table.mean[i, j])]
        way = ways[min(within, key=lambda i: table.mean[i, j])]
        found.append(f"BNR {bnr:g} {way.solver} on the {way.grid} grid")
    return f"Lowest {table.metric} at NFE ≤ {least}:\n{', '.join(found)}"
