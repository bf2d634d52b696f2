"""Pages of Markdown: their blocks of code, the lines of commands in these, and their links, dead or not."""

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "launch" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


# ── Blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Block(NamedTuple):
    """A fenced block of code; `note` is the comment on the line before it."""

    line: int
    language: str
    note: str
    text: str


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page."""
    pattern = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [Block(text[: m.start(3)].count("\n") + 1, m[2], m[1] or "", m[3]) for m in pattern.finditer(text)]


def prose(text: str) -> str:
    """The page without its blocks; lines keep their numbers."""
    return re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def bash_lines(text: str) -> Iterator[str]:
    """The lines of the ```bash blocks, continued ones as one."""
    for block in blocks(text):
        if block.language == "bash":
            yield from block.text.replace("\\\n", " ").splitlines()


# ── Links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def anchors(text: str) -> set[str]:
    """What a page's headings are called in links, on GitHub and, with the slugs that mkdocs.yml names, on the site."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", prose(text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}
    return slugs | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def links(text: str) -> list[str]:
    """The targets of links and pictures, Markdown's and HTML's."""
    text = re.sub(r"`[^`]*`", "``", prose(text))
    found = re.findall(r"\]\(([^()\s]+)(?:\s+\"[^\"]*\")?\)", text)
    return found + re.findall(r"(?:src|href)=\"([^\"]+)\"", text) + re.findall(r"^\[[^\]]+\]: *(\S+)", text, re.M)


def dead_links(page: pathlib.Path, text: str) -> list[str]:
    """Links of `page` to files that are not there, or to headings that their page has not."""
    dead = []
    for target in links(text):
        if re.match(r"[a-z]+:", target):  # of the web, which is not asked
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if other != page and not (other.exists() and other.is_relative_to(ROOT)):
            dead.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors(text if other == page else other.read_text()):
            dead.append(f"{target}: {other.name} has no such heading")
    return dead
