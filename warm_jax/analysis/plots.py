"""The analyses as pictures: a function each, from the arrays to a matplotlib `Figure`. `pip install 'warm_jax[plot]'`.

Nothing here is computed that the arrays do not hold. No pyplot and so no global state: a figure is a value, drawn by
Agg, 1200 pixels wide unless said otherwise, and `figure.savefig(path)` writes it.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter

from warm_jax.analysis import colours
from warm_jax.analysis.corruption import Corruption
from warm_jax.analysis.learning import Explained, Learning
from warm_jax.analysis.spectra import Spectra, slope_in_words
from warm_jax.diffusion.radial import Radial, Slope

BLACK, ORANGE, GREY = "#000000", "#D55E00", "#767676"  # of what is no BNR; those have `colours.of_bnr`
_LABEL = 11  # points, at 100 dots an inch


def _figure(width: int, height: int, title: str) -> Figure:
    """An empty figure of these pixels in the house's style, with one sentence on top."""
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.03, hspace=0.05)
    figure.suptitle(title, fontsize=14, x=0.012, ha="left", wrap=True)
    return figure


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(xlabel, fontsize=_LABEL)
    axes.set_ylabel(ylabel, fontsize=_LABEL)
    axes.tick_params(labelsize=_LABEL)
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for which in (axes.xaxis, axes.yaxis):
        if which.get_scale() == "log":
            low, high = which.get_view_interval()
            which.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
            which.set_minor_formatter(NullFormatter())
            which.set_major_formatter(lambda value, _: f"{value:g}" if 1e-4 < value < 1e5 else f"{value:.0e}")


def _label_ends(axes: Axes, labels: Sequence[tuple[str, float, object]], least: float = 0.062) -> None:
    """(text, y, colour): texts right of the axes, at the heights y of what they name but `least` of the axes apart.

    The axes' limits must stand.
    """
    low, high = axes.get_ylim()
    scale = np.log if axes.get_yscale() == "log" else np.asarray
    low, high = scale(low), scale(high)
    places = [float(np.clip((scale(max(y, 1e-300)) - low) / (high - low), 0, 1)) for _, y, _ in labels]
    order = np.argsort(places, kind="stable")
    spaced: list[float] = []
    for place in np.asarray(places)[order]:
        spaced.append(max(place, spaced[-1] + least) if spaced else place)
    over = max(0.0, spaced[-1] - 1) if spaced else 0.0
    for i in reversed(range(len(spaced))):  # from the top down again, where the highest was pushed out
        ceiling = spaced[i + 1] - least if i + 1 < len(spaced) else spaced[i] - over
        spaced[i] = min(spaced[i], ceiling)
    for place, i in zip(spaced, order, strict=True):
        text, _, colour = labels[i]
        axes.text(1.015, place, text, color=colour, fontsize=_LABEL, va="center", transform=axes.transAxes)


