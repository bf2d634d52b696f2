"""The sections of a report: what was read from a workdir, as HTML. Each is empty where its part is missing."""

import base64
import math
import pathlib
from collections.abc import Sequence

from warm_jax.analysis.charts import Line, chart, number, shown, spark
from warm_jax.analysis.contents import Contents, Picture
from warm_jax.analysis.markup import Html, join, tag

# What to look for in the figure of an analysis.
_CAPTIONS = {
    "spectra": "Where the noise lies above the images' power it swallows the band; where the blurred curve falls away "
    "blur has removed it. The recommended BNR removes only what noise had hidden.",
    "corruption": "Images along the process: look for detail that blur takes while noise would still have shown it.",
    "learning": "Which frequencies are learned when: a band that stays behind is one that the network does not learn.",
    "manifold": "How far the sampler's states lie off the true corrupted images: near zero is on the data manifold, a "
    "rise shows where sampling leaves it.",
    "sweep": "The score for each blur-to-noise ratio: look for the lowest point, and whether it is lower by more than "
    "chance would make it.",
}
_HOW = ("images", "count", "numbers", "system", "bnr", "solver", "steps", "nfe", "guidance", "reference")
_NAMES = {"nfe": "NFE", "bnr": "BNR", "numbers": "seeds or numbers"}
_MOST = 12  # items of a list or table that are shown
_AGAIN = """import json, pathlib, ml_collections

def get_config(system="warm"):
    saved = pathlib.Path(__file__).with_name("config.json").read_text()
    return ml_collections.ConfigDict(json.loads(saved))
"""


