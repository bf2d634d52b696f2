"""The blocks that a report's sections are made of: lists, tables, figures; and values as words."""

import base64
from collections.abc import Sequence

from warm_jax.analysis.contents import Picture
from warm_jax.analysis.markup import Html, tag

_MOST = 12  # items of a list that are shown
_PANELS = 1000  # pixels: a wider picture is of several panels, and needs the page's width


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """The leaves of nested dicts by their names with dots."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def plain(value: object) -> str:
    """A value of a JSON file for reading; of long lists the beginning."""
    if value is None or value == "":
        return "unset" if value is None else "–"
    if isinstance(value, dict):
        value = [f"{key}: {plain(one)}" for key, one in value.items()]
    if isinstance(value, list):
        more = f", … ({len(value)} in all)" if len(value) > _MOST else ""
        return ", ".join(map(plain, value[:_MOST])) + more or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def pairs(values: dict[str, str], kind: str = "pairs") -> Html:
    """A list of names and values; `kind` is its class in the style sheet."""
    return tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in values.items()), class_=kind)


def table(about: str, head: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> Html:
    """A table that scrolls within its own box; after the first `words` columns come numbers."""
    kinds = [None if i < words else "number" for i in range(len(head))]
    top = [tag("th", name, scope="col", class_=kind) for name, kind in zip(head, kinds, strict=True)]
    body = [[tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=False)] for row in rows]
    made = tag("table", tag("thead", tag("tr", *top)), tag("tbody", *(tag("tr", *cells) for cells in body)))
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=about)


def figure(picture: Picture, title: str, caption: str = "") -> Html:
    """A picture within the page, and under it what it is and what to look for, which is its alternative text too."""
    encoded = base64.b64encode(picture.content).decode()
    size = {"width": picture.width, "height": picture.height}
    image = tag("img", src=f"data:image/png;base64,{encoded}", alt=f"{title} {caption}".strip(), **size)
    wide = " wide" if picture.width > min(2 * picture.height, _PANELS) else ""
    return tag("figure", image, tag("figcaption", tag("strong", title), " ", caption), class_=f"picture{wide}")


def plates(figures: Sequence[Html]) -> Html:
    """Figures beside each other where there is room."""
    return tag("div", *figures, class_="plates") if figures else Html("")
