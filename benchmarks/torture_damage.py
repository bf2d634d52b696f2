"""Trials: bits flipped in any file, files cut off, and disks that are full."""

import os
import pathlib
import random
import shutil
import subprocess

from torture_kills import Bench
from torture_processes import LONG, TrialError, Verdict
from torture_products import Products, differing, judge, made, refused
from torture_scene import COMMANDS, newest

_DONE = ("prepare", "train")
# What is damaged -> what was run before, which files (glob), the commands of which one reads them.
TARGETS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "checkpoint": (_DONE, "run/checkpoints/*/**/*", ("train on", "sample", "evaluate", "export")),
    "snapshots": (_DONE, "run/posthoc/**/*", ("sample ema",)),
    "config.json": (_DONE, "run/config.json", ("train on", "sample")),
    "data.json": (_DONE, "run/data.json", ("train on",)),
    "measured.npz": (_DONE, "run/measured.npz", ("train on", "sample")),
    "metrics.jsonl": (_DONE, "run/metrics.jsonl", ("train on",)),
    "results.jsonl": ((*_DONE, "evaluate"), "run/results.jsonl", ("evaluate",)),
    "samples": ((*_DONE, "sample"), "run/samples/*", ("sample",)),
    "kept shards": ((*_DONE, "evaluate"), "run/evaluations/**/*", ("evaluate",)),
    "statistics": ((*_DONE, "stats"), "stats.npz", ("evaluate against",)),
    "export": ((*_DONE, "export"), "export/[mw]*.[js]*", ("convert",)),
    "exported program": ((*_DONE, "export"), "export/[ws]*.s[at]*", ("draw by the export",)),
    "converted workdir": ((*_DONE, "export", "convert"), "imported/**/*", ("sample imported",)),
    "prepared zip": (_DONE, "set.zip", ("stats", "train on")),
}
# Rows of numbers for people: the program reads steps and names of them, and keeps what it does not understand.
_ROWS = ("metrics.jsonl", "results.jsonl")


def _damage(path: pathlib.Path, rng: random.Random, cut: bool) -> str:
    """Flips one bit, or some, or cuts the file off; what was done, in words."""
    content = bytearray(path.read_bytes())
    if cut:
        length = rng.choice((0, rng.randrange(len(content)), len(content) - 1))
        path.write_bytes(content[:length])
        return f"cut off after {length} of {len(content)} bytes"
    places = [rng.randrange(8 * len(content)) for _ in range(rng.choice((1, 1, 1, 9)))]
    for place in places:
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return f"bits {places} flipped"


def _names(folder: pathlib.Path, path: pathlib.Path) -> tuple[str, ...]:
    """Any of these names a damaged file: its own name, or that of a folder that it is a part of."""
    within = path.relative_to(folder)
    if within.name in ("config.json", "data.json"):  # another key or value of theirs does not fit the run
        return within.name, "the checkpoints in run", "since run was begun"
    return (
        within.name,
        *(str(parent) for parent in within.parents if len(parent.parts) > 1 or str(parent) == "export"),
    )


