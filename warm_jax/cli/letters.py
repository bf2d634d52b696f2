"""What is printed, whatever the terminal can show."""

import io
import sys


def escape_unknown_letters() -> None:
    r"""From now on, a letter that the encoding of stdout or stderr lacks is printed as an escape, as in `\xd7`.

    Otherwise a σ in a message would end the program, where the locale is not UTF-8 or PYTHONIOENCODING says so.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook has put something else
            stream.reconfigure(errors="backslashreplace")


def shown(text: str) -> str:
    """`text` for a terminal: control characters, as a file's name may hold, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
