"""Many processes as one: real ones on this machine, as launch/local_pod.py starts them, with a stand-in network."""

import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from warm_jax.runtime import checkpoint, peers, rollcall
from warm_jax.sampling import generate
from warm_jax.training import step, train

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "launch"))
import local_pod  # noqa: E402

STEPS = 60
TRAINING = {"steps": STEPS, "sample_every": 0, "checkpoint_every": 20, "log_every": 10, "decay": "none"}


class Pod:
    """A job of several processes of warm_jax.main with the stand-in network."""

    def __init__(self, hosts, folder, *arguments, devices=1, own=None, **training):
        lines = local_pod.commands(hosts, local_pod.free_port(), ["--config=configs/smoke.py", *arguments])
        given = [f"--config.train.{name}={value}" for name, value in (TRAINING | training).items()]
        own = own or {}
        lines = [
            [sys.executable, "tests/pod_worker.py", *line[3:], *given, *own.get(number, [])]
            for number, line in enumerate(lines)
        ]
        inherited = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONUNBUFFERED": "1"}
        inherited["PYTHONPATH"] = str(ROOT / "tests")
        self.logs = folder / "logs"
        env = local_pod.environment(devices, inherited)
        self.hosts = []
        for number, line in enumerate(lines):
            self.logs.mkdir(parents=True, exist_ok=True)
            out = (self.logs / f"host{number}.log").open("w")
            self.hosts.append(subprocess.Popen(line, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT))

    def said(self, number):
        return (self.logs / f"host{number}.log").read_text()

    def wait_for(self, text, number=0):
        """Until process `number` has said `text`."""
        until = time.monotonic() + 120
        while text not in self.said(number):
            assert self.hosts[number].poll() is None and time.monotonic() < until, self.said(number)
            time.sleep(0.02)

    def end(self, grace=60):
        """The exit status of the job, as the launcher has it, and of each process."""
        try:
            status = local_pod.wait(self.hosts, grace)
        finally:
            for host in self.hosts:
                host.kill()
        return status, [host.returncode for host in self.hosts]


def stored(workdir, number, devices=None):
    """All of a checkpoint of the stand-in network's run, read by this process."""
    exp = tiny.build(devices=devices)
    abstract = step.abstract_state(exp)
    reader = checkpoint.Checkpoints(workdir / "checkpoints", writable=False)
    return jax.device_get(reader.restore(number, **step.to_store(abstract)))


def saved_steps(workdir):
    return checkpoint.Checkpoints(workdir / "checkpoints", writable=False).steps()


def one_process(workdir, devices):
    """The same training by this process alone, on as many devices."""
    config = tiny.config(**{f"train__{name}": value for name, value in TRAINING.items()})
    run = tiny.on_devices(tiny.with_network(train.prepare(config, workdir), tiny.Linear()), devices)
    assert train.train(run, final_grid=False) == 0
    return stored(workdir, STEPS)


