"""Torture: kills, signals, flipped bits, full disks, rivals and strangers at random moments, and what is lost by them.

    python benchmarks/torture.py --minutes=60                    all kinds, in proportion; again: goes on
    python benchmarks/torture.py --minutes=5 --only=kill         kinds whose names contain kill; --list shows all
    python benchmarks/torture.py --only='flip: checkpoint' --number=17     one trial again, to look at

Each trial begins from a copy of a folder with a small data set, and with a trained run and what was made of it where
that is needed, does one thing to it or to a command that runs there, runs the same command again, and looks at all that
it has made: arrays of checkpoints, images, scores, archives. It is read without warm_jax and compared with what two
undisturbed runs have in common. What comes of a trial is one of

    survived  the same bytes as of an undisturbed run, or damage that was passed over and named
    refused   one line that begins with error:, names the file, the stranger or the rival; status 1 or 2; no traceback
    lost      other bytes, or work before the last checkpoint done again, or the next run fails
    silent    damaged data were accepted, or hostile code was run
    hung      alive --patience seconds after it should have ended
    failed    a wrong status, a traceback, an error that names nothing

The network is a stand-in that compiles in a second; all else is the program. Most commands are forked from a process
that has imported everything, which saves their first seconds; some are started by a new Python. Trials are numbered,
and their choices are drawn from --seed, kind and number; when a kill strikes depends on the machine, too. All results
are in --workdir/trials.jsonl, which is read when the same command is given again; the folders of trials that were lost,
silent, hung or failed stay in --workdir/failures with FOLDER.logs beside them (commands.txt has the commands). The exit
status is 0 where there is none, 1 where there are some, 2 for wrong usage.
"""

import argparse
import collections
import concurrent.futures
import functools
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torture_damage
import torture_hostile
import torture_kills
import torture_pods
from torture_kills import Bench
from torture_processes import BAD, FINE, Runner, TrialError, Verdict
from torture_scene import MODES, Scene
from tqdm import tqdm

Trial = Callable[[Bench, random.Random, pathlib.Path], Verdict]
_SAVING = ("train", "sample", "evaluate", "compare", "restore", "analyze")
_PAIRS = ("train", "sample", "evaluate", "prepare", "export")
_FLIPS, _CUTS = 500, 40


