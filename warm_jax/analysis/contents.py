"""What a workdir holds, read for its report. Any part may be missing; what is cut off or damaged is named in a note."""

import datetime
import io
import json
import pathlib
from typing import NamedTuple

from PIL import Image

from warm_jax.analysis.charts import number
from warm_jax.runtime import environment

PICTURE_BYTES = 20_000_000  # of all pictures in a page; base64 makes a third more of it


class Picture(NamedTuple):
    """A PNG of the workdir."""

    path: str  # within the workdir, with "/"
    content: bytes
    width: int
    height: int


class Contents(NamedTuple):
    """All that a report shows. What the workdir lacks is empty."""

    name: str  # of the workdir
    config: dict
    data: dict  # data.json
    metrics: list[dict]  # rows of training, by step
    parameters: str  # parameters.txt
    results: list[dict]  # rows of --mode=evaluate
    comparison: str  # compare.md
    runs: list[str]  # names of workdirs within, those of a comparison
    made_with: dict  # samples/samples.json
    inspected: dict  # inspect/report.json
    pictures: list[Picture]
    environment: dict[str, str]  # of the training; of the process that gathered this where the run does not say
    of_training: bool  # which of the two
    notes: list[str]  # what could not be read or shown, a sentence each
    written: str  # when, in UTC


def gather(workdir: pathlib.Path, picture_bytes: int = PICTURE_BYTES) -> Contents:
    """Reads whatever of a run, a comparison or an analysis is in `workdir`; pictures up to `picture_bytes` together.

    FileNotFoundError, naming it, where there is no such folder or nothing in it that a report could show.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is not there, so there is nothing to report; name a run's --workdir")
    notes: list[str] = []
    config, data, made_with, inspected, trained_on = (
        _json(workdir / name, notes)
        for name in ("config.json", "data.json", "samples/samples.json", "inspect/report.json", environment.FILE)
    )
    metrics = [row for row in _rows(workdir / "metrics.jsonl", notes) if number(row.get("step")) is not None]
    results = _rows(workdir / "results.jsonl", notes)
    parameters, comparison = (_text(workdir / name, notes) for name in ("parameters.txt", "compare.md"))
    pictures = _pictures(workdir, picture_bytes, notes)
    if not any((config, data, metrics, results, parameters, comparison, pictures, inspected, notes)):
        raise FileNotFoundError(
            f"{workdir} has nothing to report: no config.json, metrics.jsonl, results.jsonl, compare.md, grids, "
            "samples, figures; name a run's --workdir"
        )
    return Contents(
        name=workdir.resolve().name,
        config=config,
        data=data,
        metrics=sorted(metrics, key=lambda row: row["step"]),
        parameters=parameters,
        results=results,
        comparison=comparison,
        runs=sorted(path.parent.name for path in workdir.glob("*/config.json")),
        made_with=made_with,
        inspected=inspected,
        pictures=pictures,
        environment={key: str(value) for key, value in trained_on.items()} or environment.of_this_process(),
        of_training=bool(trained_on),
        notes=notes,
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _text(path: pathlib.Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{path.name} could not be read ({error.strerror}).")
        return ""


def _json(path: pathlib.Path, notes: list[str]) -> dict:
    """The object in a JSON file; empty, with a note, where it is damaged, and without one where it is not there."""
    text = _text(path, notes)
    try:
        found = json.loads(text) if text or path.is_file() else {}
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} is damaged and left out.")
    return {}


def _rows(path: pathlib.Path, notes: list[str]) -> list[dict]:
    """The objects of a .jsonl file, line by line; a note counts the lines that are none."""
    rows, damaged = [], []
    for place, line in enumerate(_text(path, notes).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged.append(place)
    if damaged:
        which = "line" if len(damaged) == 1 else f"{len(damaged)} lines, the first"
        notes.append(f"{path.name}: {which} {damaged[0]} is cut off or damaged and left out.")
    return rows


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def previews(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The first, the middle and the last of `grids/`."""
    grids = sorted(path for path in workdir.glob("grids/*.png") if path.stem.isdecimal())
    return [grids[i] for i in sorted({0, len(grids) // 2, len(grids) - 1})] if grids else []


def _pictures(workdir: pathlib.Path, limit: int, notes: list[str]) -> list[Picture]:
    """The pictures of a report, in its order; over the limit, previews are left out first and then the largest."""
    single = [workdir / name for name in ("samples/grid.png", "compare.png")]
    sets = [workdir / f"inspect/{name}.png" for name in ("contact_sheet", "spectrum")]
    paths = [*single[:1], *previews(workdir), *single[1:], *sorted(workdir.glob("figures/*.png")), *sets]
    found = [picture for picture in (_picture(path, workdir, notes) for path in paths) if picture is not None]
    leaving = sorted(found, key=lambda picture: (not picture.path.startswith("grids/"), -len(picture.content)))
    total, left_out = sum(len(picture.content) for picture in found), []
    while total > limit:
        left_out.append(leaving.pop(0))
        total -= len(left_out[-1].content)
    if left_out:
        names = ", ".join(picture.path for picture in left_out)
        notes.append(
            f"Pictures here may take {limit / 1e6:.3g} MB together; left out: {names}. They are in the workdir."
        )
    return [picture for picture in found if picture not in left_out]


def _picture(path: pathlib.Path, workdir: pathlib.Path, notes: list[str]) -> Picture | None:
    """None where there is no such file, and, with a note, where it is no whole PNG."""
    name = path.relative_to(workdir).as_posix()
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()  # reads every chunk and its checksum, decodes nothing
            return Picture(name, content, *image.size)
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        notes.append(f"{name} is no whole PNG and left out.")
        return None
