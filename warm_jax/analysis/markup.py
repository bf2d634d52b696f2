"""HTML from Python, in which text cannot become markup: every string that is not `Html` is escaped."""

import html
import re

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, lone surrogates
_VOID = ("img", "meta", "link")  # elements without an end tag


class Html(str):
    """Markup, to be taken as it is. Only `tag`, `join` and constants of this package make it."""


def text(value: object) -> Html:
    """Anything as text to show: `<`, `>`, `&` and quotes escaped, control characters and lone surrogates replaced."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", str(value)), quote=True))


def join(*children: object) -> Html:
    """The children one after another, each as `text` makes it."""
    return Html("".join(text(child) for child in children))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """The element `name`, its children as `join` makes them.

    `class_` stands for class, `_` within a name for `-`; an attribute that is None is left out, one that is True has
    no value. Names are the programmer's, never a file's.
    """
    written = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is not None:
            written.append(key if value is True else f'{key}="{text(str(value))}"')
    start = f"<{' '.join(written)}>"
    return Html(start if name in _VOID else f"{start}{join(*children)}</{name}>")
