"""A hook of mkdocs: on the site, links of a page to files outside of docs/ are plain words.

`[diffusion/ema.py](../warm_jax/diffusion/ema.py)` is a link for those who read docs/ on GitHub, but the site has no
such page. With `repo_url` in mkdocs.yml it becomes a link into that repository.
"""

import pathlib
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)\s]+)\)")
BLOCK = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """The page with its links to `../` changed, outside of blocks of code."""

    def other(match: re.Match[str]) -> str:
        if not config.repo_url:
            return match[1]
        path = match[2].partition("#")[0]
        kind = "blob" if pathlib.PurePath(path).suffix else "tree"
        return f"[{match[1]}]({config.repo_url.rstrip('/')}/{kind}/main/{match[2]})"

    parts = BLOCK.split(markdown)
    return "".join(part if i % 2 else LINK.sub(other, part) for i, part in enumerate(parts))
