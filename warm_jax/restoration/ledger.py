"""What is restored in a folder already, and with which settings: restore.json.

    {"made_with": settings, "images": {FILE: {"sha256", "outputs", …}}, "failures": {FILE: reason}}

A result is kept while its image has the same content and the settings are the same; else it is removed and made again.
"""

import json
import pathlib

from warm_jax import workdirs

NOTE, SHEET = "restore.json", "before_after.png"


def read(out: pathlib.Path) -> dict:
    """What restore.json says; empty where there is none, ValueError where it is damaged."""
    path = out / NOTE
    if not path.exists():
        return {}
    try:
        note = json.loads(path.read_text())
        for entry in note["images"].values():
            if not (entry["sha256"] and all(name == pathlib.Path(name).name for name in entry["outputs"])):
                raise ValueError("results that are not files in the folder")
        return note
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and its images, or name another --out") from error


def write(out: pathlib.Path, note: dict) -> None:
    """Writes restore.json, whole or not at all."""
    workdirs.write_atomically(out / NOTE, json.dumps(note, indent=2).encode() + b"\n")


def check_out(out: pathlib.Path, outputs: dict[pathlib.Path, tuple[str, ...]]) -> None:
    """Makes `out`; ValueError where results would lie among the images, or replace what was not made by restoring."""
    for path in outputs:
        if out.resolve() == path.parent.resolve():
            raise ValueError(f"--out={out} is the folder of the images; name another, so that none is overwritten")
    if out.is_file():
        raise ValueError(f"--out={out} is a file; name a folder")
    workdirs.check_writable(out)
    made = {name for entry in read(out).get("images", {}).values() for name in entry["outputs"]}
    made |= {SHEET} if (out / NOTE).exists() else set()
    for name in [SHEET, *(name for of_one in outputs.values() for name in of_one)]:
        if (out / name).exists() and name not in made:
            raise ValueError(f"{out / name} is there and was not made by --mode=restore; name another --out")


def begin(out: pathlib.Path, made_with: dict) -> dict:
    """The note of what the same settings have made; what others made here is removed."""
    note = read(out)
    if note.get("made_with") != made_with:
        drop(out, note, {name for entry in note.get("images", {}).values() for name in entry["outputs"]})
        note = {"made_with": made_with, "images": {}}
    note["failures"] = {}
    write(out, note)
    return note


def has(out: pathlib.Path, note: dict, name: str, digest: str, outputs: tuple[str, ...]) -> bool:
    """Whether the image `name` of that content is restored, and its results are there."""
    entry = note["images"].get(name, {"sha256": "", "outputs": []})
    same = entry["sha256"] == digest and entry["outputs"] == list(outputs)
    return same and all((out / name).exists() for name in outputs)


def drop(out: pathlib.Path, note: dict, outputs: set[str]) -> None:
    """Removes the results of every image of which some are among `outputs`, and forgets them."""
    for name in [name for name, entry in note.get("images", {}).items() if set(entry["outputs"]) & outputs]:
        for result in note["images"].pop(name)["outputs"]:
            (out / result).unlink(missing_ok=True)
