"""The sections of a report: what was read from a workdir, as HTML. Each is empty where its part is missing."""

import math
import pathlib

from warm_jax.analysis.blocks import figure, flat, pairs, plain, plates, table
from warm_jax.analysis.charts import POINTS, Line, chart, number, shown, spark
from warm_jax.analysis.contents import Contents, Picture
from warm_jax.analysis.markup import Html, join, tag
from warm_jax.runtime.rounding import with_error

# What to look for in the figure of an analysis.
_CAPTIONS = {
    "spectra": "Where the spectrum lies below the noise, noise has swallowed the band; blur should take none that "
    "noise has left. The recommended BNR is the largest whose blur stays within the budget at the shaded levels.",
    "corruption": "One image along the process: look for detail that blur takes while noise would still have shown it.",
    "process": "Which frequencies drown when: red is noise, blue is image, and on the black line they are equal. Where "
    "it stands upright, all drown at once.",
    "learning": "Left: how much of what is unknown of an image the deblurring head has to find; it grows with the BNR. "
    "Lines are the best linear guess, dots a trained network.",
    "manifold": "How far the sampler's states lie from the forward process of the same level: zero is on it. With an "
    "exact predictor what is left is the solver's error; with a trained network it is also the network's.",
    "solvers": "Samplers in a hurry: the lower a curve, the better the solver at that number of evaluations. Full "
    "lines are on a grid fitted to Gaussian data of this spectrum, the first row; the others judge it. Dashed: EDM's.",
    "memorisation": "Samples beside the training images nearest to them, and how near: a ratio below 1 is closer to a "
    "training image than its next one is. Copying is a share above that of held-out images, or a tail at the left.",
    "guidance": "The score for each guidance weight and interval of noise levels; look at the NFE too.",
    "likelihood": "Bits a dimension of held-out images, by noise level and by frequency, and what each model loses "
    "more than the first. A perfect network would lose the same at every BNR.",
    "sweep": "The score for each blur-to-noise ratio and number of evaluations: look for the lowest, and whether it is "
    "lower by more than its interval.",
}
_HOW = (
    *("images", "count", "numbers", "system", "ema", "bnr", "solver", "steps", "nfe"),
    *("guidance", "guidance_interval", "protocol", "reference"),
)
_NAMES = {
    "nfe": "NFE",
    "bnr": "BNR",
    "ema": "EMA σ_rel",
    "numbers": "seeds or numbers",
    "spectrum": "spectral slope",
}
_FEW = 3  # evaluations that stand beside each other
_AGAIN = """import json, pathlib, ml_collections

def get_config(system="warm"):
    saved = json.loads(pathlib.Path(__file__).with_name("config.json").read_text(encoding="utf-8"))
    saved.pop("digests", None)
    return ml_collections.ConfigDict(saved)
"""


def _under(contents: Contents, folder: str) -> list[Picture]:
    return [picture for picture in contents.pictures if picture.path.startswith(folder)]


# ── Samples and training ─────────────────────────────────────────────────────────────────────────────────────────────


def samples(contents: Contents) -> Html:
    """The grid that --mode=sample drew, and previews of training."""
    settings, how = contents.made_with.get("sample"), ""
    if isinstance(settings, dict) and "checkpoint_step" in contents.made_with:
        step = plain(contents.made_with["checkpoint_step"])
        how = f"Checkpoint of step {step}; {plain(settings.get('solver'))}, {plain(settings.get('steps'))} steps."
    drawn = [figure(picture, "Samples.", how) for picture in _under(contents, "samples/")]
    steps = [(int(pathlib.PurePath(picture.path).stem), picture) for picture in _under(contents, "grids/")]
    previews = [figure(picture, f"Step {step:,}.") for step, picture in steps]
    if not previews:
        return join(*drawn)
    told = tag("p", "The same noise and classes at each step, so that what changes is the network.")
    return join(*drawn, tag("h3", "While training"), told, tag("div", *previews, class_="row"))