def assert_close(found, expected, atol):
    """Adam's second moments are squares of gradients, up to 10⁵ here, so the tolerance is relative to the largest."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, np.abs(b).max()))


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def stop_and_kill(hosts, folder, number, to, **settings):
    """A job that a signal to process `to` stops, and the same again with kill -9 of it; the step where it stopped."""
    workdir = folder / "run"
    pod = Pod(hosts, folder, f"--workdir={workdir}", checkpoint_every=1000, **settings)
    pod.wait_for("step      10")
    pod.hosts[to].send_signal(number)
    assert pod.end() == (75, [75] * hosts), pod.said(0)
    (at,) = saved_steps(workdir)
    assert 10 <= at < STEPS and f"{number.name} on process {to}: step {at} of {STEPS} is saved" in pod.said(0).replace(
        f"{number.name}:", f"{number.name} on process 0:"
    )
    pod = Pod(hosts, folder, f"--workdir={workdir}", **settings)
    pod.wait_for(f"resuming from the checkpoint of step {at}")
    pod.wait_for("step      50" if at < 50 else "training:")
    pod.hosts[to].kill()
    status, codes = pod.end(grace=0)
    assert codes[to] == -9 and status in (137, 1, 134)  # whoever was seen to end first
    assert all(codes), codes  # nobody is left behind
    return at


def test_two_processes_are_one_with_as_many_devices(tmp_path):
    """After a SIGTERM to one process, and kill -9 of it; within 1e-6 of the largest number of each array.

    Two averages are kept on the way, which the one process does not keep.
    """
    averages = {"posthoc_ema": "(0.05,0.1)", "posthoc_every": 10}
    stop_and_kill(2, tmp_path, signal.SIGTERM, 1, **averages)
    pod = Pod(2, tmp_path, f"--workdir={tmp_path / 'run'}", **averages)
    assert pod.end() == (0, [0, 0]), pod.said(0) + pod.said(1)
    assert "step " not in pod.said(1)  # one writer of logs
    rows = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows)) and {*range(10, STEPS + 1, 10)} <= set(rows)
    assert_close(stored(tmp_path / "run", STEPS), one_process(tmp_path / "one", 2), 1e-6)
    snapshots = checkpoint.Checkpoints(tmp_path / "run" / "posthoc", writable=False).steps()
    assert snapshots == list(range(STEPS, 0, -10))
    assert (tmp_path / "run" / "checkpoints" / str(STEPS) / "averages").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "devices"), [(2, 1), (4, 1), (2, 2)])
def test_processes_are_one(tmp_path, hosts, devices):
    """The same comparison, with a process that has as many devices and is not a part of the test."""
    pod = Pod(hosts, tmp_path, f"--workdir={tmp_path / 'run'}", devices=devices)
    assert pod.end()[0] == 0, pod.said(0)
    alone = Pod(1, tmp_path / "one", f"--workdir={tmp_path / 'one'}", "--processes=1", devices=hosts * devices)
    assert alone.end()[0] == 0, alone.said(0)
    assert_close(stored(tmp_path / "run", STEPS), stored(tmp_path / "one", STEPS), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to"), [(signal.SIGINT, 0), (signal.SIGTERM, 3)])
def test_four_processes_stop_together_and_two_go_on(tmp_path, number, to):
    """With parameters over two of them; then the job is of another size, and parameters are whole."""
    stop_and_kill(4, tmp_path, number, to, **{"batch_size": 16})
    pod = Pod(2, tmp_path, f"--workdir={tmp_path / 'run'}", "--config.mesh.fsdp=2")
    assert pod.end() == (0, [0, 0]), pod.said(0)
    assert_close(stored(tmp_path / "run", STEPS), one_process(tmp_path / "one", 1), 1e-5)


@pytest.mark.slow
def test_what_is_wrong_with_one_ends_all(tmp_path):
    """Before anything is compiled, with the reason in each."""
    cases = (
        ([], {1: ["--config.train.batch_size=32"]}, "process 1 on .* train.batch_size is 32 there and 16 on process 0"),
        ([], {1: ["--seed=1"]}, "--seed=1: no such flag"),
        (
            [f"--workdir={tmp_path / 'a'}"],
            {1: [f"--workdir={tmp_path / 'b'}"]},
            "is not the folder that process 0 sees",
        ),
        (
            ["--mode=evaluate", "--images=bundled", f"--workdir={tmp_path / 'a'}"],
            {1: [f"--workdir={tmp_path / 'b'}"]},
            "is not the folder that process 0 sees",
        ),
        (["--config.train.batch_size=15"], {}, r"does not divide over 2 device\(s\)"),
        (["--mode=compare"], {}, "--mode=compare runs in one process, and this is one of 2"),
    )
    for arguments, own, message in cases:
        pod = Pod(2, tmp_path, f"--workdir={tmp_path / 'run'}", *arguments, "--start_seconds=20", own=own)
        codes = pod.end()[1]
        assert codes[1] == 2 and re.search(message, pod.said(1)), (codes, pod.said(1))
        if "flag" not in message:
            assert codes[0] == 2 and re.search(message, pod.said(0)), (codes, pod.said(0))
        assert "compiled" not in pod.said(0) and "Traceback" not in pod.said(0) + pod.said(1)


# ── Processes that hang ──────────────────────────────────────────────────────────────────────────────────────────────


class Store:
    """The key-value store of JAX's coordinator, of which what is asked for comes at once, or never."""

    def __init__(self):
        self.values, self.answers = {}, threading.Event()
        self.answers.set()

    def key_value_set(self, key, value, allow_overwrite=False):
        self.answers.wait()
        assert allow_overwrite or key not in self.values, "ALREADY_EXISTS"
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        self.answers.wait()
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.fixture
def left(monkeypatch):
    """With what words processes, in threads here, would have ended."""
    words = []

    def leave(why):
        words.append(why)
        threading.Event().wait()

    monkeypatch.setattr(peers, "leave_with", leave)
    monkeypatch.setattr(peers, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(peers, "HUNG_SECONDS", 1.0)
    return words


def closed(*made):
    for one in made:
        one.closing.set()


def wait_for_words(left, number):
    until = time.monotonic() + 30
    while len(left) < number:
        assert time.monotonic() < until, left
        time.sleep(0.01)


def test_a_process_that_hangs_is_named_and_ends_the_job(left):
    """Process 1 says nothing more: process 0 finds it, and tells the other."""
    store, place = Store(), rollcall.Place("localhost:1", 3, 0)
    first, other = peers.Peers(place, store), peers.Peers(place._replace(process=2), store)
    store.key_value_set("warm_jax/alive/1", "7 node\x1b[2J17", allow_overwrite=True)
    wait_for_words(left, 2)
    closed(first, other)
    assert set(left) == {"process 1 on node\\x1b[2J17 has given no sign of life for 1 s"}


def test_process_0_that_hangs_is_named(left):
    store, place = Store(), rollcall.Place("localhost:1", 2, 1, ("a", "b"))
    other = peers.Peers(place, store)
    store.key_value_set("warm_jax/news/host", "node0")
    time.sleep(0.2)
    store.answers.clear()
    wait_for_words(left, 1)
    closed(other)
    store.answers.set()
    assert left[0] == "process 0 on node0 (localhost:1) has not answered for 1 s"


def test_processes_that_live_are_left_alone(left):
    store, place = Store(), rollcall.Place("localhost:1", 2, 0)
    made = [peers.Peers(place._replace(process=number), store) for number in (0, 1)]
    time.sleep(2.5)
    closed(*made)
    assert left == []


def test_a_time_in_which_this_process_slept_itself_does_not_count(monkeypatch):
    """As a laptop that was closed, or a process that was stopped: hours later the others have had no time to speak."""
    clock = [0.0]
    monkeypatch.setattr(peers.time, "monotonic", lambda: clock[0])
    pulse = peers._Pulse()
    for now, said, silent in ((1, "a", 0), (2, "a", 1), (9999, "a", 3), (10000, "a", 4), (10001, "b", 0)):
        clock[0] = now
        assert pulse.silent(said) == silent


_WAITING = """
import jax, sys, time
from warm_jax.runtime import pod, rollcall
place = rollcall.Place({address!r}, {processes}, {number})
pod.start(place, {{}}, 60)
print("together", flush=True)
while {number} == 1:
    pass
time.sleep(100)
"""


def test_kill_9_of_process_0_ends_the_others_with_one_line(tmp_path):
    """Status 1, whether their main thread is in Python or waits; of C++ one line of a log at most, and no stack."""
    address, processes = f"127.0.0.1:{local_pod.free_port()}", 3
    lines = [
        [sys.executable, "-c", _WAITING.format(address=address, processes=processes, number=number)]
        for number in range(processes)
    ]
    files = [(tmp_path / f"{number}.log").open("w+") for number in range(processes)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pairs = zip(lines, files, strict=True)
    hosts = [subprocess.Popen(line, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT) for line, file in pairs]
    said = [tmp_path / f"{number}.log" for number in range(processes)]
    try:
        until = time.monotonic() + 60
        while not all("together" in path.read_text() for path in said):
            assert time.monotonic() < until and not any(host.poll() for host in hosts), said[1].read_text()
            time.sleep(0.05)
        hosts[0].kill()
        for host, path in zip(hosts[1:], said[1:], strict=True):
            assert host.wait(timeout=20) == 1, path.read_text()
            text = path.read_text().partition("together\n")[2].splitlines()
            assert [line for line in text if line.startswith("error:")] == text[-1:], text
            assert f"process 0 at {address} is gone" in text[-1] and len(text) <= 2, text
    finally:
        for host, file in zip(hosts, files, strict=True):
            host.kill()
            file.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2])
