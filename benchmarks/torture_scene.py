"""The commands, and the folders that trials begin from: a data set, a trained run, and what each mode makes of them."""

import dataclasses
import gzip
import hashlib
import json
import pathlib
import shutil
import threading

import numpy as np
from PIL import Image
from torture_processes import LONG, ROOT, Process, Runner
from torture_products import Products, common, made

STEPS, EVERY, MORE = 40, 8, 48  # of training, between its checkpoints, and of the training that goes on
_TINY = (
    *("data.source=zip:set.zip", "data.num_classes=0", f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}"),
    *("train.sample_every=0", "train.log_every=4", "train.decay=none", "train.posthoc_ema=(0.1,)"),
    *("train.posthoc_every=8", "sample.batch_size=8", "sample.steps=3", "eval.count=48", "eval.batch_size=16"),
    *("compare.systems=('hot','warm')", "compare.repeated=()", "analysis.images=40"),
)


def _flags(system: str = "amortised", **changes: object) -> list[str]:
    settings = [*_TINY, *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]
    return [f"--config={ROOT / 'configs' / 'smoke.py'}:{system}", *(f"--config.{setting}" for setting in settings)]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of the program.

    Attributes:
      arguments: Its flags; paths are within the folder that it runs in.
      results: Files and folders that it makes or changes.
      needs: The commands that must have been run in the folder before.
      script: Whether it is a program of its own, the first argument.
    """

    arguments: list[str]
    results: tuple[str, ...]
    needs: tuple[str, ...] = ("prepare", "train")
    script: bool = False


_RUN = ("run/checkpoints", "run/posthoc", "run/config.json", "run/data.json", "run/measured.npz", "run/metrics.jsonl")
_PLAIN = [*_flags(), "--workdir=run"]
COMMANDS = {
    "prepare": Command(["--mode=prepare", "--images=folder:photos", "--out=set.zip"], ("set.zip",), ()),
    "train": Command(_PLAIN, _RUN, ("prepare",)),
    "train on": Command([*_flags(train__steps=MORE), "--workdir=run"], _RUN),
    "stats": Command(
        [*_flags(), "--mode=stats", "--images=zip:set.zip", "--out=stats.npz"], ("stats.npz",), ("prepare",)
    ),
    "sample": Command([*_PLAIN, "--mode=sample", "--seeds=0-39"], ("run/samples",)),
    "sample ema": Command([*_PLAIN, "--mode=sample", "--seeds=0-7", "--ema=0.11", "--out=of_ema"], ("of_ema",)),
    "evaluate": Command([*_PLAIN, "--mode=evaluate"], ("run/results.jsonl",)),
    "evaluate against": Command(
        [*_PLAIN, "--mode=evaluate", "--config.eval.reference=stats.npz"],
        ("run/results.jsonl",),
        ("prepare", "train", "stats"),
    ),
    "export": Command([*_PLAIN, "--mode=export", "--out=export", "--platforms=cpu"], ("export",)),
    "draw by the export": Command(
        ["export/sample.py", "4", "--out=drawn.npz"], ("drawn.npz",), ("prepare", "train", "export"), script=True
    ),
    "convert": Command(
        ["--mode=convert", "--from_export=export", "--workdir=imported"],
        ("imported/checkpoints", "imported/config.json"),
        ("prepare", "train", "export"),
    ),
    "sample imported": Command(
        [*_flags(), "--workdir=imported", "--mode=sample", "--seeds=0-7"],
        ("imported/samples",),
        ("prepare", "train", "export", "convert"),
    ),
    "restore": Command(
        [*_PLAIN, "--mode=restore", "--images=photos", "--blur=1", "--noise=0.1", "--out=restored"],
        ("restored",),
    ),
    "analyze": Command([*_PLAIN, "--mode=analyze", "--analysis=spectra"], ("run/figures",)),
    "inspect": Command(["--mode=inspect", "--images=zip:set.zip", "--out=look"], ("look",), ("prepare",)),
    "compare": Command(
        [*_flags("warm", train__steps=8, train__posthoc_ema=()), "--mode=compare", "--workdir=both"],
        ("both",),
        ("prepare",),
    ),
    "preflight": Command(
        [*_PLAIN, "--mode=preflight", "--topology=cpu:2"], ("run/preflight-cpu-2.json",), ("prepare",)
    ),
    "doctor": Command(["--mode=doctor", "--out=doctor.json"], ("doctor.json",), ()),
}
MODES = tuple(name for name in COMMANDS if " " not in name)


def _photographs(folder: pathlib.Path, count: int = 40) -> None:
    """The first bundled images as PNG files, read from their IDX file."""
    path = ROOT / "warm_jax" / "data" / "bundled" / "t10k-images-idx3-ubyte.gz"
    with gzip.open(path, "rb") as file:
        pixels = np.frombuffer(file.read(16 + count * 784)[16:], np.uint8).reshape(count, 28, 28)
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03}.png")


def _version() -> str:
    """A digest of the program's source: another version may make other bytes, as lines in what it exports."""
    code = hashlib.sha256()
    for path in sorted((ROOT / "warm_jax").rglob("*.py")):
        code.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    return code.hexdigest()[:8]


