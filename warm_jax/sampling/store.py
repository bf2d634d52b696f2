"""Where samples go: a folder of PNG files, one npz, or one grid; and what of them is there already."""

import glob
import json
import pathlib
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from warm_jax.runtime import log, pictures, workdirs, writers
from warm_jax.sampling.trajectories import Trajectory
from warm_jax.weights import archives

GRID_IMAGES = 400
NPZ_NAMES = ("images", "arr")  # how the arrays of an npz are called


class Samples(NamedTuple):
    """Images uint8 `[n, h, w, c]`, how many network evaluations each took and, where it was kept, their way."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]
    nfe: int
    trajectory: Trajectory | None = None


def drawn_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files in `folder` that are named as samples, or their trajectories, are."""
    named = re.compile(r"(\d{6,}|grid|trajectory)\.png|trajectory\.gif")
    return [path for path in folder.iterdir() if named.fullmatch(path.name)] if folder.is_dir() else []


class Folder:
    """Samples as PNG files, one a seed, and `grid.png`. Those that the same weights and settings made are kept.

    Threads write them, so a full disk may be an error of the call after the one whose images it was.
    """

    def __init__(self, out: pathlib.Path, made_with: dict):
        self._writers = writers.Writers()
        self._out, self._note = out, out / "samples.json"
        self._content = json.dumps(made_with, indent=2).encode()
        self._stale = not (self._note.exists() and self._note.read_bytes() == self._content)

    def begin(self) -> None:
        """Removes what other weights or settings made. Called once everything that can be refused was tried."""
        if self._stale:
            for stale in drawn_images(self._out):
                stale.unlink()
            workdirs.write_atomically(self._note, self._content)
            self._stale = False

    def _path(self, seed: int) -> pathlib.Path:
        return self._out / f"{seed:06d}.png"

    def missing(self, seeds: np.ndarray) -> np.ndarray:
        """Those of `seeds` that are still to be drawn, a damaged one too."""
        return np.array([seed for seed in seeds.tolist() if self._stale or not self._is_whole(seed)], seeds.dtype)

    def _is_whole(self, seed: int) -> bool:
        path = self._path(seed)
        if not path.exists():
            return False
        if not (whole := pictures.is_whole(path)):
            log.say(f"{path} is damaged; drawing it again")
        return whole

    def add(self, seeds: np.ndarray, samples: Samples) -> None:
        """Keeps one batch, which is on disk after `settle`."""
        paths = map(self._path, seeds.tolist())
        self._writers.write(pictures.save_png, list(zip(paths, samples.images, strict=True)))

    def settle(self) -> None:
        """Waits until all that was added is on disk."""
        self._writers.wait()

    def pause(self) -> None:
        """Nothing to save: each file is on disk already."""

    def finish(self, seeds: np.ndarray) -> str:
        """Writes what is made of all seeds together, and says what is where."""
        shown = seeds[:GRID_IMAGES]
        images = np.stack([pictures.load_png(self._path(seed)) for seed in shown.tolist()])
        pictures.save_png(self._out / "grid.png", pictures.grid(images), scale=pictures.scale_for_people(images))
        return f"{len(seeds)} PNG files and grid.png (the first {len(shown)}) in {self._out}"


class File:
    """Samples in one npz (images, labels, seeds) or one grid PNG; after a signal the rest waits in a .partial.npz.

    Of several processes each has its `part`, a file of its own, and what all of them have left counts. With `names`
    "arr" images and labels are called `arr_0` and `arr_1` in the npz, as guided-diffusion's programs read them.
    """

    def __init__(self, out: pathlib.Path, made_with: dict, part: int | None = None, names: str = NPZ_NAMES[0]):
        self._out, self._names = out, names
        self._partial = out.with_name(f"{out.name}{'' if part is None else f'.{part}'}.partial.npz")
        self._text, self._done = json.dumps(made_with), {}
        for path in self._partials():
            try:
                stored = archives.read_npz(path)
                if str(stored["made_with"]) == self._text:
                    rows = zip(stored["seeds"], stored["images"], stored["labels"], strict=True)
                    self._done |= {int(seed): (image, int(label)) for seed, image, label in rows}
            except archives.DAMAGED as error:
                log.say(f"{path} is damaged ({error}); drawing its images again")

    def begin(self) -> None:
        """Nothing to remove: the file is replaced when the new one is whole."""

    def _partials(self) -> list[pathlib.Path]:
        """What was left by one process, or by several."""
        return sorted(self._out.parent.glob(f"{glob.escape(self._out.name)}*.partial.npz"))

    def missing(self, seeds: np.ndarray) -> np.ndarray:
        """Those of `seeds` that are still to be drawn."""
        return np.array([seed for seed in seeds if int(seed) not in self._done], seeds.dtype)

    def add(self, seeds: np.ndarray, samples: Samples) -> None:
        """Keeps one batch."""
        for seed, image, label in zip(seeds, samples.images, samples.labels, strict=True):
            self._done[int(seed)] = image, int(label)

    def settle(self) -> None:
        """Nothing to wait for: all is in memory until `pause` or `finish`."""

    def _save_npz(self, path: pathlib.Path, seeds: list[int], names: str = NPZ_NAMES[0]) -> None:
        images, labels = (np.stack(column) for column in zip(*(self._done[seed] for seed in seeds), strict=True))
        named = {"images": images, "labels": labels}
        if names == "arr":  # guided-diffusion writes labels of classes alone
            named = {"arr_0": images} | ({"arr_1": labels} if labels.min() >= 0 else {})
        archives.write_npz(path, **named, seeds=np.array(seeds), made_with=np.asarray(self._text))

    def pause(self) -> None:
        """Saves what was drawn so far."""
        if self._done:
            self._save_npz(self._partial, list(self._done))

    def finish(self, seeds: np.ndarray) -> str:
        """Writes what is made of all seeds together, and says what is where."""
        wanted = [int(seed) for seed in seeds]
        if self._out.suffix == ".npz":
            self._save_npz(self._out, wanted, self._names)
        else:
            images = np.stack([self._done[seed][0] for seed in wanted])
            pictures.save_png(self._out, pictures.grid(images), scale=pictures.scale_for_people(images))
        for path in self._partials():
            path.unlink(missing_ok=True)
        return f"{len(seeds)} images in {self._out}"
