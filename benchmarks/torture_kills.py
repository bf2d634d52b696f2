"""Trials: commands that are killed or signalled at any moment, and two of the same at once."""

import dataclasses
import pathlib
import random
import re
import signal
import time

from torture_processes import LONG, Process, Runner, TrialError, Verdict
from torture_products import differing, made, must_be, refused
from torture_scene import COMMANDS, STEPS, Scene, newest

AGAIN = 75  # the exit status of a command that was signalled and is worth running again
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every trial needs; `patience` is how long a command may live, in seconds, after it should have ended."""

    scene: Scene
    runner: Runner
    patience: float = 15.0


def _writes(folder: pathlib.Path) -> bool:
    """Whether something in the folder is half written, by its name."""
    try:
        return any(
            "orbax-checkpoint-tmp" in path.name
            or (path.name.startswith(".") and not path.name.endswith(".lock"))
            or "part" in path.suffix
            for path in folder.rglob("*")
        )
    except OSError:  # it has gone while we looked
        return True


def wait_for_a_moment(process: Process, folder: pathlib.Path, seconds: float, rng: random.Random) -> str:
    """Waits until any moment of the command's life, or one in which it writes; which, in words."""
    if rng.random() < 0.6:
        after = rng.uniform(0, 1.05 * seconds)
        process.done.wait(after)
        return f"after {after:.2f} s"
    times = rng.randint(1, 6)
    for _ in range(times):
        while not process.done.is_set() and not _writes(folder):
            time.sleep(0.002)
        while not process.done.is_set() and _writes(folder) and rng.random() < 0.95:
            time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.02))
    return f"while it wrote, the {times}. time"


def _steps(folder: pathlib.Path) -> int:
    """The step of the last whole checkpoint; 0 where there is none."""
    try:
        return int(newest(folder).name)
    except (OSError, ValueError):
        return 0


def _check_resumed(process: Process, saved: int) -> None:
    """Nothing that was saved is done again."""
    found = re.search(r"resuming from the checkpoint of step (\d+)", process.said("out") + process.said())
    if 0 < saved < STEPS and (found is None or int(found[1]) < saved):
        raise TrialError(
            "lost", f"step {saved} was saved, and it went on from {found[1] if found else 'the beginning'}"
        )


def _caught(bench: Bench, rng: random.Random, folder: pathlib.Path, name: str) -> tuple[Process, str]:
    """The command at some moment of its life, and which; one that was faster than the moment is started again."""
    seconds, command = bench.scene.expected(name)[1], COMMANDS[name]
    for part in (1.0, 0.7, 0.5, 0.3):
        new = rng.random() < 0.15
        process = bench.scene.start(folder, name, new)
        moment = wait_for_a_moment(process, folder, part * seconds[new], rng)
        if not process.done.is_set():
            return process, moment
        bench.scene.begin(folder, *command.needs)
    return process, "when it had ended"


def killed(bench: Bench, rng: random.Random, folder: pathlib.Path, name: str) -> Verdict:
    """SIGKILL, once to three times, and then the same command to its end."""
    bench.scene.begin(folder, *COMMANDS[name].needs)
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        process, moment = _caught(bench, rng, folder, name)
        said.append(moment)
        process.send(signal.SIGKILL)
        process.end(30, "SIGKILL")
    saved = _steps(folder) if name == "train" else 0
    return _again(bench, folder, name, f"killed {', '.join(said)}; the next one", saved)


def _again(bench: Bench, folder: pathlib.Path, name: str, what: str, saved: int = 0) -> Verdict:
    """The same command to its end, which must be that of an undisturbed one."""
    command = COMMANDS[name]
    process = bench.scene.start(folder, name)
    process.end(LONG)
    found, expected = made(folder, command.results), bench.scene.expected(name)[0]
    if name == "convert" and process.status == 2 and not differing(found, expected):
        return Verdict("survived", f"{what} found the workdir whole")  # and refuses to make it again
    must_be(process, found, expected, what)
    _check_resumed(process, saved)
    return Verdict("survived", what)


def signalled(bench: Bench, rng: random.Random, folder: pathlib.Path, name: str) -> Verdict:
    """SIGTERM, SIGINT or SIGHUP, once or twice; it ends with 75, or is done; and then the same command to its end."""
    bench.scene.begin(folder, *COMMANDS[name].needs)
    process, moment = _caught(bench, rng, folder, name)
    early = not process.listens()  # the first hundredths of a second of Python itself
    sent = [rng.choice(_SIGNALS) for _ in range(rng.choice((1, 1, 2)))]
    for number in sent:
        process.send(number)
        process.done.wait(rng.uniform(0.05, 1.0) if len(sent) > 1 else 0)
    names = " and ".join(number.name for number in sent)
    status = process.end(bench.patience, f"{names} {moment}")
    if status not in (0, AGAIN) and not early:
        said = (process.said().strip().splitlines() or ["nothing was said"])[-1]
        return Verdict("failed", f"{names} {moment}: status {status}: {said[:200]}")
    if not early and "Traceback (most recent call last)" in process.said():
        return Verdict("failed", f"{names} {moment}: a traceback, status {status}")
    saved = _steps(folder) if name == "train" else 0
    return _again(bench, folder, name, f"{names} {moment}, status {status}; the next one", saved)


def together(bench: Bench, rng: random.Random, folder: pathlib.Path, name: str) -> Verdict:
    """Two of the same: the second is refused and told who writes, or comes when the first is done."""
    seconds = bench.scene.expected(name)[1][0]
    for part in (1.0, 0.5, 0.2, 0.1, 0.0):  # until they meet
        verdict = _together(bench, folder, name, rng.uniform(0, part * seconds))
        if verdict.what != "survived":
            break
    return verdict


def _together(bench: Bench, folder: pathlib.Path, name: str, after: float) -> Verdict:
    command = COMMANDS[name]
    bench.scene.begin(folder, *command.needs)
    first = bench.scene.start(folder, name)
    first.done.wait(after)
    both = [first, bench.scene.start(folder, name)]
    for process in both:
        process.end(LONG)
    statuses = [process.status for process in both]
    what = f"two, {after:.2f} s apart, statuses {statuses}"
    if 0 not in statuses:
        raise TrialError("lost", f"{what}: {[process.errors() for process in both]}")
    verdicts = [refused(process, ("is being written by",), (2,)) for process in both]
    for verdict in verdicts:
        if verdict is not None and verdict.what != "refused":
            return Verdict(verdict.what, f"{what}: {verdict.why}")
    winner = both[statuses.index(0)]
    must_be(winner, made(folder, command.results), bench.scene.expected(name)[0], what)
    return Verdict("refused" if any(verdicts) else "survived", what)