# ── Parts that several sections use ──────────────────────────────────────────────────────────────────────────────────


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """The leaves of nested dicts by their names with dots."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def plain(value: object) -> str:
    """A value of a JSON file for reading; of long lists the beginning."""
    if value is None or value == "":
        return "unset"
    if isinstance(value, dict):
        value = [f"{key}: {plain(one)}" for key, one in value.items()]
    if isinstance(value, list):
        more = f", … ({len(value)} in all)" if len(value) > _MOST else ""
        return ", ".join(map(plain, value[:_MOST])) + more or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def pairs(values: dict[str, str], kind: str = "pairs") -> Html:
    """A list of names and values; `kind` is its class in the style sheet."""
    return tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in values.items()), class_=kind)


def _table(about: str, head: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> Html:
    """A table that scrolls within its own box; after the first `words` columns come numbers."""
    kinds = [None if i < words else "number" for i in range(len(head))]
    top = [tag("th", name, scope="col", class_=kind) for name, kind in zip(head, kinds, strict=True)]
    body = [[tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=False)] for row in rows]
    table = tag("table", tag("thead", tag("tr", *top)), tag("tbody", *(tag("tr", *cells) for cells in body)))
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=about)


def _figure(picture: Picture, title: str, caption: str = "") -> Html:
    encoded = base64.b64encode(picture.content).decode()
    size = {"width": picture.width, "height": picture.height}
    image = tag("img", src=f"data:image/png;base64,{encoded}", alt=f"{title} {caption}".strip(), **size)
    return tag("figure", image, tag("figcaption", tag("strong", title), " ", caption), class_="picture")


def _under(contents: Contents, folder: str) -> list[Picture]:
    return [picture for picture in contents.pictures if picture.path.startswith(folder)]


# ── Samples and training ─────────────────────────────────────────────────────────────────────────────────────────────


def samples(contents: Contents) -> Html:
    """The grid that --mode=sample drew, and previews of training."""
    settings, how = contents.made_with.get("sample"), ""
    if isinstance(settings, dict) and "checkpoint_step" in contents.made_with:
        step = plain(contents.made_with["checkpoint_step"])
        how = f"Checkpoint of step {step}; {plain(settings.get('solver'))}, {plain(settings.get('steps'))} steps."
    drawn = [_figure(picture, "Samples.", how) for picture in _under(contents, "samples/")]
    steps = [(int(pathlib.PurePath(picture.path).stem), picture) for picture in _under(contents, "grids/")]
    previews = [_figure(picture, f"Step {step:,}.") for step, picture in steps]
    if not previews:
        return join(*drawn)
    told = tag("p", "The same noise and classes at each step, so that what changes is the network.")
    return join(*drawn, tag("h3", "While training"), told, tag("div", *previews, class_="row"))


def _line(rows: list[dict], key: str, name: str, x: str = "step") -> Line:
    return Line(name, [number(row[x]) or 0.0 for row in rows], [number(row.get(key)) for row in rows])


def training(rows: list[dict]) -> Html:
    """Curves of the loss by head, gradient, learning rate and speed, and a table of the loss by noise level."""
    if not rows:
        return Html("")
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
    lost = sum(number(row.get("nonfinite_steps")) or 0 for row in rows)
    note = tag("p", f"The loss of {lost:,.0f} steps was not finite; they count for nothing here.", class_="notes")
    return join(note if lost else "", tag("div", *charts, class_="charts"), _by_noise(rows, heads))


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
        cells: list[object] = [interval.replace("-inf", " and more").replace("-", " – ")]
        for head in heads:
            line = _line(rows, f"loss_{head}/noise_{interval}", f"{head}, noise {interval}")
            cells += [spark(line), shown(next((y for y in reversed(line.y) if y is not None), None))]
        body.append(cells)
    if not body or not heads:
        return Html("")
    told = tag("p", "Each course has a logarithmic scale of its own; beside it the last value.")
    columns = [title for head in heads for title in (head, "last")]
    return join(tag("h3", "Loss by noise level"), told, _table("Loss by noise level", ["noise", *columns], body))


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
        spread = number(row.get(f"{name}_std"))
        found[name] = shown(number(row.get(name))) + (f" ± {spread:.2g}" if spread is not None else "")
    for name in [key.removesuffix("_std_of_rounds") for key in row if key.endswith("_std_of_rounds")]:
        low, mean, spread = (number(row.get(f"{name}_{part}")) for part in ("min", "mean", "std_of_rounds"))
        rounds = plain(row.get("rounds"))
        found[name] = f"{shown(low)} (least of {rounds}; {shown(mean)} ± {shown(spread)})"
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
    shared = [f"{_NAMES.get(key, key)} {values[0]}" for key, values in how.items() if len(set(values)) == 1]
    varying = [key for key, values in how.items() if len(set(values)) > 1]
    head = ["checkpoint", *(_NAMES.get(key, key) for key in varying), *names]
    steps = [plain(row["checkpoint_step"]) if "checkpoint_step" in row else "–" for row in rows]
    body = [
        [steps[i], *(how[key][i] for key in varying), *(found.get(name, "–") for name in names)]
        for i, found in enumerate(cells)
    ]
    told = (
        "Lower is better, but for is, precision and recall. A score is only comparable at the same count, features and "
    )
    said = [item for row in rows if isinstance(row.get("cautions"), list) for item in row["cautions"]]
    notes = tag("ul", *(tag("li", plain(item)) for item in dict.fromkeys(map(plain, said))), class_="fine")
    alike = tag("p", f"In all rows: {', '.join(shared)}.") if shared else ""
    table = _table("Scores", head, body, words=1 + len(varying))
    return join(tag("p", f"{told}reference."), alike, table, notes if said else "", _by_checkpoint(rows))


def _by_checkpoint(rows: list[dict]) -> Html:
    """Scores over training, of the evaluations that were made as the last one was."""
    drawn = [row for row in rows if number(row.get("checkpoint_step")) is not None and score_names(row)]
    alike = [row for row in drawn if all(row.get(key) == drawn[-1].get(key) for key in _HOW)]
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
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [row for row in table[1:] if set("".join(row)) - set("-:")]  # without the rule under the head
    parts: list[object] = [_table("Comparison", table[0], rows, words=2)] if table else []
    parts += [tag("p", line, class_="fine") for line in lines if not line.startswith("|")]
    told = "A row a system and sampler, the same seeds in each: look at what the scores do not say."
    parts += [_figure(picture, "Samples.", told) for picture in _under(contents, "compare.png")]
    if parts and contents.runs:
        parts.append(tag("p", f"Its runs are workdirs of their own: {', '.join(contents.runs)}.", class_="fine"))
    return join(*parts)


# ── Figures, data, settings ──────────────────────────────────────────────────────────────────────────────────────────


def figures(contents: Contents) -> Html:
    """The pictures of analyses, each with what to look for."""
    made = []
    for picture in _under(contents, "figures/"):
        stem = pathlib.PurePath(picture.path).stem
        known = [name for name in _CAPTIONS if stem == name or stem.startswith((f"{name}_", f"{name}-"))]
        title = stem.replace("_", " ").capitalize()
        made.append(_figure(picture, f"{title}.", _CAPTIONS[known[0]] if known else ""))
    return join(*made)


def data(contents: Contents) -> Html:
    """Which images were seen, and what --mode=inspect found in them."""
    seen, found = flat(contents.data), dict(contents.inspected)
    for key in ("broken", "to_prepare"):
        if isinstance(found.get(key), list):
            found[key] = [f"{len(found[key])}", *found[key][:3]] if found[key] else "0"
    titles = {"inspect/contact_sheet.png": "Images of the set.", "inspect/spectrum.png": "Their radial power spectrum."}
    parts: list[object] = [pairs({key: plain(value) for key, value in seen.items()})] if seen else []
    if found:
        parts += [tag("h3", "Inspected"), pairs({key.replace("_", " "): plain(value) for key, value in found.items()})]
    parts += [_figure(picture, titles[picture.path]) for picture in _under(contents, "inspect/")]
    return join(*parts)


def config(tree: dict) -> Html:
    """A folding list for each section; those that say what was trained are open."""
    alone = {key: plain(value) for key, value in tree.items() if not isinstance(value, dict)}
    made = [tag("details", tag("summary", "run"), pairs(alone), open=True)] if alone else []
    order = {name: place for place, name in enumerate(("process", "model", "train", "data", "sample", "eval"))}
    for name in sorted((key for key in tree if key not in alone), key=lambda key: (order.get(key, 99), key)):
        values = {key: plain(value) for key, value in flat(tree[name]).items()}
        made.append(tag("details", tag("summary", name), pairs(values), open=order.get(name, 99) < 4 or None))
    return tag("div", *made, class_="cards") if made else Html("")


def network(table: str) -> Html:
    """The network, layer by layer, folded."""
    if not table.strip():
        return Html("")
    last = table.strip().splitlines()[-1]
    return tag("details", tag("summary", last), tag("pre", table, tabindex=0))


def environment(contents: Contents) -> Html:
    """What wrote the page, and how to train the same again."""
    parts = [
        tag("p", "Of the process that wrote this page; a run does not record the one that trained it."),
        pairs(contents.environment),
    ]
    if contents.config:
        command = "python -m warm_jax.main --config=FOLDER/again.py --workdir=NEW"
        parts += [
            tag("h3", "To train the same again"),
            tag("p", "All values are in config.json. Save this as again.py in the same FOLDER, then"),
            tag("pre", command, tabindex=0),
            tag("pre", _AGAIN, tabindex=0),
        ]
    return join(*parts)