def test_a_host_that_is_stopped_ends_the_job(tmp_path, monkeypatch, number):
    """SIGSTOP to one of three: the others end with one line, status 1, and no stack of C++."""
    monkeypatch.setenv("HUNG_SECONDS", "6")
    pod = Pod(3, tmp_path, f"--workdir={tmp_path / 'run'}", "--config.train.batch_size=15", steps=10**6)
    pod.wait_for("step      10")
    pod.hosts[number].send_signal(signal.SIGSTOP)
    others = [other for other in range(3) if other != number]
    for other in others:
        assert pod.hosts[other].wait(timeout=60) == 1
        lines = [line for line in pod.said(other).splitlines() if line.startswith(("error", "F1", "***", "Fatal"))]
        name = f"process {number} on {platform.node()}"
        assert len(lines) == 1 and lines[0].startswith(f"error: {name}"), lines
    pod.hosts[number].kill()


# ── Sampling and evaluation ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a short training of the stand-in network."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.config(train__steps=5, train__sample_every=0)
    assert train.train(tiny.with_network(train.prepare(config, folder), tiny.Linear()), final_grid=False) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "all.npz"])
def test_sampling_by_two_stops_and_goes_on_by_three(tmp_path, trained, name):
    """Each seed is drawn once, to the bytes that one process draws."""
    arguments = ("--mode=sample", f"--workdir={trained}", "--seeds=0-2999", f"--out={tmp_path / name}")
    pod = Pod(2, tmp_path, *arguments, steps=5)
    pod.wait_for("compiled the sampler")
    time.sleep(0.5)
    pod.hosts[1].send_signal(signal.SIGTERM)
    assert pod.end() == (75, [75, 75]), pod.said(0)
    pod = Pod(3, tmp_path, *arguments, steps=5)
    assert pod.end()[0] == 0, pod.said(0)
    assert not list(tmp_path.glob("*.partial.npz"))
    drawing = generate.prepare(tiny.config(train__steps=5), trained, "0-2999", str(tmp_path / "one.npz"), -1)
    assert generate.sample(tiny.with_network(drawing, tiny.Linear())) == 0
    expected = np.load(tmp_path / "one.npz")
    if name == "all.npz":
        found = np.load(tmp_path / name)
        for key in ("images", "labels", "seeds"):
            np.testing.assert_array_equal(found[key], expected[key])
    else:
        assert (tmp_path / name / "grid.png").exists()
        for seed, image in zip(expected["seeds"], expected["images"], strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name / f"{seed:06d}.png")), image[..., 0])


