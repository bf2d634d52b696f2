"""`report.html`: what a workdir holds on one page that needs nothing else, to open by double click and to pass on.

Styles and pictures are within it, scripts there are none, and its content security policy forbids every request.
"""

import pathlib
import re

from warm_jax.analysis import sections
from warm_jax.analysis.blocks import flat, pairs, plain
from warm_jax.analysis.charts import number, shown
from warm_jax.analysis.contents import Contents, gather
from warm_jax.analysis.markup import Html, join, tag
from warm_jax.runtime import workdirs

__all__ = ["Contents", "gather", "render", "write"]

_STYLE = pathlib.Path(__file__).with_name("report.css")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` of what `workdir` holds, whole or not at all, and returns its path.

    FileNotFoundError, naming it, where there is no such folder or nothing in it to show.
    """
    page = render(gather(workdir))
    workdirs.write_atomically(workdir / "report.html", page.encode())
    return workdir / "report.html"


def render(contents: Contents) -> str:
    """The page. Sections without content are left out; the same contents give the same characters."""
    made = {
        "samples": ("Samples", sections.samples(contents)),
        "training": ("Training", sections.training(contents.metrics)),
        "scores": ("Scores", sections.scores(contents.results)),
        "comparison": ("Comparison", sections.comparison(contents)),
        "figures": ("Figures", sections.figures(contents)),
        "data": ("Data", sections.data(contents)),
        "config": ("Config", sections.config(contents.config)),
        "network": ("Network", sections.network(contents.parameters)),
        "environment": ("Environment", sections.environment(contents)),
    }
    parts = {key: part for key, part in made.items() if part[1]}
    links = [tag("a", title, href=f"#{key}") for key, (title, _) in parts.items()]
    main = [
        tag("section", tag("h2", title, id=f"{key}-title"), body, id=key, aria_labelledby=f"{key}-title")
        for key, (title, body) in parts.items()
    ]
    nav = tag("nav", *links, aria_label="Contents")
    version = contents.environment.get("warm_jax", "")
    foot = tag("footer", f"Written {contents.written} by warm_jax {version}. The page is complete: it loads nothing.")
    body = tag("body", _header(contents), nav, tag("main", *main), foot)
    return f"<!DOCTYPE html>\n{tag('html', _head(contents.name), body, lang='en')}\n"


def _head(name: str) -> Html:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name} – warm_jax"),
        tag("link", rel="icon", href="data:,"),  # a browser would ask a server for one
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )


def _header(contents: Contents) -> Html:
    """The name, the few facts that one asks for first, and what is damaged or left out."""
    notes = tag("ul", *(tag("li", note) for note in contents.notes), class_="notes", role="note")
    facts = _facts(contents)
    kind = "comparison" if contents.comparison else "run"
    title = join(tag("p", f"warm_jax {kind}", class_="kicker"), tag("h1", contents.name))
    return tag("header", title, pairs(facts, "facts") if facts else "", notes if contents.notes else "")


def _facts(contents: Contents) -> dict[str, str]:
    config, facts = flat(contents.config), {}
    if "process.system" in config:
        ratio = number(config.get("process.bnr"))
        facts["System"] = plain(config["process.system"]) + (f", BNR {ratio:g}" if ratio is not None else "")
    if "data.source" in config:
        side, count = plain(config.get("data.image_size")), number(contents.data.get("images"))
        source = plain(config["data.source"])
        source = source if len(source) <= 40 else f"…{source[-32:]}"  # whole under Data and Config
        facts["Images"] = (f"{count:,.0f} of " if count else "") + f"{side}×{side}, {source}"
    if total := re.search(r"^Total: ([\d,]+)", contents.parameters, re.MULTILINE):
        facts["Parameters"] = total[1]
    if contents.metrics:
        step, wanted = (number(value) for value in (contents.metrics[-1]["step"], config.get("train.steps")))
        facts["Trained"] = f"{step:,.0f}" + (f" of {wanted:,.0f} steps" if wanted else " steps")
        if batch := number(config.get("train.batch_size")):
            facts["Images seen"] = f"{step * batch:,.0f}"
    scored = [sections.score_names(row) for row in contents.results]
    if any(scored):
        row, names = next(pair for pair in zip(contents.results[::-1], scored[::-1], strict=True) if pair[1])
        facts |= {name: shown(number(row.get(name))) for name in names[:2]}
    return facts
