"""The judge and the table of benchmarks/torture.py, and, slowly, a short form of it."""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import torture  # noqa: E402
import torture_damage  # noqa: E402
import torture_kills  # noqa: E402
import torture_processes  # noqa: E402
import torture_products  # noqa: E402
from torture_processes import TrialError, Verdict  # noqa: E402


def ended(folder, status, err="", out=""):
    """A command that has ended with a status and has said something."""
    process = torture_processes.Process(0, ["--mode=sample"], folder / "log", 0.0, status)
    process.log.with_suffix(".err").write_text(err, "utf-8")
    process.log.with_suffix(".out").write_text(out, "utf-8")
    process.done.set()
    return process


def checkpoint(folder, values):
    """One array as Orbax lays it out: zarr in an OCDBT, written by TensorStore alone."""
    import tensorstore as ts

    folder.mkdir(parents=True)
    (folder / "_CHECKPOINT_METADATA").write_text("{}")
    place = {"driver": "ocdbt", "base": f"file://{folder / 'ema'}/"}
    spec = {"driver": "zarr", "kvstore": place | {"path": "gain/"}}
    ts.open(spec, create=True, dtype=ts.float32, shape=[len(values)]).result().write(np.float32(values)).result()


def test_the_stand_in_is_a_network_of_the_program():
    """In a process of its own, since it puts itself into the program."""
    lines = (
        "import jax, torture_program",
        "from configs import smoke",
        "from warm_jax.experiments import experiment",
        "from warm_jax.runtime import mesh",
        "exp = experiment.on(experiment.build(smoke.get_config()), mesh.make_mesh())",
        "jax.eval_shape(exp.model.init, jax.random.key(0))",
        "assert isinstance(exp.model.network, torture_program.Linear)",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    places = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}}
    subprocess.run(command, check=True, **places)


def test_a_planted_silent_change_is_silent(tmp_path):
    """One bit of one weight: what was drawn is whole, and other."""
    weights = np.arange(64, dtype=np.float32)
    checkpoint(tmp_path / "a" / "checkpoints" / "8", weights)
    planted = weights.copy()
    planted.view(np.uint32)[17] ^= 1
    checkpoint(tmp_path / "b" / "checkpoints" / "8", planted)
    expected, found = (torture_products.made(tmp_path / name, ("checkpoints",)) for name in "ab")
    names = ("run/checkpoints",)
    assert torture_products.judge(ended(tmp_path, 0), expected, expected, names) == Verdict("survived")
    verdict = torture_products.judge(ended(tmp_path, 0), found, expected, names)
    assert verdict == Verdict("silent", "1 differ, as checkpoints/8/ema/gain/0")
    warned = ended(tmp_path, 0, "checkpoint 8 in run/checkpoints cannot be read; trying the one before\n")
    assert torture_products.judge(warned, found, expected, names, second_best=found).what == "survived"
    assert torture_products.judge(warned, found, expected, names).what == "silent"
    assert torture_products.judge(ended(tmp_path, 0), found, expected, names, second_best=found).what == "silent"