def _part_of(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """What of `folder` holds `path`."""
    return folder / path.relative_to(folder).parts[0]


def _known_rows(found: Products, expected: Products, path: pathlib.Path) -> Products:
    """Of a damaged file of rows: those that were damaged are not made whole, and the new ones are there.

    And what was drawn notes the digest of the file measured.npz, of which a bit may mean nothing.
    """
    if path.name == "measured.npz":
        return found | {key: value for key, value in expected.items() if key.endswith("/samples.json/measured")}
    if path.name not in _ROWS:
        return found
    prefix = f"run/{path.name}"
    return found | {key: value for key, value in expected.items() if key == prefix or key.startswith(f"{prefix}/")}


def damaged(bench: Bench, rng: random.Random, folder: pathlib.Path, target: str, cut: bool) -> Verdict:
    """A file with flipped bits, or cut off, and a command that reads it."""
    before, pattern, readers = TARGETS[target]
    reader = rng.choice(readers)
    expected, _ = bench.scene.expected(reader, before)
    bench.scene.begin(folder, *before)
    last = newest(folder)
    files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.stat().st_size)
    if target == "checkpoint":  # the newest, mostly: it is what is read first
        files = [path for path in files if last in path.parents] if rng.random() < 0.9 else files
    # A file by its size, or any: most bytes are in few files.
    path = rng.choices(files, [path.stat().st_size for path in files])[0] if rng.random() < 0.5 else rng.choice(files)
    second_best = None
    if (last in path.parents and reader != "train on") or target == "snapshots":
        passed_over = last if last in path.parents else _part_of(path, folder / "run" / "posthoc")
        second_best, _ = bench.scene.expected(reader, before, str(passed_over.relative_to(folder)))
    what = f"{path.relative_to(folder)}: {_damage(path, rng, cut)}; {reader}"
    process = bench.scene.start(folder, reader)
    process.end(LONG, what)
    names = _names(folder, path)
    found = _known_rows(made(folder, COMMANDS[reader].results), expected, path)
    verdict = judge(process, found, expected, names, second_best)
    return Verdict(verdict.what, f"{what}: {verdict.why}" if verdict.why else what)


def may_mount(folder: pathlib.Path) -> bool:
    """Whether a file system in memory can be mounted here."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None or not _mount(folder, 1):
        return False
    return subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0


def _mount(folder: pathlib.Path, mebibytes: int) -> bool:
    line = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    return subprocess.run(line, capture_output=True).returncode == 0


def full_disk(bench: Bench, rng: random.Random, folder: pathlib.Path, name: str) -> Verdict:
    """The folder is a disk with little room; then the room is there, and the same command is run to its end."""
    command = COMMANDS[name]
    expected, _ = bench.scene.expected(name)
    scene = bench.scene.begin(folder.with_name(folder.name + ".scene"), *command.needs)
    folder.mkdir(parents=True, exist_ok=True)
    if not _mount(folder, 16):
        return Verdict("skipped", "a tmpfs cannot be mounted here")
    try:
        shutil.copytree(scene, folder, dirs_exist_ok=True, symlinks=True)
        disk = os.statvfs(folder)
        left = rng.choice((0, 4096 * rng.randint(0, 32), 4096 * rng.randint(0, 400)))
        ballast = folder / "ballast"
        with ballast.open("wb") as file:
            file.truncate(0)
            os.posix_fallocate(file.fileno(), 0, max(4096, disk.f_bavail * disk.f_frsize - left))
        process = bench.scene.start(folder, name)
        process.end(LONG, f"{left} bytes free")
        what = f"{left} bytes free: status {process.status}"
        verdict = refused(process, ())
        if verdict is not None and verdict.what != "refused":
            return Verdict(verdict.what, f"{what}: {verdict.why}")
        complete = verdict is None and not differing(made(folder, command.results), expected)
        warned = "warning" in (process.said() + process.said("out")).lower()
        if verdict is None and not complete and not warned:
            return Verdict("silent", f"{what}: {differing(made(folder, command.results), expected)}")
        ballast.unlink()
        process = bench.scene.start(folder, name)
        process.end(LONG)
        wrong = differing(made(folder, command.results), expected)
        if process.status != 0 or (wrong and not _only_snapshots(wrong, warned)):
            raise TrialError("lost", f"{what}; with room: status {process.status}, {wrong} {process.errors()}")
        return Verdict("refused" if verdict else "survived", what + (f": {verdict.why}" if verdict else ""))
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)
        shutil.rmtree(scene, ignore_errors=True)


def _only_snapshots(wrong: str, warned: bool) -> bool:
    """A snapshot of the averages that found no room is not made again, and a warning says so."""
    return warned and "differ" not in wrong and "run/posthoc" in wrong
