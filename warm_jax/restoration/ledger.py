"""What is restored in a folder already, and with which settings: restore.json.

    {"made_with": {KEY: settings},
     "images": {FILE: {"made_with": KEY, "source", "sha256", "outputs", "finished", …}},
     "failures": {FILE: reason}}                                                        of the last run

A result stays until one of the same photograph, changed or by other settings, takes its place; what other photographs
became is never touched. An image is noted before its results are written and once more when they all are there, so
that what a crash leaves is known as ours, and made again.
"""

import hashlib
import json
import pathlib

from warm_jax.runtime import workdirs

NOTE, SHEET = "restore.json", "before_after.png"


def _is_result(name: object) -> bool:
    """Whether it is what a result in the folder can be called."""
    return isinstance(name, str) and name.endswith(".png") and not {"/", "\\", "\0"} & set(name) and name != SHEET


def read(out: pathlib.Path) -> dict:
    """What restore.json says; without images where there is none, ValueError where it is damaged."""
    path = out / NOTE
    if not path.exists():
        return {"made_with": {}, "images": {}, "failures": {}}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        dict(note["made_with"])
        for entry in note["images"].values():
            texts = (entry["made_with"], entry["source"], entry["sha256"])
            if not all(isinstance(text, str) for text in texts) or entry["finished"] not in (True, False):
                raise ValueError("an image without its source, settings and state")
            if not (isinstance(entry["outputs"], list) and all(map(_is_result, entry["outputs"]))):
                raise ValueError("results that are not files in the folder")
        return note
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and its images, or name another --out") from error


def write(out: pathlib.Path, note: dict) -> None:
    """Writes restore.json, whole or not at all."""
    workdirs.write_atomically(out / NOTE, json.dumps(note, indent=2).encode() + b"\n")


def check_out(out: pathlib.Path, outputs: dict[pathlib.Path, tuple[str, ...]]) -> None:
    """Makes `out`; ValueError where results would lie among the images, or replace what was not made by restoring."""
    for path in outputs:
        if out.resolve() in (path.parent.resolve(), path.resolve().parent):  # the latter of a link to an image there
            raise ValueError(f"--out={out} is the folder of the images; name another, so that none is overwritten")
    if out.is_file():
        raise ValueError(f"--out={out} is a file; name a folder")
    if out.suffix.lower() in (".png", ".jpg", ".jpeg") and not out.is_dir():
        raise ValueError(f"--out={out} would be a folder of that name; name a folder: NAME.png is written into it")
    workdirs.check_writable(out)
    made = {name for entry in read(out)["images"].values() for name in entry["outputs"]}
    made |= {SHEET} if (out / NOTE).exists() else set()
    for name in [SHEET, *(name for of_one in outputs.values() for name in of_one)]:
        if (out / name).exists() and name not in made:
            raise ValueError(f"{out / name} is there and was not made by --mode=restore; name another --out")


def begin(out: pathlib.Path, made_with: dict) -> tuple[dict, str]:
    """The note of `out`, without failures, and the key of the settings `made_with` in it."""
    note = read(out)
    key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]
    used = {entry["made_with"] for entry in note["images"].values()}
    note["made_with"] = {k: v for k, v in note["made_with"].items() if k in used} | {key: made_with}
    note["failures"] = {}
    write(out, note)
    return note, key


def claim(key: str, path: pathlib.Path, content: bytes, outputs: tuple[str, ...]) -> dict:
    """What tells a result from others: settings, the photograph's file and content, names of results."""
    digest = hashlib.sha256(content).hexdigest()
    return {"made_with": key, "source": str(path.resolve()), "sha256": digest, "outputs": list(outputs)}


def has(out: pathlib.Path, note: dict, name: str, wanted: dict) -> bool:
    """Whether the image `name` is restored as `wanted`, a claim, wherever it lay; and its results are there."""
    entry = note["images"].get(name)
    if entry is None or not entry["finished"]:
        return False
    same = all(entry[key] == wanted[key] for key in ("made_with", "sha256", "outputs"))
    return same and all((out / result).exists() for result in wanted["outputs"])


def check_free(note: dict, name: str, wanted: dict) -> None:
    """Raises ValueError where results of the image `name` would replace those of another photograph."""
    names = set(wanted["outputs"])
    for other, entry in note["images"].items():
        same = other == name and (entry["source"] == wanted["source"] or entry["sha256"] == wanted["sha256"])
        if not same and (other == name or names & set(entry["outputs"])):
            there = min(names & set(entry["outputs"]) or entry["outputs"] or names)
            raise ValueError(f"{there} there is the result of {entry['source']}; name another --out")


def put(out: pathlib.Path, note: dict, name: str, entry: dict, contents: list[bytes]) -> None:
    """Writes the results of the image `name`, in place of those that it had, and notes them.

    Args:
      out: The folder.
      note: Of `begin`; it is changed.
      name: The image's.
      entry: Its claim, and what else is to be said of it.
      contents: Of the files `entry["outputs"]`.
    """
    old = note["images"][name]["outputs"] if name in note["images"] else []
    note["images"][name] = {**entry, "outputs": sorted({*old, *entry["outputs"]}), "finished": False}
    write(out, note)
    for result, content in zip(entry["outputs"], contents, strict=True):
        workdirs.write_atomically(out / result, content)
    for result in set(old) - set(entry["outputs"]):
        (out / result).unlink(missing_ok=True)
    note["images"][name] = {**entry, "finished": True}
    write(out, note)