class Scene:
    """Folders in which some of the commands were run, made when they are first asked for and kept for the next time.

    Args:
      workdir: Of the benchmark; the folders are in `workdir`/scenes, apart for each version of the program.
      runner: What runs the commands.
    """

    def __init__(self, workdir: pathlib.Path, runner: Runner):
        self.folder, self.runner, self._lock = workdir / "scenes" / _version(), runner, threading.RLock()
        self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, folder: pathlib.Path, *before: str) -> pathlib.Path:
        """Makes `folder` as it is after the commands `before`."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.with_name(folder.name + ".logs"), ignore_errors=True)
        return pathlib.Path(shutil.copytree(self._after(before), folder, symlinks=True))

    def _after(self, before: tuple[str, ...]) -> pathlib.Path:
        with self._lock:
            folder = self.folder / ("_".join(before).replace(" ", "-") or "photographs")
            if folder.exists():
                return folder
            part = folder.with_name("part")
            if not before:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                _photographs(part / "photos")
            else:
                self.begin(part, *before[:-1])
                self._run(part, before[-1])
            part.rename(folder)
            return folder

    def start(self, folder: pathlib.Path, name: str, new: bool = False) -> Process:
        """A command in `folder`; with `new` in a new Python."""
        command = COMMANDS[name]
        return self.runner.start(folder, command.arguments, new=new, script=command.script)

    def _run(self, folder: pathlib.Path, name: str, new: bool = False) -> Process:
        process = self.start(folder, name, new)
        if process.end(LONG) != 0:
            raise RuntimeError(
                f"{' '.join(process.arguments)} in {folder}: status {process.status}\n{process.said()[-3000:]}"
            )
        return process

    def expected(self, name: str, before: tuple[str, ...] = (), away: str = "") -> tuple[Products, list[float]]:
        """What two undisturbed runs of a command both make, and their seconds: without Python's start, and with it.

        `before` are the commands run before, by default what it needs; `away` is a folder that is missing.
        """
        command = COMMANDS[name]
        before = before or command.needs
        with self._lock:
            note = (
                self.folder
                / f"{'_'.join((*before, name)).replace(' ', '-')}{away and '-without-' + away.replace('/', '-')}.json"
            )
            if note.exists():
                kept = json.loads(note.read_text("utf-8"))
                return kept["products"], kept["seconds"]
            found, seconds = [], []
            for new in (False, True):
                folder = self.begin(self.folder / "expected", *before)
                if away:
                    (folder / away).rename(folder / "away")
                process = self._run(folder, name, new)
                found.append(made(folder, command.results))
                seconds.append(process.ended - process.began)
            products = common(*found)
            if not products:
                raise RuntimeError(f"{name}: two undisturbed runs have nothing in common")
            kept = {"products": products, "seconds": seconds}
            kept["left out"] = sorted(found[0].keys() - products.keys())
            note.write_text(json.dumps(kept, indent=1), "utf-8")
            return products, kept["seconds"]


def newest(folder: pathlib.Path, run: str = "run") -> pathlib.Path:
    """The checkpoint of the last step."""
    return max(
        (path for path in (folder / run / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name)
    )
