"""Cuts photographs into patches to train on: --out=FILE.zip of PNGs, which --config.data.source=zip:FILE.zip reads.

    python benchmarks/patches.py --out=patches.zip FOLDER [FOLDER …]

Every photograph in the folders is reduced to each of --sides (its longer side, never enlarged), which shows the same
things sharp and at several sizes, and cut into disjoint squares. Of the squares with almost nothing in them (a standard
deviation below --flat grey levels, skies and studio walls) one in eight is kept; at most --most, drawn at random.
"""

import argparse
import io
import pathlib
import zipfile

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

KINDS = (".jpg", ".jpeg", ".png")


def squares(path: pathlib.Path, sides: list[int], patch: int) -> np.ndarray:
    """All patches of a photograph, `[n, patch, patch, 3]` uint8."""
    found = []
    with Image.open(path) as opened:
        if opened.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits a pixel; convert it first")
        photograph = ImageOps.exif_transpose(opened).convert("RGB")
    for side in sorted({min(side, max(photograph.size)) for side in sides}):
        factor = side / max(photograph.size)
        small = photograph.resize([max(patch, round(n * factor)) for n in photograph.size], Image.Resampling.LANCZOS)
        pixels = np.asarray(small)
        rows, columns = (n // patch for n in pixels.shape[:2])
        cut = pixels[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch, 3)
        found.append(cut.swapaxes(1, 2).reshape(-1, patch, patch, 3))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True)
    parser.add_argument("--sides", default="1280,800,480", help="longer sides of the reduced photographs, pixels")
    parser.add_argument("--patch", type=int, default=32, help="side of a patch, pixels")
    parser.add_argument("--flat", type=float, default=4.0, help="grey levels, see above")
    parser.add_argument("--most", type=int, default=60_000)
    flags = parser.parse_args()
    paths = sorted(path for top in flags.folders for path in top.rglob("*") if path.suffix.lower() in KINDS)
    if not paths:
        parser.error(f"no photographs ({', '.join(KINDS)}) in {', '.join(map(str, flags.folders))}")
    rng, kept, sides = np.random.default_rng(0), [], [int(side) for side in flags.sides.split(",")]
    for path in tqdm(paths, unit=" photographs"):
        try:
            patches = squares(path, sides, flags.patch)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            tqdm.write(f"left out {path}: {error}")
            continue
        spread = patches.astype(np.float32).std(axis=(1, 2)).max(axis=-1)
        kept.append(patches[(spread >= flags.flat) | (rng.random(len(patches)) < 1 / 8)])
    patches = rng.permutation(np.concatenate(kept))[: flags.most]
    with zipfile.ZipFile(flags.out, "w", zipfile.ZIP_STORED) as out:
        for i, patch in enumerate(tqdm(patches, unit=" patches")):
            png = io.BytesIO()
            Image.fromarray(patch).save(png, "PNG")
            out.writestr(f"{i:06d}.png", png.getvalue())
    print(f"{len(patches)} of {sum(map(len, kept))} patches of {len(paths)} photographs in {flags.out}")


if __name__ == "__main__":
    main()
