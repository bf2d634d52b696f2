"""`--mode=inspect`: what is in a set of images, before anything is trained on it.

Writes report.json, contact_sheet.png, spectrum.csv and (with matplotlib, `warm_jax[plot]`) spectrum.png, and prints the
report. Numbers of pixels are on the scale that training uses, [-1, 1].
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from warm_jax.analysis import spectra
from warm_jax.data import arrays, decoding, sources
from warm_jax.data.arrays import Items
from warm_jax.diffusion import radial
from warm_jax.runtime import letters

_SPECTRUM_IMAGES = 10_000  # as analysis.images, so that both quote the same slope …
_SPECTRUM_PIXELS, _SPECTRUM_SIDE = 2**27, 256  # … but of large images fewer, and the middle of them


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image: its size and colour mode, why training would not read it, and sums over its pixels."""

    shape: tuple[int, int] | None  # None: broken
    mode: str
    label: int
    problem: str
    digest: bytes
    sums: np.ndarray  # [2, 3]: of x and of x², for each channel, x in [-1, 1]


def run(images: str, out: str, *, limit: int | None = None, workers: int | None = None, progress: bool = True) -> int:
    """Look at the first `limit` (by default all) images of source `images`; what was found goes to the folder `out`."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 image")
    items, folder = sources.open_items(images), pathlib.Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    count = min(len(items), limit or len(items))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        bar = tqdm(total=count, unit="image", desc="inspect", disable=not progress)
        seen = []
        with bar:
            for start in range(0, count, 1024):
                chunk = range(start, min(start + 1024, count))
                seen += pool.map(lambda i: look(items, i), chunk)
                bar.update(len(chunk))
    report = summarise(items, seen)
    good = [i for i, one in enumerate(seen) if not one.problem]
    if good:
        side = min(min(seen[i].shape) for i in good)
        report["spectrum"] = _write_spectrum(folder, spectrum(items, good, min(side, _SPECTRUM_SIDE)))
        contact_sheet(items, good, [seen[i].label for i in good]).save(folder / "contact_sheet.png")
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    # A path that is not UTF-8 has lone surrogates, which JSON can only escape.
    (folder / "report.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    written = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))  # without its lock
    print(letters.printable(f"{_text(report)}\nwritten: {', '.join(written)} in {folder}"))
    return 0


def look(items: Items, index: int) -> Seen:
    """What there is to know of one image; a broken one, or one that training would refuse, is no error here."""
    name, shape, mode, label = items.name(index), None, "", arrays.NO_LABEL
    try:
        content, label = items.get(index)
        picture = decoding.open_picture(content, name)
        shape, mode = (picture.height, picture.width), picture.mode
        pixels = decoding.decode(content, name)
    except (ValueError, OSError) as error:
        return Seen(shape, mode, label, str(error), b"", np.zeros((2, 3)))
    x = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64) / 127.5 - 1
    sums = np.broadcast_to(np.stack([x.sum(0), (x * x).sum(0)]), (2, 3))
    digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()
    return Seen(shape, mode, label, "", digest, sums)


def summarise(items: Items, seen: list[Seen]) -> dict:
    """The report, without its spectrum. Mean and standard deviation are over all pixels of all readable images.

    `sigma_data` is the standard deviation about the one mean of all channels: √(E[x²] - E[x]²), EDM's σ_data.
    """
    good, uneven = [one for one in seen if not one.problem], _uneven(items, seen)
    by_digest = collections.defaultdict(list)
    for index, one in enumerate(seen):
        if not one.problem:
            by_digest[one.digest].append(items.name(index))
    twins = [names for names in by_digest.values() if len(names) > 1]
    sizes = collections.Counter(f"{one.shape[0]}×{one.shape[1]}" for one in seen if one.shape)
    classes = collections.Counter(one.label for one in good if one.label != arrays.NO_LABEL)
    report = {
        **{"source": items.spec, "fingerprint": items.fingerprint, "count": len(items), "inspected": len(seen)},
        **{"readable": len(good), "sizes": dict(sizes.most_common())},
        "colour_modes": dict(collections.Counter(one.mode for one in seen if one.shape).most_common()),
        "classes": {str(label): classes[label] for label in sorted(classes)},
        "broken": [one.problem for one in seen if not one.shape],
        "to_prepare": [one.problem for one in seen if one.shape and one.problem] + uneven,
        "duplicates": {"images_too_many": sum(len(names) - 1 for names in twins), "groups": twins[:100]},
    }
    if report["to_prepare"]:
        sides = [min(one.shape) for one in seen if one.shape]
        grey = all(one.mode in ("L", "1") for one in seen if one.shape)
        report["prepare"] = sources.preparing(items.spec, sources.suited(sides), 1 if grey else 3)[1]
    if good:
        pixels = sum(one.shape[0] * one.shape[1] for one in good)
        mean, square = sum(one.sums for one in good) / pixels
        channels = 1 if {one.mode for one in good} <= {"L", "1"} else 3
        report["mean"] = mean[:channels].tolist()
        report["std"] = np.sqrt(square - mean**2)[:channels].tolist()
        report["sigma_data"] = float(np.sqrt(square.mean() - mean.mean() ** 2))
    return report


def _uneven(items: Items, seen: list[Seen]) -> list[str]:
    """Of readable images that are not of one shape, those that differ from most; all, where there are no most."""
    shapes = [None if one.problem else (*one.shape, 1 if one.mode in ("L", "1") else 3) for one in seen]
    (most, count), *others = collections.Counter(filter(None, shapes)).most_common() or [(None, 0)]
    alone = 2 * count <= sum(shape is not None for shape in shapes)  # no shape is that of more than half
    said = "there is no common size" if alone else f"most are {'×'.join(map(str, most))}"
    return [
        f"{items.name(index)}: is {'×'.join(map(str, shape))}, {said}"
        for index, shape in enumerate(shapes)
        if others and shape is not None and (alone or shape != most)
    ]


def spectrum(items: Items, good: list[int], side: int) -> spectra.Measured:
    """The mean DCT power `[side, side]` of the channels, as `--analysis=spectra` measures it.

    Of at most 10,000 images, spread over the set; of each the square of `side` pixels in its centre.
    """
    most = min(len(good), _SPECTRUM_IMAGES, max(1, _SPECTRUM_PIXELS // side**2))
    chosen = [good[i] for i in np.unique(np.linspace(0, len(good) - 1, most).astype(int))]

    def square(index: int) -> np.ndarray:
        pixels = decoding.decode(items.get(index)[0], items.name(index))
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        return pixels[top : top + side, left : left + side]

    def batch(part: list[int]) -> np.ndarray:
        squares = [square(index) for index in part]
        shape = (side, side, max(pixels.shape[-1] for pixels in squares))
        return np.stack([np.broadcast_to(pixels, shape) for pixels in squares])  # grey ones among others of colour

    size = max(1, min(1000, 2**22 // side**2))
    return spectra.measure(batch(chosen[start : start + size]) for start in range(0, len(chosen), size))


def contact_sheet(items: Items, good: list[int], labels: list[int]) -> Image.Image:
    """Up to 100 images, in the middle of their cells: a row a class where there are 2 to 20, else spread out."""
    classes = sorted(set(labels))
    if 2 <= len(classes) <= 20:
        rows = [[i for i, label in zip(good, labels, strict=True) if label == one] for one in classes]
        rows = [[row[j] for j in np.unique(np.linspace(0, len(row) - 1, 10).astype(int))] for row in rows]
    else:
        spread = [good[j] for j in np.unique(np.linspace(0, len(good) - 1, 100).astype(int))]
        rows = [spread[start : start + 10] for start in range(0, len(spread), 10)]
    pictures = [[decoding.open_picture(items.get(i)[0], items.name(i)).convert("RGB") for i in row] for row in rows]
    largest = max(max(picture.size) for row in pictures for picture in row)
    cell = min(128, largest * max(1, 64 // largest))
    sheet = Image.new("RGB", (max(map(len, rows)) * (cell + 2), len(rows) * (cell + 2)), "white")
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            scale = cell / max(picture.size)
            size = [max(1, round(length * scale)) for length in picture.size]
            method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            place = [n * (cell + 2) + 1 + (cell - length) // 2 for n, length in zip((x, y), size, strict=True)]
            sheet.paste(picture.resize(size, method), tuple(place))
    return sheet


def _write_spectrum(folder: pathlib.Path, measured: spectra.Measured) -> dict:
    """Writes spectrum.csv and spectrum.png; the slope (diffusion/radial.py defines it), for the report."""
    found, law = radial.radial(measured.power), radial.slope(measured.power, covariance=measured.covariance)
    errors = np.sqrt(np.maximum(np.diag(measured.covariance), 0))
    lines = [f"{k:.0f},{p:.6g},{e:.3g}" for k, p, e in zip(found.k, found.power, errors, strict=True)]
    (folder / "spectrum.csv").write_text(
        "\n".join(["frequency,channel_power,standard_error", *lines]) + "\n", encoding="utf-8"
    )
    slope, error = (None if math.isnan(value) else value for value in law[:2])  # NaN is not JSON
    written = {"images": measured.count, "side": len(measured.power), "slope": slope, "slope_error": error}
    written |= {"slope_bands": [law.first, law.last], "told": spectra.slope_in_words(law)}
    try:
        from warm_jax.analysis.plots import radial_spectrum
    except ImportError:
        return {**written, "picture": "left out: pip install 'warm_jax[plot]'"}
    radial_spectrum(found, law).savefig(folder / "spectrum.png")
    return {**written, "picture": "spectrum.png"}


def _text(report: dict) -> str:
    def some(values: list[str] | dict, most: int = 6) -> str:
        shown = [f"{k}: {v}" for k, v in values.items()] if isinstance(values, dict) else values
        return ", ".join(map(str, shown[:most])) + (f", … ({len(shown)} in all)" if len(shown) > most else "")

    def numbers(values: list[float]) -> str:
        return ", ".join(f"{v:.4f}" for v in values)

    rows = {
        "source": f"{report['source']}  ({report['fingerprint'][:16]}…)",
        "images": f"{report['count']}, inspected {report['inspected']}, readable {report['readable']}",
        "sizes": some(report["sizes"]),
        "colour modes": some(report["colour_modes"]),
        "classes": some(report["classes"], 20) or "none",
        "broken": f"{len(report['broken'])}  {some(report['broken'], 3)}",
        "to prepare": f"{len(report['to_prepare'])}  {some(report['to_prepare'], 3)}",
        "duplicates": f"{report['duplicates']['images_too_many']}  "
        + some([" = ".join(names[:3]) for names in report["duplicates"]["groups"]], 3),
    }
    if "prepare" in report:
        rows["so run once"] = report["prepare"]
    if "mean" in report:
        rows["mean, on [-1, 1]"], rows["std"] = numbers(report["mean"]), numbers(report["std"])
        rows["sigma_data to use"] = f"{report['sigma_data']:.4f}"
        rows["spectrum"] = f"{report['spectrum']['told']}; {report['spectrum']['picture']}"
    return "\n".join(f"{name:<18}{value}".rstrip() for name, value in rows.items())
