"""One writer at a time: who is refused, who takes over, and what is swept."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from warm_jax.runtime import locks

ROOT = pathlib.Path(__file__).parent.parent
HOLDER = """
import sys, time, pathlib
from warm_jax.runtime import locks
with locks.writing(locks.folder(pathlib.Path(sys.argv[1])), "sample"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes in `tmp_path / "out"`, until its stdin ends."""
    line = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    process = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def take(output, mode="train"):
    with locks.writing(output, mode):
        return json.loads(output.lock.read_text("utf-8"))


def left_by(output, **changes):
    """A lock as a writer of another machine left it, or with `changes` another one."""
    with locks.writing(output, "train"):
        content = json.loads(output.lock.read_text("utf-8"))
    content |= {"host": "far", "machine": "another boot/1", "process": 1, "token": "f" * 16} | changes
    output.lock.parent.mkdir(parents=True, exist_ok=True)
    output.lock.write_text(json.dumps(content), "utf-8")
    return output.lock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "DEAD", 0.6)
    monkeypatch.setattr(locks, "_SETTLE", 0.01)


def test_the_second_is_refused_and_names_the_first(tmp_path, holder):
    output = locks.folder(tmp_path / "out")
    content = output.lock.read_bytes()
    said = (
        rf"out is being written by --mode=sample on host .* \(process {holder.pid}\) since 2\d\d\d-.* UTC; wait until"
    )
    with pytest.raises(locks.HeldError, match=said):
        take(output)
    assert output.lock.read_bytes() == content  # the first is undisturbed
    holder.communicate("\n")
    assert holder.returncode == 0 and not (tmp_path / "out").exists()  # nothing is left of it
    assert take(output)["process"] == os.getpid()


def test_a_killed_writer_is_no_obstacle(tmp_path, holder):
    holder.kill()
    holder.wait()
    output, began = locks.folder(tmp_path / "out"), time.monotonic()
    assert output.lock.exists() and take(output)["mode"] == "train"
    assert time.monotonic() - began < locks.DEAD / 2 and not output.lock.exists()


def test_a_number_that_another_process_has_now_is_no_obstacle(tmp_path):
    """Process numbers are given again; the start time tells the two apart."""
    output = locks.file(tmp_path / "checkpoints")
    left_by(output, machine=locks._machine(), process=os.getpid(), started="1")
    assert take(output)["started"] != "1"
    left_by(output, machine=locks._machine(), process=os.getpid(), started=locks._started(os.getpid()))
    with pytest.raises(locks.HeldError):
        take(output)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[" * 100_000, b'{"process": "x"}'])
def test_a_dead_writer_elsewhere_and_a_lock_that_says_nothing(tmp_path, quick, content):
    """Taken over once it has not been touched for long enough; its time may lie in any past or future."""
    output = locks.file(tmp_path / "out.npz")
    lock = left_by(output)
    if content is not None:
        lock.write_bytes(content)
    os.utime(lock, (time.time() + 1e6,) * 2)
    began = time.monotonic()
    assert take(output)["process"] == os.getpid()
    assert time.monotonic() - began >= locks.DEAD


@pytest.mark.parametrize("skew", [-1e6, 0, 1e6])
def test_a_living_writer_elsewhere_whatever_its_clock(tmp_path, quick, skew):
    output, ended = locks.file(tmp_path / "out.npz"), threading.Event()
    lock, ticks = left_by(output), iter(range(10**6))

    def beat():
        while not ended.wait(0.05):
            os.utime(lock, (time.time() + skew + next(ticks),) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(locks.HeldError, match=r"--mode=train on host far \(process 1\)"):
            take(output)
    finally:
        ended.set()
        thread.join()


def test_a_writer_touches_its_lock_and_makes_it_again(tmp_path, quick):
    output = locks.file(tmp_path / "checkpoints")
    with locks.writing(output, "train"):
        os.utime(output.lock, (0, 0))
        until = time.monotonic() + 30
        while output.lock.stat().st_mtime < 1 and time.monotonic() < until:
            time.sleep(0.02)
        assert output.lock.stat().st_mtime > 1
        output.lock.unlink()
        while not output.lock.exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert json.loads(output.lock.read_text("utf-8"))["process"] == os.getpid()


def test_a_writer_whose_lock_was_taken_over_writes_no_more(tmp_path):
    """As after its host was suspended: another took it for dead."""
    code = HOLDER.replace("with locks", "locks.BEAT = 0.05\nwith locks")
    line = [sys.executable, "-c", code, str(tmp_path / "out")]
    process = subprocess.Popen(
        line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    lock = locks.folder(tmp_path / "out").lock
    lock.write_text(json.dumps({"host": "far", "mode": "sample", "process": 7, "since": "now", "token": "x"}), "utf-8")
    error = process.stderr.read()
    process.wait(30)
    assert process.returncode == 1 and error.startswith("error: the lock ") and "host far (process 7)" in error
    assert lock.exists()  # the other's


def test_many_at_once_one_wins(tmp_path):
    """Over the lock of a writer that is dead."""
    output = locks.folder(tmp_path / "out")
    left_by(output, machine=locks._machine(), process=2**22 + 1)
    code = HOLDER.replace('print("held", flush=True)', 'print("held", flush=True); time.sleep(30)')
    line = [sys.executable, "-c", code, str(tmp_path / "out")]
    started = [
        subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    try:
        until = time.monotonic() + 60
        while sum(process.poll() is not None for process in started) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        left = [process for process in started if process.poll() is None]
        assert len(left) == 1
        assert left[0].stdout.readline().endswith("which is dead, is taken over\n")
        assert left[0].stdout.readline() == "held\n"
        assert json.loads(output.lock.read_text("utf-8"))["process"] == left[0].pid
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_disjoint_outputs_do_not_meet(tmp_path):
    with (
        locks.writing(locks.file(tmp_path / "checkpoints"), "train"),
        locks.writing(locks.folder(tmp_path / "samples"), "sample"),
        locks.writing(locks.file(tmp_path / "evaluations"), "evaluate"),
    ):
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".checkpoints.lock",
            ".evaluations.lock",
            "samples",
        ]


def test_leftovers_of_killed_writers_go(tmp_path):
    (tmp_path / "evaluations").mkdir()
    own = [".config.json.0123abcd", "evaluations/.00000000-20.npz.0123abcd.part", "evaluations/.x.0a0b0c0d"]
    others = [".report.html.0123abcd", ".config.json", ".config.json.0123abcd.txt", "config.json", ".config.json.012"]
    for name in own + others:
        (tmp_path / name).touch()
    with locks.writing(locks.file(tmp_path / "checkpoints", ("config.json",), (tmp_path / "evaluations",)), "train"):
        pass
    assert not any((tmp_path / name).exists() for name in own) and all((tmp_path / name).exists() for name in others)


def test_where_no_lock_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as error:
        take(locks.folder(tmp_path / "file"))
    assert not isinstance(error.value, locks.HeldError)


EACH_MODE = """
import pathlib, sys
from absl import flags as absl_flags
from warm_jax.cli import modes
from warm_jax.runtime import locks

for line in sys.stdin.read().splitlines():
    absl_flags.FLAGS.unparse_flags()
    absl_flags.FLAGS(["x", "--out=", "--from_edm=", "--images=", *line.split()])
    mode, workdir = absl_flags.FLAGS.mode, pathlib.Path(absl_flags.FLAGS.workdir)
    try:
        modes.prepare(mode, None, workdir)
        print(mode, "runs")
    except locks.HeldError as error:
        print(mode, error)
    except Exception as error:
        print(mode, "has other troubles", type(error).__name__)
"""
OUTPUTS = {
    "train": "checkpoints",
    "sample": "samples",
    "sample --out={0}/a.npz": "a.npz",
    "restore": "restored",
    "evaluate": "evaluations",
    "analyze": "figures",
    "compare": "compare.jsonl",
    "export --out={0}/e": "e",
    "inspect --images=bundled": "inspect",
    "stats --out={0}/s.npz": "s.npz",
    "prepare --images=bundled --out={0}/p.zip": "p.zip",
    "convert --from_edm={0}/x.pkl": "checkpoints",
}


def test_every_mode_is_refused_where_another_writes(tmp_path):
    """And before it looks at anything: there is no config, no checkpoint and no image."""
    lines = "\n".join(f"--mode={mode} --workdir={tmp_path}".replace("{0}", str(tmp_path)) for mode in OUTPUTS)
    folders = ("samples", "restored", "e", "inspect")

    def ask():
        done = subprocess.run(
            [sys.executable, "-c", EACH_MODE], cwd=ROOT, input=lines, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with contextlib.ExitStack() as held:
        for name in set(OUTPUTS.values()):
            output = locks.folder(tmp_path / name) if name in folders else locks.file(tmp_path / name)
            held.enter_context(locks.writing(output, "compare"))
        answers = ask()
    me = f"is being written by --mode=compare on host {os.uname().nodename} (process {os.getpid()}) since "
    for (mode, name), answer in zip(OUTPUTS.items(), answers, strict=True):
        assert answer.startswith(f"{mode.split()[0]} {tmp_path / name} {me}"), answer
    assert not any("is being written" in answer for answer in ask())  # each has other troubles now
    assert not list(tmp_path.rglob("*.lock")) and not (tmp_path / "e").exists()