def _label_lines(axes: Axes, x: np.ndarray, lines: Sequence[tuple[str, np.ndarray, object]]) -> None:
    """(text, y `[x]`, colour): each text on its line, at the place farthest from other lines and other texts.

    The axes' limits must stand. Lines that are nowhere apart from another get theirs all the same.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [to_axes.transform(np.stack([x, y], axis=1)) for _, y, _ in lines]
    texts: list[np.ndarray] = []
    for i, (text, _, colour) in enumerate(lines):
        own = places[i]
        inside = (own > 0.04).all(axis=1) & (own < 0.96).all(axis=1)
        room = np.where(inside, 0.3, -1.0)
        for other in places[:i] + places[i + 1 :]:
            room = np.minimum(room, np.abs(own - other)[:, 1])
        for done in texts:
            apart = np.max(np.abs(own - done) / [1.6, 1.0], axis=1)
            room = np.where(apart < 0.06, apart - 1, np.minimum(room, apart))  # texts on each other are no use at all
        best = own[np.argmax(room)]
        texts.append(best)
        drawn = axes.text(
            *best, text, color=colour, fontsize=_LABEL, transform=axes.transAxes, ha="center", va="center"
        )
        drawn.set_path_effects([withStroke(linewidth=4, foreground="white")])


def _ratio(value: float) -> str:
    return "BNR ∞" if np.isinf(value) else f"BNR {value:g}"


def radial_spectrum(spectrum: Radial, law: Slope) -> Figure:
    """A radial spectrum, the power law `law` fitted to it (where it has one), and 1/k²; 720 × 480 pixels."""
    figure = _figure(720, 480, f"Radial power spectrum: {slope_in_words(law)}")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.plot(spectrum.k, spectrum.power, "o-", color=BLACK, markersize=3, linewidth=1, label="measured")
    if len(spectrum.k) > 3:
        axes.plot(spectrum.k, spectrum.power[2] * (spectrum.k / spectrum.k[2]) ** -2.0, ":", color=GREY, label="1/k²")
    if np.isfinite(law.value):
        k = spectrum.k[law.first - 1 : law.last]
        axes.plot(k, np.exp(law.intercept) * k**law.value, "--", color=ORANGE, label="fitted")
    _style(axes, "", "frequency k, half waves an image", "mean squared DCT coefficient")
    axes.legend(frameon=False, fontsize=_LABEL)
    return figure


def _spectrum_panel(axes: Axes, s: Spectra) -> None:
    middle, noise = len(s.betas) // 2, np.square(s.betas)
    axes.set(xscale="log", yscale="log", xlim=(1, s.k[-1]))
    floor = min(s.power[s.power > 0].min(), noise.min())
    axes.set_ylim(floor / 3, max(s.power.max(), noise.max()) * 2)
    first, last = s.slope_bands
    law = np.exp(s.intercept) * s.k**s.slope
    axes.plot(s.k[first - 1 : last], law[first - 1 : last], "--", color=ORANGE, linewidth=1.5)
    labels = []
    for ratio, blurred in zip(s.bnrs, s.blurred[:, middle], strict=True):
        if not ratio:
            continue
        colour = colours.of_bnr(ratio)
        axes.plot(s.k, np.maximum(blurred, 1e-300), color=colour, linewidth=1.5)
        seen = np.flatnonzero(blurred > floor / 3)
        if len(seen) == len(s.k):
            labels.append((_ratio(ratio), blurred[-1], colour))
        elif len(seen):
            axes.text(s.k[seen[-1]], floor / 2.6, f" {ratio:g}", color=colour, fontsize=_LABEL, va="bottom")
    axes.errorbar(s.k, s.power, 2 * s.standard_error, fmt="o", color=BLACK, markersize=3.5, linewidth=1)
    axes.hlines(noise, 1, s.k[-1], color=GREY, linewidth=1.2, linestyle=":")
    labels += [(f"noise β = {beta:g}", value, GREY) for beta, value in zip(s.betas, noise, strict=True)]
    _label_ends(axes, [*labels, ("image", s.power[-1], BLACK)])
    text = slope_in_words(s.law).replace(", ", "\n")
    axes.text(0.98, 0.97, text, color=ORANGE, fontsize=_LABEL, ha="right", va="top", transform=axes.transAxes)
    _style(
        axes,
        f"Image, noise, and the image as blurred beside β = {s.betas[middle]:g}",
        "frequency k, half waves an image",
        "mean squared DCT coefficient",
    )


def _cutoff_panel(axes: Axes, s: Spectra) -> None:
    top = s.k[-1]
    axes.set(xscale="log", yscale="log", xlim=(s.grid[0], s.grid[-1]), ylim=(1, top))
    known = ~np.isnan(s.noise_cutoff)
    axes.fill_between(s.grid[known], s.noise_cutoff[known], top, color="#E4E4E4", linewidth=0)
    if known.any():
        axes.axvspan(s.grid[known][-1], s.grid[-1], color="#E4E4E4", linewidth=0)
        axes.plot(s.grid[known], s.noise_cutoff[known], color=BLACK, linewidth=2.5)
        axes.text(
            s.grid[-1] / 1.3, top / 1.25, "swallowed by noise", fontsize=_LABEL, ha="right", va="top", color=BLACK
        )
    for ratio, cutoff in zip(s.bnrs, s.blur_cutoff, strict=True):
        if not ratio:
            continue
        colour = colours.of_bnr(ratio)
        axes.plot(s.grid, cutoff, color=colour, linewidth=1.5)
        place = np.argmin(np.abs(np.log(cutoff / 1.35)))
        axes.text(s.grid[place] * 1.1, 1.35, f"{ratio:g}", color=colour, fontsize=_LABEL, va="center")
    _style(axes, "Where noise swallows a band, where blur halves it", "noise level β, of pixels in ±1", "frequency k")


def _lost_panel(axes: Axes, s: Spectra) -> None:
    axes.set(xscale="log", xlim=(s.grid[0], s.grid[-1]), ylim=(0, 100))
    axes.axvspan(*s.levels, color="#FCE8D8", linewidth=0)
    axes.axhline(100 * s.budget, color=ORANGE, linestyle="--", linewidth=1.5)
    pairs = zip(s.bnrs, s.lost, strict=True)
    lines = [(_ratio(ratio), 100 * lost, colours.of_bnr(ratio)) for ratio, lost in pairs if ratio]
    for _, lost, colour in lines:
        axes.plot(s.grid, lost, color=colour, linewidth=1.8)
    _label_lines(axes, s.grid, lines)
    _label_ends(axes, [("budget", 100 * float(s.budget), ORANGE)])
    _style(
        axes,
        "Information that blur removes (shaded: the levels that matter)",
        "noise level β, of pixels in ±1",
        "lost of what noise leaves, %",
    )


def _schedule_panel(axes: Axes, s: Spectra) -> None:
    shown = s.scheduled[(s.grid >= 0.02)]
    axes.set(xscale="log", yscale="log", xlim=(s.grid[0], s.grid[-1]))
    axes.set_ylim(min(shown.min(), s.recommended, 0.5) / 1.5, max(shown.max(), 1.0) * 1.5)
    axes.axvspan(*s.levels, color="#FCE8D8", linewidth=0)
    axes.plot(s.grid, s.scheduled, color=BLACK, linewidth=2)
    axes.axhline(0.5, color=colours.of_bnr(0.5), linestyle=":", linewidth=1.5)
    axes.axhline(s.recommended, color=ORANGE, linestyle="--", linewidth=1.5)
    axes.plot([s.binding], [s.recommended], "o", color=ORANGE, markersize=7)
    labels = [("budget's", s.scheduled[-1], BLACK), ("paper's 0.5", 0.5, colours.of_bnr(0.5))]
    _label_ends(axes, [*labels, (f"{s.recommended:.2f}", float(s.recommended), ORANGE)])
    _style(
        axes,
        f"The BNR that spends {100 * s.budget:.3g} % at every level",
        "noise level β, of pixels in ±1",
        "BNR, pixels / β",
    )


def spectra(result: Spectra) -> Figure:
    """Selecting the BNR: the spectrum with noise and blur, their cut-offs, the information lost, and the schedule."""
    low, high = result.levels
    figure = _figure(
        1200,
        960,
        f"At BNR {result.recommended:.2f} blur costs at most {100 * result.budget:.3g} % of the information "
        f"that noise leaves, at β = {low:.2g} to {high:.2g}",
    )
    panels = figure.subplots(2, 2)
    for axes, draw in zip(panels.flat, (_spectrum_panel, _cutoff_panel, _lost_panel, _schedule_panel), strict=True):
        draw(axes, result)
    return figure


def _mosaic(images: np.ndarray, gap: int) -> np.ndarray:
    """[row, column, h, w, c] in ±1 as one picture in 0 … 1 with white gaps, grey or RGB."""
    rows, columns, height, width, channels = images.shape
    canvas = np.ones((rows, height + gap, columns, width + gap, channels))
    canvas[:, :height, :, :width] = np.clip(images.transpose(0, 2, 1, 3, 4) / 2 + 0.5, 0, 1)
    canvas = canvas.reshape(rows * (height + gap), columns * (width + gap), channels)
    return np.repeat(canvas, 3, axis=-1) if channels == 1 else canvas


def corruption(result: Corruption) -> Figure:
    """States, blurred targets and residuals: a row for each BNR, a column for each level."""
    rows, columns, height, width, _ = result.states.shape
    gap = max(1, width // 16)
    pixels = (1200 - 140) / (3 * columns) * rows * height / width
    figure = _figure(
        1200, int(pixels) + 118, "The larger the BNR, the more of an image is to be deblurred, not denoised"
    )
    names = ["what the network sees, x", "to denoise: blurred image D", "to deblur: residual R"]
    for axes, images, name in zip(
        figure.subplots(1, 3), (result.states, result.blurred, result.residual), names, strict=True
    ):
        axes.imshow(_mosaic(images, gap), interpolation="nearest")
        axes.set_title(name, fontsize=12, loc="left")
        axes.set_xticks(np.arange(columns) * (width + gap) + width / 2, [f"{level:g}" for level in result.levels])
        axes.set_xlabel("noise level β", fontsize=_LABEL)
        axes.set_yticks([])
        axes.tick_params(length=0, labelsize=_LABEL)
        axes.spines[:].set_visible(False)
        if images is result.states:
            notes = {0.0: "BNR 0\nnoise alone", np.inf: "BNR ∞\nblur alone"}
            texts = [notes.get(float(ratio), _ratio(ratio)) for ratio in result.bnrs]
            axes.set_yticks(np.arange(rows) * (height + gap) + height / 2, texts)
            for label, ratio in zip(axes.get_yticklabels(), result.bnrs, strict=True):
                label.set_color(colours.of_bnr(ratio))
    return figure


def learning(result: Learning, measured: Sequence[Explained] = ()) -> Figure:
    """How the task falls to the two heads, and how much of each target is explained: lines linear, dots `measured`.

    `measured` has an entry for each BNR that a predictor was tried at; those of BNRs not in `result` are left out.
    """
    most = int(np.argmax(result.bnrs))
    above = result.betas[result.deblurring[most] > 0.5]
    title = f"At BNR {result.bnrs[most]:g} deblurring is "
    title += f"most of the task at β = {above[0]:.2g} to {above[-1]:.2g}" if len(above) else "never most of the task"
    title += "; dots: a network, lines: the best linear guess" if measured else ", for the best linear guess"
    figure = _figure(1200, 520, title)
    panels = figure.subplots(1, 3)
    names = [
        "Deblurring's part of the task, by BNR",
        "Explained of the blurred image D",
        "Explained of the residual R",
    ]
    fields = ["deblurring", "blurred_explained", "residual_explained"]
    betas = np.concatenate([result.betas, *(one.betas for one in measured)])
    room = 1.15 if measured else 1.0  # for the dots of the first level and of the last
    for axes, name, field in zip(panels, names, fields, strict=True):
        values, lines = 100 * getattr(result, field), []
        dots = [100 * getattr(one, field) for one in measured]
        finite = np.concatenate([values.ravel(), *dots])
        finite = finite[np.isfinite(finite)]
        low = max(-2.0, finite.min() - 5) if field == "blurred_explained" else max(-20.0, min(0.0, finite.min()) - 2)
        top = max(102.0, min(120.0, finite.max() + 2))
        axes.set(xscale="log", xlim=(betas.min() / room, betas.max() * room), ylim=(low, top))
        for ratio, line in zip(result.bnrs, values, strict=True):
            if np.isnan(line).all():
                continue
            colour = colours.of_bnr(ratio)
            axes.plot(result.betas, line, color=colour, linewidth=1.8)
            lines.append((f"{ratio:g}", line, colour))
            for one in measured:
                if np.allclose(one.alphas, ratio * one.betas, rtol=1e-3, atol=1e-9):
                    value, error = 100 * getattr(one, field), 200 * getattr(one, field + "_se")
                    axes.errorbar(one.betas, value, error, fmt="o", color=colour, markersize=4.5, linewidth=1)
                    for off, edge, marker in ((value < low, low + 2, "v"), (value > top, top - 2, "^")):
                        axes.plot(one.betas[off], np.full(off.sum(), edge), marker, color=colour, markersize=6)
        _label_lines(axes, result.betas, lines)
        unit = "% of what is unknown of the image" if field == "deblurring" else "% of its energy"
        _style(axes, name, "noise level β, of pixels in ±1", unit)
    return figure
