"""The command line, as people use it: real processes, real signals, and every kind of wrong input."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from configs import smoke
from warm_jax import main
from warm_jax.cli import flags
from warm_jax.experiments import experiment
from warm_jax.runtime import checkpoint
from warm_jax.training import step

ROOT = pathlib.Path(__file__).parent.parent
# Long enough that signals come while it trains; without previews, which take most of a short run.
LONGER = ("--config.train.steps=60", "--config.train.sample_every=0", "--config.train.checkpoint_every=10")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, quick compilation, shared by all processes of this file."""
    return {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }


def launch(environment, workdir, *arguments, config="configs/smoke.py"):
    command = [sys.executable, "-m", "warm_jax.main", f"--config={config}", f"--workdir={workdir}", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process):
    """(exit status, stdout, stderr) of a process that is about to end."""
    try:
        out, err = process.communicate(timeout=270)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(process, text):
    """Reads stdout up to the line with `text`."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"no {text!r} in: {''.join(seen)}{process.stderr.read()}")


def weights(workdir, number=60):
    """Everything in a checkpoint of the smoke run."""
    exp = experiment.build(smoke.get_config())
    abstract = step.abstract_state(exp)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", writable=False)
    return jax.device_get(checkpoints.restore(number, **step.to_store(abstract)))


@pytest.fixture(scope="module")
def trained(environment, tmp_path_factory):
    """The workdir of a run that nothing interrupted, what it said, and its last checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    status, out, err = finish(launch(environment, workdir, *LONGER))
    assert status == 0, err
    return workdir, out, weights(workdir)


def assert_same_weights(workdir, expected):
    jax.tree.map(np.testing.assert_array_equal, weights(workdir), expected)


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_train(trained):
    workdir, out, _ = trained
    for said in ("parameters", "precision: ", "compiled the train step in", "images/s", "trained to step 60"):
        assert said in out
    for name in ("config.json", "metrics.jsonl", "parameters.txt", "checkpoints/60", "grids/00000060.png", "tb"):
        assert (workdir / name).exists()


def test_the_same_command_again(environment, trained):
    status, out, err = finish(launch(environment, trained[0], *LONGER))
    assert status == 0, err
    assert "resuming from the checkpoint of step 60" in out
    assert_same_weights(trained[0], trained[2])


def test_a_signal_saves_and_the_same_command_goes_on(environment, trained, tmp_path):
    """At any step, not just where a checkpoint is due; with the same bits in the end."""
    workdir = tmp_path / "run"
    for number, logged in ((signal.SIGTERM, "10"), (signal.SIGINT, "40")):
        process = launch(environment, workdir, *LONGER, "--config.train.checkpoint_every=1000")
        wait_for(process, f"step      {logged}")
        process.send_signal(number)
        status, out, err = finish(process)
        assert status == 75, err
        saved = max(checkpoint.Checkpoints(workdir / "checkpoints", writable=False).steps())
        assert int(logged) <= saved < 60
        assert f"{number.name}: step {saved} of 60 is saved; the same command goes on from there" in out
        assert "Traceback" not in err
    status, out, err = finish(launch(environment, workdir, *LONGER))
    assert status == 0, err
    assert f"resuming from the checkpoint of step {saved}" in out
    assert_same_weights(workdir, trained[2])


def kill_and_go_on(environment, workdir, expected, kills):
    """`kill -9` at random moments, until it has happened so often; then to the end."""
    seed = random.randrange(2**32)
    print(f"kill -9 at moments drawn with random.Random({seed})")
    moments, happened = random.Random(seed), 0
    while True:
        process = launch(environment, workdir, *LONGER)
        if happened < kills:
            # From when it says where it starts, which takes most of its time; a save takes a step or two.
            wait_for(process, "compiled the train step")
            time.sleep(moments.uniform(0, 1.5))
            process.kill()
        status, out, err = finish(process)
        assert status in (0, -signal.SIGKILL), err
        happened += status != 0
        if status == 0:
            break
    print(f"{happened} of {kills} kills came in time; the last run said: {out.splitlines()[0]}")
    assert_same_weights(workdir, expected)


