"""The text of an export's `sample.py`: images from its program, with four packages and without this one."""

TEXT = r'''"""Draws images by the exported program in this folder. Needs jax, flatbuffers, numpy, safetensors."""

import argparse
import hashlib
import json
import pathlib
import struct
import sys
import zlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ABOUT = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
CLASSES = ABOUT["config"]["data"]["num_classes"]
LICENCE = ABOUT["licence"] or "not known; the weights may be bound by the licence of the images they were trained on"


def numbers(text, end):
    """Whole numbers below `end` of text such as 0-15,20."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            found += range(int(first), int(last or first) + 1)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers, as 0-15,20") from None
    if not found or max(found) >= end or len(found) > 10**6:
        raise argparse.ArgumentTypeError(f"{text!r}: give up to a million numbers, from 0 to {end - 1:,}")
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"Licence of the weights: {LICENCE}.")
    parser.add_argument("count", nargs="?", help="how many images, of the seeds 0, 1, …; default 16")
    parser.add_argument("--seeds", help="which images, one a seed, as 0-15,20", type=lambda text: numbers(text, 2**32))
    if CLASSES:
        text = f"of each image, or one for all, as 3 or 0-9; there are {CLASSES}; default: drawn by the seed"
        parser.add_argument("--classes", help=text, type=lambda given: numbers(given, CLASSES))
    text = "a folder for a PNG an image, FILE.png for one picture of all, or FILE.npz; default: samples"
    parser.add_argument("--out", default="samples", type=pathlib.Path, help=text)
    parser.add_argument("--batch", default=64, type=int, help="images at a time; default 64")
    given = parser.parse_args()
    if given.count is not None and (given.seeds or not given.count.isdecimal() or int(given.count) < 1):
        parser.error(f"count is {given.count}: give a number of at least 1, or --seeds")
    given.seeds = given.seeds or list(range(int(given.count or 16)))
    classes = getattr(given, "classes", None) or [-1]
    if len(classes) not in (1, len(given.seeds)):
        parser.error(f"{len(classes)} classes for {len(given.seeds)} images: give one for all, or one each")
    given.classes = np.broadcast_to(np.array(classes, np.int32), len(given.seeds))
    if given.batch < 1:
        parser.error(f"--batch={given.batch}: it must be at least 1")
    if given.out.suffix not in ("", ".png", ".npz") or not given.out.resolve().parent.is_dir():
        parser.error(f"--out={given.out}: give a folder, FILE.png or FILE.npz, in a folder that is there")
    return given


def png(image):
    """The bytes of a PNG of uint8 [height, width, 1 or 3]."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in image)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def whole(part):
    """The bytes of a file of the export, if they are those that were written."""
    content = (HERE / part["file"]).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if part.get("sha256", digest) != digest:  # older exports do not say it of the program
        sys.exit(f"error: {HERE / part['file']} is damaged; copy or make the export again")
    return content


def draw(seeds, classes, batch):
    """Images uint8 [count, height, width, channels], `batch` at a time, so that one shape is compiled."""
    from jax import export
    from safetensors.numpy import load

    tensors = load(whole(ABOUT["weights"]))
    weights = [tensors[name] for name in sorted(tensors)]
    program = export.deserialize(bytearray(whole(ABOUT["sampler"])))
    batch, made = min(batch, len(seeds)), []
    for first in range(0, len(seeds), batch):
        rows = np.minimum(np.arange(first, first + batch), len(seeds) - 1)
        labels = [classes[rows]] if CLASSES else []
        made.append(np.asarray(program.call(weights, seeds[rows], *labels)))
        print(f"{min(first + batch, len(seeds))} of {len(seeds)} images", file=sys.stderr)
    return np.concatenate(made)[: len(seeds)]


def save(out, images, seeds, classes):
    if out.suffix == ".npz":
        np.savez(out, images=images, seeds=seeds, **({"classes": classes} if CLASSES else {}))
    elif out.suffix == ".png":
        columns = int(np.ceil(np.sqrt(len(images))))
        rows = -(-len(images) // columns)
        padded = np.pad(images, [(0, rows * columns - len(images)), (0, 0), (0, 0), (0, 0)])
        _, height, width, channels = images.shape
        grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
        out.write_bytes(png(np.ascontiguousarray(grid).reshape(rows * height, columns * width, channels)))
    else:
        out.mkdir(exist_ok=True)
        for seed, image in zip(seeds, images):
            (out / f"{seed:06d}.png").write_bytes(png(image))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # where the terminal knows no ×
    asked = parse()
    seeds = np.array(asked.seeds, np.uint32)
    save(asked.out, draw(seeds, asked.classes, asked.batch), seeds, asked.classes)
    print(f"{len(seeds)} images of {'×'.join(map(str, ABOUT['process']['image_shape']))} in {asked.out}")
    print(f"licence of the weights: {LICENCE}")
'''
