"""What is printed: letters that the terminal can show, and none that it obeys."""

import io
import sys


def escape_unknown_letters() -> None:
    r"""From now on, a letter that the encoding of stdout or stderr lacks is printed as an escape, as in `\xd7`.

    Otherwise a σ in a message would end the program, where the locale is not UTF-8 or PYTHONIOENCODING says so.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook has put something else
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    r"""`text` with all but printable letters, tabs and new lines as escapes, as in `\x1b`.

    Names of files, also those in an archive of somebody else, may hold control characters, which a terminal obeys.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