def test_kill_9_at_a_random_moment(environment, trained, tmp_path):
    kill_and_go_on(environment, tmp_path / "run", trained[2], kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(5))
def test_kill_9_at_many_random_moments(environment, trained, tmp_path, turn):
    kill_and_go_on(environment, tmp_path / "run", trained[2], kills=4)


def test_a_cut_off_checkpoint_is_passed_over_and_the_log_says_so(environment, trained, tmp_path):
    import shutil

    workdir = shutil.copytree(trained[0], tmp_path / "run")
    for file in (workdir / "checkpoints" / "60" / "train" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    status, out, err = finish(launch(environment, workdir, *LONGER))
    assert status == 0, err
    assert "checkpoint 60 in" in err and "trying the one before" in err
    assert "resuming from the checkpoint of step 50" in out
    assert_same_weights(workdir, trained[2])


# ── Sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sampling_stops_for_a_signal_and_goes_on(environment, trained, tmp_path):
    arguments = ["--mode=sample", "--seeds=0-2999", f"--out={tmp_path / 'samples'}"]
    process = launch(environment, trained[0], *arguments)
    wait_for(process, "compiled the sampler")
    while not list((tmp_path / "samples").glob("0*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert status == 75, err
    assert "SIGTERM: kept what was drawn" in out and "Traceback" not in err
    kept = {path.name: path.read_bytes() for path in (tmp_path / "samples").glob("0*.png")}
    assert 0 < len(kept) < 3000 and not list((tmp_path / "samples").glob(".*"))
    # The same command goes on; one with fewer seeds, to spare time, does too.
    arguments[1] = f"--seeds=0-{len(kept) + 19}"
    status, out, err = finish(launch(environment, trained[0], *arguments))
    assert status == 0, err
    assert f"20 of {len(kept) + 20} images to draw" in out and "NFE 7 (heun, 4 steps)" in out
    assert all((tmp_path / "samples" / name).read_bytes() == content for name, content in kept.items())


# ── Wrong input ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line in this process: arguments -> (exit status, stderr, programs compiled)."""
    monkeypatch.chdir(ROOT)
    compiled = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details)

    def call(*arguments):
        with flagsaver.flagsaver():
            absl_flags.FLAGS.unparse_flags()
            monkeypatch.setattr(sys, "argv", ["main", *arguments])  # where ml_collections looks for overrides
            compiled.clear()
            capsys.readouterr()
            try:
                status = main.main(flags.parse(sys.argv))
            except SystemExit as error:
                status = error.code
        return status, capsys.readouterr().err, list(compiled)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield call
    jax.monitoring.unregister_event_duration_listener(listen)


def assert_refused(result, *named):
    """One line on stderr, exit status 2, nothing compiled, and the line names all of `named`."""
    status, err, compiled = result
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert not compiled and "\\n" not in err
    for text in named:
        assert text in err, err


WRONG = {  # arguments after --config=configs/smoke.py, and what the answer names: value, limit, remedy
    "misspelt key": ("--config.train.step=5", "step", "did you mean --config.train.steps=5?"),
    "unknown section": ("--config.trian.steps=5", "trian", "did you mean --config.train.steps=5?"),
    "unknown key": ("--config.train.zzz=5", "the config has no key", "zzz"),
    "wrong type": ("--config.train.steps=many", "train.steps", "many", "int"),
    "half a step": ("--config.train.steps=1.5", "train.steps", "1.5", "int"),
    "negative BNR": ("--config.process.bnr=-0.5", "process.bnr is -0.5", "from 0 to 10,000"),
    "BNR nan": ("--config.process.bnr=nan", "process.bnr is nan", "from 0 to 10,000"),
    "BNR beyond float32": ("--config.process.bnr=1e30", "process.bnr is 1e+30", "from 0 to 10,000"),
    "P_mean": ("--config.process.P_mean=nan", "process.P_mean is nan", "from -10 to 10"),
    "sigma_data": ("--config.model.sigma_data=1e-30", "model.sigma_data is 1e-30", "from 0.001 to 1,000"),
    "broken mult": ("--config.model.channel_mult=(1,2.5)", "model.channel_mult is (1, 2.5)", "whole numbers"),
    "mult of words": ("--config.model.channel_mult=('a',)", "model.channel_mult is ('a',)", "whole numbers"),
    "no mult": ("--config.model.channel_mult=()", "channel_mult", "(2, 2, 2)"),
    "huge batch": ("--config.train.batch_size=1000000000000", "train.batch_size is 1000000000000", "1,048,576"),
    "blurred hot": ("--config=configs/smoke.py:hot --config.process.schedule=information_budget", "no key", "schedule"),
    "BNR in hot": ("--config=configs/smoke.py:hot --config.process.bnr=1", "process.bnr is 1.0", ":warm"),
    "information budget": (
        "--config.process.schedule=information_budget --config.process.information_budget=2",
        "information",
        "2",
    ),
    "lowest level": ("--config.process.beta_min=-1", "process.beta_min is -1.0", "from 1e-06 to 1e+06"),
    "highest level": ("--config.process.beta_max=0.001", "beta_max=0.001", "0 < beta_min < beta_max"),
    "levels' spread": ("--config.process.P_std=0", "process.P_std is 0.0", "from 0.001 to 10"),
    "image size": ("--config.data.image_size=30", "30", "28 or 42"),
    "batch": ("--config.train.batch_size=12", "12", "8 device", "8 or 16"),
    "accumulation": ("--config.train.accumulation=3", "16", "24"),
    "batch of none": ("--config.train.batch_size=0", "train.batch_size is 0", "from 1 to 1,048,576"),
    "channels": ("--config.model.channels=18", "channels is 18", "GroupNorm", "16 or"),
    "odd channels": ("--config.model.channels=9", "channels is 9", "8 or 10"),
    "attention": ("--config.model.attention=(5,)", "attention at resolution 5", "4, 2"),
    "dropout": ("--config.model.dropout=1", "dropout is 1", "[0, 1)"),
    "dtype": ("--config.model.dtype=float16", "model.dtype is 'float16'", "float32, bfloat16"),
    "architecture": ("--config.model.architecture=dit", "'dit'", "ddpmpp, ncsnpp"),
    "system": ("--config=configs/smoke.py:warmer", "'warmer'", "choose one of warm, amortised, hot"),
    "solver": ("--config.sample.solver=rk4", "'rk4'", "heun, euler, multistep"),
    "compared system": (
        "--mode=compare --config.compare.systems=('hot','lukewarm')",
        "'lukewarm'",
        "choose one of warm",
    ),
    "repeats": ("--mode=compare --config.compare.repeats=0", "compare.repeats is 0", "at least 1"),
    "BNR of none": (
        "--config=configs/smoke.py:ddpm --config.process.bnr=1",
        "process.bnr is 1.0",
        ":warm",
        ":amortised",
    ),
    "learning rate": ("--config.train.learning_rate=-1", "train.learning_rate is -1", "from 1e-12 to 1,000"),
    "seed": ("--config.seed=-1", "seed is -1", "from 0 to 4,294,967,295"),
    "large seed": ("--config.seed=4294967296", "seed is 4294967296", "from 0 to 4,294,967,295"),
    "classes": ("--config.data.num_classes=3", "data.num_classes is 3", "10 classes", "0"),
    "image channels": ("--config.data.channels=3", "3", "1"),
    "source kind": ("--config.data.source=zap:x", "'zap:x'", "bundled, idx:PATH"),
    "source path": ("--config.data.source=zip:nowhere.zip", "nowhere.zip", "--config.data.source"),
    "workdir is a file": ("--workdir=LICENSE", "LICENSE", "--workdir"),
    "workdir in /proc": ("--workdir=/proc/nothing", "/proc/nothing", "--workdir"),
    "workdir in no bucket": (
        "--workdir=gs://no-bucket/x",
        "gs://no-bucket/x",
        "not mounted",
        "gcsfuse --implicit-dirs",
    ),
    "workdir elsewhere": ("--workdir=s3://bucket/x", "s3://bucket/x", "gs://BUCKET/PATH"),
    "results in no bucket": ("--mode=sample --out=gs://no-bucket/x", "gs://no-bucket/x", "gcsfuse"),
    "images in no bucket": ("--config.data.source=zip:gs://no-bucket/x.zip", "gs://no-bucket/x.zip", "gcsfuse"),
    "models in no bucket": (
        "--mode=analyze --analysis=sweep --config.analysis.models=('gs://no-bucket/x',)",
        "gs://no-bucket/x",
        "gcsfuse",
    ),
    "no checkpoints": ("--mode=sample", "no checkpoint in", "train first", "--workdir"),
    "seeds": ("--mode=sample --seeds=5-3", "--seeds=5-3", "rise"),
    "not seeds": ("--mode=sample --seeds=all", "--seeds=all", "0-63,100"),
    "trajectory of no samples": ("--trajectory", "--trajectory", "--mode=train", "sample"),
    "EMA in training": ("--ema=0.08", "--ema=0.08", "--mode=train", "sample, restore, evaluate, analyze, export"),
    "EMA of a doctor": ("--mode=doctor --ema=0.08", "--ema=0.08", "--mode=doctor"),
    "nothing to convert": ("--mode=convert", "--from_inception=FILE", "--from_dinov2=FILE", "--from_edm=FILE"),
    "unverified pickle": (
        "--mode=convert --from_edm=no.pkl --unverified",
        "--unverified",
        "--from_dinov2",
        "--from_edm",
    ),
    "no DINOv2": ("--mode=convert --from_dinov2=no.pth --out=x.safetensors", "no.pth", "dinov2_vitl14_pretrain.pth"),
    "no pickle": ("--mode=convert --from_edm=no.pkl", "no weights at no.pkl", "--from_edm=FILE.pkl"),
    "no pickle of a network": ("--mode=convert --from_edm=README.md", "README.md", "not a file of tensors"),
    "no export": ("--mode=convert --from_export=docs", "docs/model.json is not there", "--mode=export"),
    "platform": ("--mode=export --platforms=metal", "--platforms=metal", "choose some of cpu, cuda, rocm, tpu"),
    "no start": ("--init_from=docs", "docs/config.json", "no workdir of a run"),
    "mode": ("--mode=trian", "trian", "train"),
    "flag": ("--workdri=x", "workdri", "workdir"),
    "argument": ("train", "'train'", "--flag=VALUE"),
    "config file": ("--config=configs/cifar01.py", "configs/cifar01.py", "no such file", "did you mean cifar10?"),
    "config of nothing": ("--config=", "--config=", "fashion_mnist"),
    "config in a folder": ("--config=configs", "configs", "no such config"),
    "value for a section": ("--config.model=3", "model", "3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(run, tmp_path, case):
    arguments, *named = WRONG[case]
    workdir = [] if "--workdir" in arguments else [f"--workdir={tmp_path / 'run'}"]
    config = [] if "--config=" in arguments else ["--config=configs/smoke.py"]
    assert_refused(run(*config, *workdir, *arguments.split()), *named)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not list(ROOT.glob("*:"))  # a folder "gs:", if the name were taken for a path


def test_a_reference_in_no_bucket(run, tmp_path):
    arguments = ("--mode=evaluate", "--config.eval.reference=gs://no-bucket/x.npz", f"--workdir={tmp_path}")
    status, err, _ = run("--config=configs/smoke.py", *arguments)
    assert status == 2 and err.startswith("error: gs://no-bucket/x.npz: ") and "gcsfuse" in err and err.count("\n") == 1


def test_no_config(run):
    for arguments in ((), ("--mode=sample",)):
        assert_refused(run(*arguments), "neither --config nor --workdir", "--config=fashion_mnist", "--workdir=RUN")


def test_missing_cifar10_says_how_to_get_it(run, tmp_path):
    result = run("--config=configs/cifar10.py", f"--workdir={tmp_path}", f"--config.data.source=zip:{tmp_path}/no.zip")
    assert_refused(
        result, "no.zip", "data/cifar-10-binary.tar.gz https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--config.model.channels=16", ["model.channels was 8 and is now 16", "--workdir"]),
        ("--config.process.bnr=1", ["process.bnr was 0.5 and is now 1.0"]),
        (
            "--config.seed=1 --config.train.batch_size=32",
            ["seed was 0 and is now 1", "batch_size was 16 and is now 32"],
        ),
        ("--mode=sample --config.process.bnr=1", ["process.bnr was 0.5 and is now 1.0"]),
        ("--mode=sample --config.sample.bnr=1", ["sample.bnr is 1.0", "trained at BNR 0.5"]),
        ("--mode=sample --checkpoint=7", ["no checkpoint of step 7", "50, 60"]),
        ("--config.train.posthoc_ema=(0.05,0.1)", ["train.posthoc_ema was [] and is now [0.05, 0.1]", "--workdir"]),
        ("--mode=sample --ema=0.08", ["--ema=0.08", "train.posthoc_ema", "leave --ema out"]),
        ("--mode=evaluate --ema=0.05,0.4", ["--ema=0.05", "train.posthoc_ema"]),
        ("--mode=export --ema=0.3", ["--ema is 0.3", "0.2887"]),
        ("--mode=sample --ema=0.05,0.1", ["--ema=0.05,0.1", "takes one"]),
        ("--mode=evaluate --ema=long", ["--ema=long", "0.02,0.05,0.1"]),
        (
            "--mode=sample --config.sample.guidance=2 --config.sample.guide=gs://no-bucket/x",
            ["gs://no-bucket/x", "gcsfuse"],
        ),
        ("--mode=sample --seeds=x", ["--seeds=x", "0-63,100"]),
        ("--mode=sample --out=LICENSE", ["LICENSE", "--out"]),
        ("--mode=sample --config.sample.class_label=10", ["sample.class_label is 10", "0 to 9"]),
    ],
)
def test_what_does_not_fit_the_run(run, trained, arguments, named):
    assert_refused(run("--config=configs/smoke.py", f"--workdir={trained[0]}", *arguments.split()), *named)


def test_a_config_that_is_broken(run, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    assert_refused(run(f"--config={tmp_path / 'broken.py'}"), "broken.py")
    lines = (
        "from configs import smoke",
        "def get_config():",
        " c = smoke.get_config()",
        " del c.train.decay",
        " return c",
    )
    (tmp_path / "short.py").write_text("\n".join(lines))
    assert_refused(
        run(f"--config={tmp_path / 'short.py'}", f"--workdir={tmp_path / 'run'}"),
        "the config has no train.decay; add it",
    )


def test_wrong_input_of_a_real_process(environment, tmp_path):
    """Eight devices, and an empty cache that stays empty: nothing was compiled."""
    environment = {
        **environment,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    }
    status, out, err = finish(launch(environment, tmp_path / "run", "--config.train.batch_size=20"))
    assert (status, out) == (2, "")
    assert err == (
        "error: train.batch_size 20 does not divide over 8 device(s) × 1 accumulation step(s) = 8; use 16 or 24\n"
    )
    assert not list((tmp_path / "cache").glob("*"))


def test_failing_while_it_runs_is_one_line_too(run, tmp_path, monkeypatch):
    def fail(run, **hooks):
        raise FloatingPointError("the loss has not been finite\nfor 5 steps")

    monkeypatch.setattr("warm_jax.training.train.train", fail)
    status, err, _ = run("--config=configs/smoke.py", f"--workdir={tmp_path}")
    assert (status, err) == (1, "error: the loss has not been finite for 5 steps\n")


def test_default_workdir():
    names = ("configs/cifar10.py", "configs/cifar10.py:warm", "/some/where/cifar10.py:hot")
    assert [str(flags.default_workdir(name)) for name in names] == ["runs/cifar10", "runs/cifar10", "runs/cifar10_hot"]