def _line(rows: list[dict], key: str, name: str, x: str = "step") -> Line:
    return Line(name, [number(row[x]) or 0.0 for row in rows], [number(row.get(key)) for row in rows])


def training(rows: list[dict]) -> Html:
    """Curves of the loss by head, gradient, learning rate and speed, and a table of the loss by noise level."""
    scores = _scores_while_training(rows)
    rows = [row for row in rows if not any(key.startswith("score/") for key in row)]
    if not rows:
        return scores
    # The second head of a hot model is not there; its loss is 0 but for rounding.
    heads = [
        name for name in ("blurred", "residual") if any((number(row.get(f"loss/{name}")) or 0) > 1e-9 for row in rows)
    ]
    losses = [_line(rows, f"loss/{head}", head) for head in heads]
    charts = [
        chart(losses, title="Loss by head", y_label="per pixel, weighted", log=True),
        chart([_line(rows, "gradient_norm", "norm")], title="Gradient", y_label="L2 norm", log=True),
        chart([_line(rows, "learning_rate", "rate")], title="Learning rate", y_label="rate", from_zero=True),
        chart([_line(rows, "images_per_second", "speed")], title="Speed", y_label="images a second", from_zero=True),
    ]
    size = -(-len(rows) // POINTS)
    told = tag("p", f"Each point is the mean of {size} reports.") if size > 1 else ""
    lost = sum(number(row.get("nonfinite_steps")) or 0 for row in rows)
    note = tag("p", f"The loss of {lost:,.0f} steps was not finite; they count for nothing here.", class_="notes")
    return join(note if lost else "", told, tag("div", *charts, class_="charts"), _by_noise(rows, heads), scores)


def _scores_while_training(rows: list[dict]) -> Html:
    """A curve for each score of `train.evaluate_every`; its name says the count."""
    scored = [row for row in rows if any(key.startswith("score/") for key in row)]
    names = list(dict.fromkeys(key for row in scored for key in row if key.startswith("score/")))
    names = [name for name in names if not name.endswith("_std")]
    charts = [
        chart([_line([row for row in scored if name in row], name, "score")], title=name[6:], y_label="score")
        for name in names
    ]
    told = tag("p", "Of few images, to see the trend; scores of other counts are other numbers.")
    return join(tag("h3", "Scores while training"), told, tag("div", *charts, class_="charts")) if charts else Html("")


def _begin(interval: str) -> float:
    """Where an interval such as 0.05-0.1 begins."""
    try:
        return float(interval.partition("-")[0])
    except ValueError:
        return math.inf


def _by_noise(rows: list[dict], heads: list[str]) -> Html:
    """A row for each interval of noise levels: the course of each head's loss and its last value."""
    prefix = "loss_blurred/noise_"
    intervals = {key.removeprefix(prefix) for row in rows for key in row if key.startswith(prefix)}
    body = []
    for interval in sorted(intervals, key=lambda name: (_begin(name), name)):
        cells: list[object] = [f"≥ {interval[:-4]}" if interval.endswith("-inf") else interval.replace("-", " – ", 1)]
        for colour, head in enumerate(heads):
            line = _line(rows, f"loss_{head}/noise_{interval}", f"{head}, noise {interval}")
            cells += [spark(line, colour), shown(next((y for y in reversed(line.y) if y is not None), None))]
        body.append(cells)
    if not body or not heads:
        return Html("")
    told = tag("p", "Each course has a logarithmic scale of its own; beside it the last value.")
    columns = [title for head in heads for title in (head, "last")]
    return join(tag("h3", "Loss by noise level"), told, table("Loss by noise level", ["noise", *columns], body))


# ── Scores and comparisons ───────────────────────────────────────────────────────────────────────────────────────────


def score_names(row: dict) -> list[str]:
    """The scores in a row of results.jsonl; of a summary of rounds none."""
    named = row.get("scores")
    return (
        [name for name in named if isinstance(name, str) and not name.endswith("_std")]
        if isinstance(named, list)
        else []
    )


def _score_cells(row: dict) -> dict[str, str]:
    """Each score of a row in words: value ± its own spread, or minimum and mean ± standard deviation of rounds."""
    found = {}
    for name in score_names(row):
        value, spread = number(row.get(name)), number(row.get(f"{name}_std"))
        found[name] = shown(value) if spread is None else with_error(value, spread)
    for name in [key.removesuffix("_std_of_rounds") for key in row if key.endswith("_std_of_rounds")]:
        low, mean, spread = (number(row.get(f"{name}_{part}")) for part in ("min", "mean", "std_of_rounds"))
        rounds = plain(row.get("rounds"))
        found[name] = f"{shown(low)} (least of {rounds}; {with_error(mean, spread)})"
    return found


def scores(rows: list[dict]) -> Html:
    """A table of all evaluations; what they share stands above it. With several checkpoints a curve for each score."""
    cells = [_score_cells(row) for row in rows]
    names = list(dict.fromkeys(name for found in cells for name in found))
    if not names:
        return Html("")
    how = {
        key: [plain(row[key]) if key in row else "–" for row in rows] for key in _HOW if any(key in row for row in rows)
    }
    shared = {_NAMES.get(key, key): values[0] for key, values in how.items() if len(set(values)) == 1}
    columns = {"checkpoint": [plain(row["checkpoint_step"]) if "checkpoint_step" in row else "–" for row in rows]}
    columns |= {_NAMES.get(key, key): values for key, values in how.items() if len(set(values)) > 1}
    words = len(columns)
    columns |= {name: [found.get(name, "–") for found in cells] for name in names}
    if len(rows) <= _FEW:  # a column an evaluation, since a phone is narrow and the names are long
        top = ["checkpoint", *columns.pop("checkpoint")]
        made = table("Scores", top, [[key, *row] for key, row in columns.items()])
    else:
        made = table("Scores", list(columns), list(zip(*columns.values(), strict=True)), words)
    said = [plain(item) for row in rows if isinstance(row.get("cautions"), list) for item in row["cautions"]]
    notes = tag("ul", *(tag("li", item) for item in dict.fromkeys(said)), class_="fine") if said else ""
    told = (
        "Lower is better, except for is, precision, recall, density and coverage; authenticity should be that of "
        "held-out images. Scores can be compared only at the same count, features and reference."
    )
    alike = tag("p", "; ".join(f"{key} {value}" for key, value in shared.items()), class_="fine") if shared else ""
    return join(tag("p", told), alike, made, notes, _by_checkpoint(rows))


def _by_checkpoint(rows: list[dict]) -> Html:
    """Scores over training, of the evaluations that were made as the last one was."""
    drawn = [row for row in rows if number(row.get("checkpoint_step")) is not None and score_names(row)]
    same = [key for key in _HOW if key != "protocol"]  # older rows do not say it
    alike = [row for row in drawn if all(row.get(key) == drawn[-1].get(key) for key in same)]
    latest = {row["checkpoint_step"]: row for row in alike}
    if len(latest) < 2:
        return Html("")
    ordered = [latest[step] for step in sorted(latest)]
    charts = [
        chart([_line(ordered, name, name, "checkpoint_step")], title=name, y_label="score", x_label="checkpoint")
        for name in score_names(drawn[-1])
    ]
    return tag("div", *charts, class_="charts")


def comparison(contents: Contents) -> Html:
    """The table of compare.md, its notes, and the picture of the same seeds."""
    lines = [line.strip() for line in contents.comparison.splitlines() if line.strip()]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [row for row in cells[1:] if set("".join(row)) - set("-:")]  # without the rule under the head
    parts: list[object] = [table("Comparison", cells[0], rows, words=2)] if cells else []
    parts += [tag("p", line, class_="fine") for line in lines if not line.startswith("|")]
    told = "A row a system and sampler, the same seeds in each: look at what the scores do not say."
    parts += [figure(picture, "Samples.", told) for picture in _under(contents, "compare.png")]
    if parts and contents.runs:
        parts.append(tag("p", f"Its runs are workdirs of their own: {', '.join(contents.runs)}.", class_="fine"))
    return join(*parts)


# ── Figures, data, settings ──────────────────────────────────────────────────────────────────────────────────────────


def _known(stem: str) -> str:
    """The analysis that made figures/<stem>.png; empty for another picture."""
    return next((name for name in _CAPTIONS if stem == name or stem.startswith((f"{name}_", f"{name}-"))), "")


def figures(contents: Contents) -> Html:
    """The pictures of analyses, each with what to look for; then any others."""
    found = [(pathlib.PurePath(picture.path).stem, picture) for picture in _under(contents, "figures/")]
    found.sort(key=lambda pair: [*_CAPTIONS, ""].index(_known(pair[0])))
    made = [
        (picture, f"{stem.replace('_', ' ').capitalize()}.", _CAPTIONS.get(_known(stem), "")) for stem, picture in found
    ]
    return plates([figure(*one) for one in made])


def data(contents: Contents) -> Html:
    """Which images were seen, and what --mode=inspect found in them."""
    seen, found = contents.data, {key: one for key, one in contents.inspected.items() if contents.data.get(key) != one}
    if isinstance(found.get("duplicates"), dict):
        found["duplicates"] = found["duplicates"].get("images_too_many")
    if isinstance(law := found.get("spectrum"), dict):  # `slopes`: of an older report, over two ranges
        found["spectrum"] = law.get("told", law.get("slopes"))
    told = {key: plain(value) for key, value in seen.items()}
    named = {_NAMES.get(key, key.replace("_", " ")): plain(value) for key, value in found.items()}
    titles = {"inspect/contact_sheet.png": "Images of the set.", "inspect/spectrum.png": "Their radial power spectrum."}
    shots = [figure(picture, titles[picture.path]) for picture in _under(contents, "inspect/")]
    inspected = join(tag("h3", "Inspected"), pairs(named)) if named else ""
    return join(pairs(told) if told else "", inspected, plates(shots))


def config(tree: dict) -> Html:
    """A folding list for each section; those that say what was trained are open."""
    alone = {key: plain(value) for key, value in tree.items() if not isinstance(value, dict)}
    made = [tag("details", tag("summary", "run"), pairs(alone), open=True)] if alone else []
    order = {name: place for place, name in enumerate(("process", "model", "train", "data", "sample", "eval"))}
    for name in sorted((key for key in tree if key not in alone), key=lambda key: (order.get(key, 99), key)):
        values = {key: plain(value) for key, value in flat(tree[name]).items()}
        made.append(tag("details", tag("summary", name), pairs(values), open=order.get(name, 99) < 4 or None))
    return tag("div", *made, class_="cards") if made else Html("")


def network(parameters: str) -> Html:
    """The network, layer by layer, folded under its last line, the total."""
    if not parameters.strip():
        return Html("")
    total = parameters.strip().splitlines()[-1].replace("--", "–")
    return tag("details", tag("summary", total), tag("pre", parameters, tabindex=0))


def environment(contents: Contents) -> Html:
    """What the run was trained with, and how to train the same again."""
    told = "Of the training." if contents.of_training else "Of the process that wrote this page; the run records none."
    parts = [
        tag("p", told),
        pairs(contents.environment, "pairs columns"),
    ]
    if contents.config:
        command = "python -m warm_jax --config=FOLDER/again.py --workdir=NEW"
        parts += [
            tag("h3", "To train the same again"),
            tag("p", "All values are in config.json. Save this beside it, in the same FOLDER, as again.py:"),
            tag("pre", _AGAIN, tabindex=0),
            tag("pre", command, tabindex=0),
        ]
    return join(*parts)
