r"""Classes out of EDM's `dataset.json`: {"labels": [["00000/img00000000.png", 6], …]}, or "labels": null.

Tools spell the names in it in many ways. They are those of the images if they are the same up to `\` for `/`, a
leading `./`, folders at the front that only one side has (the zip was made from within a folder, or around it), the
Unicode form of accents (macOS decomposes them), or capitals. Nothing is guessed beyond that: each image must have just
one class, and each name an image, or the error shows names of both sides.
"""

import itertools
import json
import reprlib
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from warm_jax.data import arrays, folders

_SHAPE = f"{folders.LABELS} is not {{'labels': [[name, class], …]}}"


def read(text: bytes | None, place: str, names: Sequence[str], path: str) -> tuple[np.ndarray, int]:
    """Classes int32 `[n]` of the images `names`, and how many there are; all -1 and 0 without a file, or of null.

    `text` is what stands in the file `place` of the folder or zip `path`. ValueError where the two do not fit.
    """
    pairs = None if text is None else _parse(text, path)
    if pairs is None:
        return arrays.check_labels(path, None, len(names))
    where = f"{path}: {folders.printable(place)}"
    classes = _assign(pairs, names, where)
    try:
        values = np.array(classes, np.int64)
    except OverflowError as error:
        raise ValueError(f"{where} has a class beyond 64 bits") from error
    return arrays.check_labels(path, values, len(names))


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; of one that has a key twice Python would keep the last."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice in one object")
    return dict(pairs)


def _parse(text: bytes, path: str) -> list[tuple[str, int]] | None:
    """The pairs of name and class; None where the file says that there are no classes."""
    try:
        found = json.loads(text, object_pairs_hook=_once)["labels"]
        pairs = None if found is None else list(found.items() if isinstance(found, dict) else found)
        for pair in pairs or ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise TypeError(f"{reprlib.repr(pair)} in place of [name, class]")
        pairs = None if pairs is None else [tuple(pair) for pair in pairs]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: {_SHAPE} ({arrays.reason(error)})") from error
    for name, label in pairs or ():
        if type(name) is not str:
            raise ValueError(f"{path}: {_SHAPE}: it calls an image {reprlib.repr(name)}, which is no path")
        if type(label) is not int:
            given = f"gives {_shown(name)} the class {reprlib.repr(label)}"
            raise ValueError(f"{path}: {folders.LABELS} {given}; it must be an integer")
    return pairs


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", folders.canonical(name))


def _folded(name: str) -> str:
    return _composed(name).casefold()


def _assign(pairs: list[tuple[str, int]], names: Sequence[str], where: str) -> list[int]:
    """The class of each image, by the first reading of the names that fits all of them; ValueError for none."""
    classes: dict[str, int] = {}
    for name, label in pairs:
        if classes.setdefault(folders.canonical(name), label) != label:
            other = classes[folders.canonical(name)]
            raise ValueError(f"{where} gives {_shown(name)} two classes, {other} and {label}; keep one")
    for spelling in (folders.canonical, _composed, _folded):
        if (found := _fit(classes, names, spelling)) is not None:
            return found
    images, raw = [folders.canonical(name) for name in names], [name for name, _ in pairs]
    if len(set(images)) != len(images):
        twice = _shown(next(name for name in images if images.count(name) > 1))
        raise ValueError(f"{where}: {twice} is the name of two images, so that its class is not known; rename one")
    named, there = _some(raw), _some(names)  # as they are spelt: slashes and accents may be what does not fit
    if missing := [name for name in images if name not in classes]:
        raise ValueError(
            f"{where} has no class for {len(missing)} of {len(names)} images, {_shown(missing[0])} the first; it names "
            f"{named}, the images are {there}"
        )
    extra = sorted(classes.keys() - set(images))
    raise ValueError(
        f"{where} names {len(extra)} images that are not there, {_shown(extra[0])} the first; the images are {there}"
    )


def _fit(classes: dict[str, int], names: Sequence[str], spelling: Callable[[str], str]) -> list[int] | None:
    """The class of each image where both sides are the same names in `spelling`; None where they are not."""
    given = {spelling(name): label for name, label in classes.items()}
    images = [spelling(name) for name in names]
    # Where two names become one, it is not told which image they mean.
    if len(given) != len(classes) or len(set(images)) != len(images) or len(given) != len(images):
        return None
    ours, theirs = _folder_of_all(images), _folder_of_all(list(given))
    if not (f"/{ours}".endswith(f"/{theirs}") or f"/{theirs}".endswith(f"/{ours}")):
        return None  # of another folder: train/ is not val/
    inner = {name[len(theirs) :]: label for name, label in given.items()}
    found = [inner.get(name[len(ours) :]) for name in images]
    return None if None in found else found


def _folder_of_all(names: list[str]) -> str:
    """The folder that all lie in, with a slash at its end; "" where they have none in common."""
    first, last = (name.split("/")[:-1] for name in (min(names), max(names)))
    common = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    return "".join(f"{folder}/" for folder in common)


def _shown(name: str) -> str:
    return ascii(name)[:120]


def _some(names: Sequence[str], most: int = 2) -> str:
    shown = [_shown(name) for name in names[:most]]
    return ", ".join(shown + ["…"] * (len(names) > most)) or "none"
