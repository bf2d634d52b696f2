"""Many processes as one: real ones on this machine, as launch/local_pod.py starts them, with a stand-in network."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from warm_jax import checkpoint, step, train

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
    return jax.device_get(reader.restore(number, train=abstract._replace(ema=None), ema=abstract.ema))


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


def interrupted_twice(hosts, folder, numbers=(signal.SIGTERM,)):
    """Trains on `hosts` processes: a signal to the last one, kill -9 of it, and the same command until it is done."""
    workdir = folder / "run"
    for number in numbers:
        pod = Pod(hosts, folder, f"--workdir={workdir}", checkpoint_every=1000)
        pod.wait_for("step      10")
        pod.hosts[-1].send_signal(number)
        assert pod.end() == (75, [75] * hosts), pod.said(0)
        assert len(saved_steps(workdir)) == 1
        assert f"{number.name} on process {hosts - 1}: step {saved_steps(workdir)[0]} of {STEPS} is saved" in pod.said(
            0
        )
    first = saved_steps(workdir)[0]
    assert 10 <= first < STEPS
    pod = Pod(hosts, folder, f"--workdir={workdir}", steps=10_000)
    pod.wait_for("training:")
    while not [step for step in saved_steps(workdir) if first < step]:
        time.sleep(0.05)
    pod.hosts[-1].kill()
    status, codes = pod.end(grace=0)
    assert status in (137, 1, 134) and codes[-1] == -9
    return workdir


def test_two_processes_are_one_with_as_many_devices(tmp_path):
    """Bitwise, after a SIGTERM to one process and another job killed with it by kill -9."""
    workdir = tmp_path / "run"
    pod = Pod(2, tmp_path, f"--workdir={workdir}", checkpoint_every=1000)
    pod.wait_for("step      10")
    pod.hosts[1].send_signal(signal.SIGTERM)
    assert pod.end() == (75, [75, 75]), pod.said(0)
    (at,) = saved_steps(workdir)
    assert 10 <= at < STEPS and f"SIGTERM on process 1: step {at} of {STEPS} is saved" in pod.said(0)
    pod = Pod(2, tmp_path, f"--workdir={workdir}")
    pod.wait_for(f"resuming from the checkpoint of step {at}")
    pod.wait_for("step      50" if at < 50 else "training:")
    pod.hosts[1].kill()
    status, codes = pod.end(grace=0)
    assert codes[1] == -9 and status in (137, 1, 134)  # whoever was seen to end first
    pod = Pod(2, tmp_path, f"--workdir={workdir}")
    assert pod.end() == (0, [0, 0]), pod.said(0) + pod.said(1)
    assert pod.said(1).count("step ") == 0  # one writer of logs
    rows = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows)) and {*range(10, STEPS + 1, 10)} <= set(rows)
    jax.tree.map(np.testing.assert_array_equal, stored(workdir, STEPS), one_process(tmp_path / "one", 2))