@pytest.mark.parametrize(
    ("status", "said", "what"),
    [
        (2, "error: run/data.json is damaged\n", "refused"),
        (1, "note: x\nerror: run/data.json is damaged\n", "refused"),
        (1, "error: [Errno 28]\n", "failed"),
        (1, "error: data.json\nerror: data.json\n", "failed"),
        (1, "Traceback (most recent call last)\nerror: data.json\n", "failed"),
        (1, "ValueError: data.json\n", "failed"),
        (-11, "", "failed"),
        (75, "error: data.json\n", "failed"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_file(tmp_path, status, said, what):
    verdict = torture_products.judge(ended(tmp_path, status, said), {}, {"a": "1"}, ("data.json",))
    assert verdict.what == what


def test_what_two_runs_have_in_common_must_be_there(tmp_path):
    rows = [{"step": 4, "loss/blurred": 1.0}, {"step": 8, "loss/blurred": 0.5}, {"score": 1.0}]
    made = []
    for name, seconds in (("a", 1.5), ("b", 2.5)):
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps(row | {"seconds": seconds}) for row in rows]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        np.savez(folder / "m.npz", power=np.arange(3.0))
        (folder / ".metrics.jsonl.lock").write_text(name)
        made.append(torture_products.made(tmp_path / name, ("metrics.jsonl", "m.npz", "missing")))
    expected = torture_products.common(*made)
    assert {key for key in expected if key.startswith("metrics")} == {
        "metrics.jsonl/step 4 losses/there",
        "metrics.jsonl/step 8 losses/there",
        "metrics.jsonl/2/score",
    }
    assert expected["metrics.jsonl/2/score"] == "1.0" and "m.npz/power" in expected
    assert not torture_products.differing(made[1], expected)
    (tmp_path / "b" / "metrics.jsonl").write_text("\n".join([*lines, lines[1]]))
    found = torture_products.made(tmp_path / "b", ("metrics.jsonl",))
    assert torture_products.differing(found, expected).startswith(
        "1 missing, as m.npz/power; 1 more, as metrics.jsonl/step"
    )


def test_a_process_that_does_not_end_is_hung(tmp_path):
    sleeper = subprocess.Popen(["sleep", "60"])
    process = torture_processes.Process(sleeper.pid, [], tmp_path / "log", time.monotonic())
    thread = torture_processes.threading.Thread(target=torture_processes._await, args=(process, sleeper.wait))
    thread.start()
    with pytest.raises(TrialError, match=r"still alive 0 s after SIGTERM \(1 threads") as error:
        process.end(0.1, "SIGTERM")
    thread.join(30)
    assert error.value.verdict.what == "hung" and sleeper.returncode == -signal.SIGKILL


@pytest.mark.parametrize("cut", [False, True])
def test_damage_changes_the_file(tmp_path, cut):
    path, rng = tmp_path / "x", random.Random(0)
    for _ in range(50):
        path.write_bytes(b"0123456789")
        said = torture_damage._damage(path, rng, cut)
        content = path.read_bytes()
        assert content != b"0123456789" and len(content) <= 10
        assert b"0123456789".startswith(content) if cut else len(content) == 10, said


def test_what_is_asked_of_an_hour():
    counts = collections.Counter()
    for kind, (times, _) in torture._kinds().items():
        counts[kind.partition(":")[0]] += times
    kinds = torture._kinds()
    assert kinds["kill: train"][0] == 100 and counts["flip"] >= 500 and counts["stranger"] >= 11
    assert all(kinds[f"kill: {mode}"][0] >= 10 for mode in torture_kills.COMMANDS if " " not in mode)
    assert sum(kind.startswith("two at once") for kind in kinds) == 5


def test_a_record_goes_on_after_a_torn_line(tmp_path, capsys):
    """And the kind that is furthest behind is next, with its first number that is neither done nor running."""
    path = tmp_path / "trials.jsonl"
    row = {"kind": "a", "number": 0, "verdict": "survived", "why": "é"}
    path.write_text(json.dumps(row) + '\n{"kind": "b", "num', "utf-8")
    torture.Record(path).add(row | {"number": 2})
    record = torture.Record(path)
    assert [row["number"] for row in record.rows] == [0, 2] and "torn line" in capsys.readouterr().err
    kinds = {"a": (4, None), "b": (1, None)}
    assert record.next(kinds, set()) == ("b", 0) and record.next(kinds, {("b", 0)}) == ("a", 1)
    assert record.next(kinds, {("b", 0), ("a", 1)}) == ("a", 3)


def test_the_table():
    rows = [("kill: train", what) for what in ("survived", "survived", "lost")] + [("full disk: train", "skipped")]
    rows += [("flip: x", what) for what in ("refused", "silent", "hung", "failed")]
    assert torture.table([{"kind": kind, "verdict": what} for kind, what in rows]).splitlines() == [
        "| kind | tried | survived | refused | lost | silent | hung | failed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| kill: train | 3 | 2 | 0 | 1 | 0 | 0 | 0 |",
        "| full disk: train (skipped) | 0 | 0 | 0 | 0 | 0 | 0 | 0 |",
        "| flip: x | 4 | 0 | 1 | 0 | 1 | 1 | 1 |",
        "| **all** | 7 | 2 | 1 | 1 | 1 | 1 | 1 |",
    ]


@pytest.mark.parametrize("fault", [Verdict("silent", "other bytes"), ValueError("a bug")])
def test_a_failure_keeps_its_folder_and_says_how_to_repeat_it(tmp_path, capsys, fault):
    def trial(bench, rng, folder):
        folder.mkdir()
        (folder / "draw").write_text(str(rng.random()))
        if isinstance(fault, Exception):
            raise fault
        return fault

    flags = argparse.Namespace(workdir=tmp_path, seed=3, number=None, kinds={"flip: x": (1, trial)})
    record = torture.Record(tmp_path / "trials.jsonl")
    row = torture._one(flags, None, record, "flip: x", 7)
    assert row["verdict"] == ("silent" if isinstance(fault, Verdict) else "failed") and record.rows == [row]
    kept = tmp_path / "failures" / "flip--x-7" / "draw"
    assert float(kept.read_text()) == random.Random("3 flip: x 7").random() and not list(
        (tmp_path / "trials").iterdir()
    )
    assert f"--workdir={tmp_path} --seed=3 --only='flip: x' --number=7" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_form(tmp_path):
    """Some of the kinds, once each: nothing is lost, silent, hung or failed."""
    kinds = "kill: train,signal: sample,flip: checkpoint,cut off: export,two at once: prepare,stranger: garbage"
    line = [sys.executable, "benchmarks/torture.py", f"--workdir={tmp_path}", "--minutes=1", "--patience=60"]
    done = subprocess.run([*line, f"--only={kinds}"], cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| **all** |" in done.stdout and "| kill: train |" in done.stdout