@pytest.mark.slow
def test_evaluation_by_two_stops_and_goes_on(tmp_path, trained):
    """With the scores of one process."""
    arguments = ("--mode=evaluate", f"--workdir={trained}", "--config.eval.count=6000")
    pod = Pod(2, tmp_path, *arguments, steps=5)
    pod.wait_for("reference: bundled")
    time.sleep(1.0)
    pod.hosts[1].send_signal(signal.SIGTERM)
    assert pod.end() == (75, [75, 75]), pod.said(0)
    assert "finished shards are kept" in pod.said(0) and not (trained / "results.jsonl").exists()
    assert Pod(2, tmp_path, *arguments, steps=5).end()[0] == 0
    shutil.rmtree(trained / "evaluations")
    assert Pod(1, tmp_path, *arguments, "--processes=1", steps=5).end()[0] == 0
    two, one = map(json.loads, (trained / "results.jsonl").read_text().splitlines())
    assert two["count"] == one["count"] == 6000
    for name in ("fd_fashion_cnn_6k", "lsd_db_pixels_5k"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-6)


# ── The launcher ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dry_run_prints_the_commands():
    command = [sys.executable, "launch/local_pod.py", "--hosts=3", "--devices-per-host=2", "--dry-run", "--", "--x=a b"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 3
    for number, line in enumerate(lines):
        assert f"--processes=3 --process={number} '--x=a b'" in line and "device_count=2" in line
        assert "JAX_PLATFORMS=cpu" in line and "-m warm_jax.main --coordinator=localhost:" in line


@pytest.mark.parametrize(
    ("programs", "status", "codes"),
    [
        (["pass", "pass"], 0, [0, 0]),
        (["time.sleep(60)", "os.kill(os.getpid(), 9)"], 137, [-9, -9]),
        (["time.sleep(60)", "sys.exit(1)"], 1, [-9, 1]),
        (["time.sleep(0.3); sys.exit(75)", "sys.exit(75)"], 75, [75, 75]),
        (["time.sleep(60)", "sys.exit(2)"], 2, [-9, 2]),
    ],
)
def test_one_that_dies_takes_the_others_with_it(tmp_path, programs, status, codes):
    lines = [[sys.executable, "-c", f"import os, sys, time; {program}"] for program in programs]
    hosts = local_pod.start(lines, dict(os.environ), tmp_path)
    assert local_pod.wait(hosts, grace=1.0) == status
    assert [host.returncode for host in hosts] == codes