def _kinds() -> dict[str, tuple[int, Trial]]:
    """Every kind of trial by name, how often it is tried in an hour's run, and what it does."""
    found: dict[str, tuple[int, Trial]] = {}

    def add(name: str, times: int, trial: Callable[..., Verdict], *arguments: object) -> None:
        found[name] = times, functools.partial(_with, trial, arguments)

    for mode in MODES:
        add(f"kill: {mode}", 100 if mode == "train" else 10, torture_kills.killed, mode)
    for mode in MODES:
        add(f"signal: {mode}", 10 if mode == "train" else 4 if mode in _SAVING else 2, torture_kills.signalled, mode)
    for mode in _PAIRS:
        add(f"two at once: {mode}", 5, torture_kills.together, mode)
    weights = {"checkpoint": 12, "snapshots": 3, "prepared zip": 3, "export": 3, "converted workdir": 3}
    total = sum(weights.get(target, 1) for target in torture_damage.TARGETS)
    for what, count, cut in (("flip", _FLIPS, False), ("cut off", _CUTS, True)):
        for target in torture_damage.TARGETS:
            times = -(-count * weights.get(target, 1) // total)
            add(f"{what}: {target}", times, torture_damage.damaged, target, cut)
    for mode in ("train", "sample", "evaluate", "prepare", "export"):
        add(f"full disk: {mode}", 2, torture_damage.full_disk, mode)
    for name in torture_hostile.TRAPS:
        add(f"hostile: {name}", 1, torture_hostile.hostile, name)
    for what in ("kill", "stop", "signal"):
        add(f"pod: {what}", 3, torture_pods.host, what)
    for name in torture_pods.ATTACKS:
        add(f"stranger: {name}", 1, torture_pods.attacked, name)
    return found


def _with(
    trial: Callable[..., Verdict], arguments: tuple, bench: Bench, rng: random.Random, folder: pathlib.Path
) -> Verdict:
    return trial(bench, rng, folder, *arguments)


def attempt(trial: Trial, bench: Bench, rng: random.Random, folder: pathlib.Path) -> Verdict:
    """What comes of a trial; what it raises is a verdict too."""
    try:
        return trial(bench, rng, folder)
    except TrialError as error:
        return error.verdict
    except Exception as error:  # of the benchmark, or something that nobody thought of: it is looked at
        return Verdict("failed", f"{type(error).__name__}: {error}; {traceback.format_exc().splitlines()[-3].strip()}")


class Record:
    """All trials so far, in a file of JSON lines."""

    def __init__(self, path: pathlib.Path):
        self._path, self._lock = path, threading.Lock()
        self.rows: list[dict] = []
        for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                print(f"{path}: a torn line is left out", file=sys.stderr)

    def add(self, row: dict) -> None:
        """Appends, on a line of its own even after a torn one."""
        with self._lock:
            self.rows.append(row)
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" * bool(torn) + json.dumps(row, ensure_ascii=False) + "\n")

    def next(self, kinds: dict[str, tuple[int, Trial]], running: set[tuple[str, int]]) -> tuple[str, int]:
        """The kind that has had least of what it should have, and the number of its next trial."""
        had = {(row["kind"], row["number"]) for row in self.rows} | running
        done = collections.Counter(kind for kind, _ in had)
        kind = min(kinds, key=lambda kind: done[kind] / kinds[kind][0])
        return kind, next(number for number in itertools.count() if (kind, number) not in had)


def table(rows: list[dict], by: Callable[[str], str] = str) -> str:
    """Markdown: a row for each kind, and one for all."""
    counts: dict[str, collections.Counter] = {}
    for row in rows:
        counts.setdefault(by(row["kind"]), collections.Counter())[row["verdict"]] += 1
    columns = [*FINE, *BAD]
    lines = ["| kind | tried | " + " | ".join(columns) + " |", "|---|" + "---:|" * (1 + len(columns))]
    counts["**all**"] = sum(counts.values(), collections.Counter())
    for kind, found in counts.items():
        tried = sum(found.values()) - found["skipped"]
        told = " (skipped)" if found["skipped"] and not tried else ""
        lines.append(f"| {kind}{told} | {tried} | " + " | ".join(f"{found[column]}" for column in columns) + " |")
    return "\n".join(lines)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="how long to go on (default 60); the last trials end")
    parser.add_argument("--only", default="", help="kinds whose names contain this, or one of A,B,…")
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("runs/torture"), help="default runs/torture"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at a time (default: the cores)")
    parser.add_argument("--patience", type=float, default=15, help="seconds (default 15); more on a busy machine")
    parser.add_argument("--number", type=int, help="only this trial, of the one kind that --only names")
    parser.add_argument("--once", action="store_true", help="end when each kind has had its number of trials")
    parser.add_argument("--list", action="store_true", help="print the kinds and their numbers in an hour's run")
    flags = parser.parse_args()
    kinds = _kinds()
    wanted = [part for part in flags.only.split(",") if part]
    flags.kinds = {name: kind for name, kind in kinds.items() if not wanted or any(part in name for part in wanted)}
    if flags.number is not None and flags.only in kinds:
        flags.kinds = {flags.only: kinds[flags.only]}
    if not flags.kinds:
        parser.error(f"--only={flags.only}: no such kind; there are {', '.join(kinds)}")
    if flags.minutes <= 0 or flags.jobs < 1 or flags.patience <= 0:
        parser.error("--minutes, --jobs and --patience must be positive")
    if flags.number is not None and len(flags.kinds) > 1:
        parser.error(f"--number needs one kind, and --only={flags.only} names {', '.join(flags.kinds)}")
    return flags


def _one(flags: argparse.Namespace, bench: Bench, record: Record, kind: str, number: int) -> dict:
    """Tries, records, and clears away or keeps the folder."""
    rng = random.Random(f"{flags.seed} {kind} {number}")
    name = f"{''.join(c if c.isalnum() else '-' for c in kind)}-{number}"
    folder, began = flags.workdir / "trials" / name, time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    verdict = attempt(flags.kinds[kind][1], bench, rng, folder)
    row = {"kind": kind, "number": number, "verdict": verdict.what, "why": verdict.why}
    row |= {"seconds": round(time.monotonic() - began, 1), "load": round(os.getloadavg()[0], 1)}
    logs = folder.with_name(folder.name + ".logs")
    if verdict.what in BAD:
        kept = flags.workdir / "failures"
        kept.mkdir(exist_ok=True)
        for path in (folder, logs):
            shutil.rmtree(kept / path.name, ignore_errors=True)
            if path.exists():
                path.rename(kept / path.name)
        command = f"python {' '.join(map(str, (sys.argv[0], f'--workdir={flags.workdir}', f'--seed={flags.seed}')))}"
        command += f" --only='{kind}' --number={number}"
        row["again"] = command
        tqdm.write(
            f"{verdict.what}: {kind} {number}: {verdict.why}\n    {command}\n    {kept / folder.name}", sys.stderr
        )
    else:
        for path in (folder, logs):
            shutil.rmtree(path, ignore_errors=True)
    if flags.number is None:  # else it has been counted
        record.add(row)
    return row


def run(flags: argparse.Namespace) -> list[dict]:
    """All trials that the time allows; the rows of this call."""
    flags.workdir = flags.workdir.resolve()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    record, running, rows = Record(flags.workdir / "trials.jsonl"), set(), []
    runner = Runner(flags.workdir / "xla")
    bench = Bench(Scene(flags.workdir, runner), runner, flags.patience)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if not torture_damage.may_mount(flags.workdir / "mount"):
        print("full disks are skipped: a tmpfs cannot be mounted here", file=sys.stderr)
    until = time.monotonic() + 60 * flags.minutes
    bar = tqdm(total=round(60 * flags.minutes), unit="s", mininterval=1 if sys.stderr.isatty() else 60)
    pool, pending = concurrent.futures.ThreadPoolExecutor(flags.jobs), {}
    try:
        while pending or not stop.is_set():
            over = stop.is_set() or time.monotonic() > until
            while not over and len(pending) < flags.jobs:
                kind, number = record.next(flags.kinds, running)
                if flags.number is not None:
                    number, over = flags.number, True
                elif flags.once and number >= flags.kinds[kind][0]:
                    over = True
                    break
                running.add((kind, number))
                pending[pool.submit(_one, flags, bench, record, kind, number)] = kind, number
            if flags.number is not None or over:
                stop.set()
            done, _ = concurrent.futures.wait(pending, 1.0, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                rows.append(future.result())
                running.discard(pending.pop(future))
            bar.set_postfix_str(f"{len(rows)} trials, {sum(row['verdict'] in BAD for row in rows)} bad", refresh=False)
            bar.update(bar.total - max(0, round(until - time.monotonic())) - bar.n)
    finally:
        bar.close()
        runner.close()
        pool.shutdown(wait=False, cancel_futures=True)
    flags.all = record.rows
    return rows


def main() -> int:
    flags = _flags()
    if flags.list:
        print("\n".join(f"{times:5} {name}" for name, (times, _) in flags.kinds.items()))
        return 0
    rows = run(flags)
    text = table(flags.all)
    (flags.workdir / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    bad = [row for row in rows if row["verdict"] in BAD]
    print(f"\n{len(rows)} trials now, {len(bad)} of them bad; {flags.workdir}/table.md and trials.jsonl have all")
    for row in rows if flags.number is not None else ():
        print(f"{row['verdict']}: {row['why']}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
