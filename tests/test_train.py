"""The step against EDM's recipe in numpy float64, and the loop: resuming, stopping, logging.

Most tests put a linear network in the U-Net's place (`tiny.py`): what they are about does not depend on the network,
and its gradients can be written down.
"""

import json
import resource
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import tiny

from warm_jax.data import idx
from warm_jax.diffusion import loss
from warm_jax.experiments import experiment
from warm_jax.runtime import checkpoint, mesh
from warm_jax.training import progress, step, train

pytestmark = pytest.mark.usefixtures("quick_compile")
SMALL_UNET = {"model__channel_mult": (1,), "model__patch_size": 14}


def batch(k, size=16):
    rng = np.random.RandomState(k)
    return rng.randint(0, 256, (size, 28, 28, 1)).astype(np.uint8), rng.randint(0, 10, size).astype(np.int32)


def run_steps(exp, count, state=None, compiled=None):
    """The state, totals and losses after `count` steps on noise images."""
    compiled = compiled or step.compile_step(exp)
    state = state or step.init_state(exp)
    totals = jax.device_put(step.zero_totals(), mesh.replicated(exp.mesh))
    values = []
    for k in range(count):
        state, totals, value = compiled(state, totals, *batch(k, exp.config.train.batch_size))
        values.append(float(value))
    return jax.device_get(state), jax.device_get(totals), values


def start(exp, **parts):
    """The initial state with some of it replaced, on the experiment's mesh."""
    return jax.device_put(step.init_state(exp)._replace(**parts), mesh.replicated(exp.mesh))


def state_of(exp, params):
    """The state of step 0 with these parameters, in numpy."""
    state = step.State(np.int32(0), params, params, step.optimizer(exp.config).init(params), np.int32(0))
    return jax.tree.map(np.asarray, state)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


# ── The step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def example(monkeypatch):
    """Fixes what a step draws, to images blurred by scipy."""
    rng = np.random.RandomState(0)
    t = np.geomspace(0.01, 5, 16)
    x0 = rng.uniform(-1, 1, (16, 28, 28, 1))
    lam = np.pi**2 * ((np.arange(28) / 28)[:, None] ** 2 + (np.arange(28) / 28) ** 2)[..., None]
    a = np.exp(-((0.5 * t[:, None, None, None]) ** 2) * lam / 2)
    blurred = scipy.fft.idctn(a * scipy.fft.dctn(x0, axes=(1, 2), norm="ortho"), axes=(1, 2), norm="ortho")
    x = blurred + t[:, None, None, None] * rng.normal(size=x0.shape)
    drawn = loss.Example(*(np.float32(part) for part in (x, t, blurred, x0 - blurred)))
    monkeypatch.setattr(loss, "draw", lambda process, key, x0: jax.tree.map(jnp.asarray, drawn))
    return drawn


def edm_step(p, example, labels, residual_weight):
    """Loss, its parts by image, and gradients of the linear network, in float64 (Karras et al. 2022, table 1)."""
    x, t, blurred, residual = (np.float64(part) for part in example[:4])
    s = t[:, None, None, None]
    c_skip, c_out, c_in = 0.25 / (s**2 + 0.25), s * 0.5 / np.sqrt(s**2 + 0.25), 1 / np.sqrt(s**2 + 0.25)
    weight = (s**2 + 0.25) / (s * 0.5) ** 2
    level, blur, one_hot = np.log(s) / 4, np.log(1 + 0.5 * s / 0.01) / 4, np.eye(10)[labels]
    raw = p["gain"] * c_in * x + p["level"] * level + p["blur"] * blur + (one_hot @ p["class"])[:, None, None]
    error = np.concatenate([c_skip * x + c_out * raw[..., :1] - blurred, c_out * raw[..., 1:] - residual], -1)
    heads = np.array([1, residual_weight])
    parts = (weight * error**2).sum((1, 2))
    outer = 2 * weight * c_out * error * heads / len(x)  # d loss / d raw
    gradients = {
        "gain": (outer * c_in * x).sum(0),
        "level": (outer * level).sum((0, 1, 2)),
        "blur": (outer * blur).sum((0, 1, 2)),
        "class": one_hot.T @ outer.sum((1, 2)),
    }
    return (parts * heads).sum(-1).mean(), parts, gradients


def test_step_is_the_recipe_in_numpy(example):
    """Learning rate, Adam and EMA as the EDM paper's appendix F and Kingma & Ba (2015) say, for six steps."""
    changes = {"train__decay": "none", "train__residual_weight": 0.7, "train__warmup_images": 48}
    changes |= {"train__learning_rate": 2e-3, "train__ema_rampup_ratio": 1.0}
    exp = tiny.build(train__ema_halflife_images=40.0, **changes)
    state = step.init_state(exp)
    p = jax.tree.map(np.float64, jax.device_get(state.params))
    ema, m, v = p, jax.tree.map(np.zeros_like, p), jax.tree.map(np.zeros_like, p)
    expected = []
    for k in range(6):
        value, _, g = edm_step(p, example, batch(k)[1], 0.7)
        expected.append(value)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        rate = 2e-3 * min(k * 16 / 48, 1)  # the first step learns nothing
        correct = 1 - 0.9 ** (k + 1), 1 - 0.999 ** (k + 1)
        p = jax.tree.map(lambda p, m, v, r=rate, c=correct: p - r * (m / c[0]) / (np.sqrt(v / c[1]) + 1e-8), p, m, v)
        beta = 0.5 ** (16 / max(min(40.0, k * 16), 1e-8))
        ema = jax.tree.map(lambda e, p, b=beta: b * e + (1 - b) * p, ema, p)
    state, _, values = run_steps(exp, 6, state)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert_close(state.params, p, rtol=1e-4, atol=1e-6)
    assert_close(state.ema, ema, rtol=1e-4, atol=1e-6)
    moved = np.abs(p["gain"] - jax.device_get(step.init_state(exp).params)["gain"]).max()
    assert moved > 5e-3 and int(state.step) == 6 and int(state.nonfinite) == 0


def test_ema_lags_once_many_images_were_seen():
    # β = 0.5^(16 / min(64, 0.05 · 16000)) = 0.5^(1/4), and step 1000 has its full learning rate.
    exp = tiny.build(train__decay="none")
    before = start(exp, step=jnp.asarray(1000, jnp.int32))
    old = jax.device_get(before.params)
    state, _, _ = run_steps(exp, 1, before)
    assert_close(
        state.ema, jax.tree.map(lambda o, n: o * 0.5**0.25 + n * (1 - 0.5**0.25), old, state.params), rtol=1e-5
    )


def test_learning_rate():
    rate = step.learning_rate(tiny.config(train__warmup_images=160, train__decay="none", train__learning_rate=0.5))
    np.testing.assert_allclose([rate(k) for k in (0, 1, 5, 10, 11, 10**6)], [0, 0.05, 0.25, 0.5, 0.5, 0.5])
    rate = step.learning_rate(tiny.config(train__warmup_images=0, train__steps=20, train__learning_rate=0.5))
    np.testing.assert_allclose(
        [rate(k) for k in (0, 5, 10, 20, 30)], [0.5, 0.25 + 0.25 * 0.5**0.5, 0.25, 0, 0], atol=1e-7
    )


def test_noise_bins_add_up_to_the_loss(example):
    exp = tiny.build()
    p = jax.tree.map(np.float64, jax.device_get(step.init_state(exp).params))
    value, parts, _ = edm_step(p, example, batch(0)[1], 1.0)
    _, totals, values = run_steps(exp, 1)
    np.testing.assert_allclose(values, [value], rtol=1e-5)
    edges = [0, 0.05, 0.1, 0.2, 0.5, 1, 2, np.inf]
    np.testing.assert_array_equal(totals.images, np.histogram(example.t, edges)[0])
    for head, total in enumerate((totals.blurred, totals.residual)):
        by_bin = np.histogram(example.t, edges, weights=parts[:, head] / 784)[0]
        np.testing.assert_allclose(total, by_bin, rtol=1e-4)
    row = progress.scalars(totals)
    np.testing.assert_allclose((row["loss/blurred"] + row["loss/residual"]) * 784, value, rtol=1e-5)
    np.testing.assert_allclose(row["loss_blurred/noise_2-inf"], parts[example.t > 2, 0].mean() / 784, rtol=1e-4)


def test_one_device_is_eight():
    """A U-Net with dropout: the same noise and masks, sums in another order."""
    changes = {"model__dropout": 0.1, "data__label_dropout": 0.2, "train__warmup_images": 0, "train__eps": 1.0}
    changes |= SMALL_UNET  # and an ε that keeps Adam from blowing up the rounding of gradients that are zero
    exp = experiment.build(tiny.config(**changes))
    shapes = jax.eval_shape(exp.model.init, jax.random.key(0))
    params = tiny.randomised(jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), shapes), np.random.default_rng(0))
    states, values_of = [], []
    for devices in (1, 8):
        state, _, values = run_steps(tiny.on_devices(exp, devices), 4, state_of(exp, params))
        states.append(state)
        values_of.append(values)
    np.testing.assert_allclose(*values_of, rtol=1e-5)
    assert_close(states[0].params, states[1].params, rtol=1e-5, atol=1e-5)
    assert_close(states[0].ema, states[1].ema, rtol=1e-5, atol=1e-5)
    away = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (states[0].params, params)), strict=True)]
    assert np.median(away) > 1e-3


def test_accumulation_changes_nothing():
    results = [run_steps(tiny.build(devices=2, train__accumulation=parts), 3) for parts in (1, 4)]
    np.testing.assert_allclose(results[0][2], results[1][2], rtol=1e-5)
    assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    assert_close(results[0][0].params, results[1][0].params, rtol=1e-5, atol=1e-6)


def given_gradient(value):
    """A function of a parameter that is zero, and whose gradient is said to be `value`."""
    f = jax.custom_vjp(lambda p: jnp.zeros(()))
    f.defvjp(lambda p: (jnp.zeros(()), p), lambda p, _: (jnp.full_like(p, value),))
    return f


class Poisoned(nn.Module):
    """The linear network, with parameters that have bad gradients."""

    @nn.compact
    def __call__(self, x, *conditions, class_labels=None, augment_labels=None, train=False):
        raw = tiny.Linear()(x, *conditions, class_labels=class_labels)
        for name, value in {"nan": np.nan, "plus": np.inf, "minus": -np.inf}.items():
            raw = raw + given_gradient(value)(self.param(name, nn.initializers.zeros, (2,)))
        return raw


def test_gradients_that_are_not_finite():
    """NaN → 0 and ±inf → ±1e5: Adam's first moment after one step is a tenth of the gradient."""
    state, _, values = run_steps(tiny.build(Poisoned()), 1)
    first = state.optimizer[0].mu
    np.testing.assert_array_equal(first["nan"], 0)
    np.testing.assert_allclose([first["plus"], first["minus"]], [[1e4, 1e4], [-1e4, -1e4]], rtol=1e-6)
    assert np.isfinite(values).all() and np.abs(first["Linear_0"]["gain"]).max() > 0
    assert int(state.nonfinite) == 0


def test_randomness_is_a_function_of_seed_and_step():
    exp = tiny.build()
    compiled = step.compile_step(exp)

    def loss_at(step, compiled=compiled):
        return run_steps(exp, 1, start(exp, step=jnp.asarray(step, jnp.int32)), compiled)[2][0]

    assert loss_at(3) == loss_at(3) and loss_at(3) != loss_at(4)
    assert loss_at(3) != loss_at(3, step.compile_step(tiny.build(seed=1)))


def test_state_is_donated_and_born_on_its_sharding():
    exp = tiny.build()
    state = step.init_state(exp)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(step.abstract_state(exp)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)
        assert len(leaf.sharding.device_set) == 8
    totals = jax.device_put(step.zero_totals(), mesh.replicated(exp.mesh))
    after, _, _ = step.compile_step(exp)(state, totals, *batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema, state.optimizer, totals)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_bfloat16_is_for_convolutions_and_attention_only():
    """In the program of the step: parameters and results are float32, and each convolution computes in bfloat16."""
    exp = experiment.build(tiny.config(model__dtype="bfloat16", **SMALL_UNET))
    state = step.abstract_state(exp)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves((state.params, state.ema, state.optimizer[0].mu)))
    images, labels = batch(0)
    text = jax.jit(step.make_step(exp)).lower(state, step.zero_totals(), images, labels).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all("bf16" in line.split("->")[-1] for line in convolutions)


@pytest.mark.slow
def test_bfloat16_stays_finite():
    exp = experiment.build(tiny.config(model__dtype="bfloat16", **SMALL_UNET))
    state, _, values = run_steps(exp, 5)
    assert np.isfinite(values).all()
    assert all(np.isfinite(p).all() and p.dtype == np.float32 for p in jax.tree.leaves((state.params, state.ema)))


# ── The loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tiny_run(workdir, network=None, **changes):
    changes = {"train__decay": "none", "train__sample_every": 0} | changes
    return tiny.with_network(train.prepare(tiny.config(**changes), workdir), network or tiny.Linear())


def stored(run, number):
    """All of a stored checkpoint."""
    abstract = step.abstract_state(run.experiment)
    items = checkpoint.Checkpoints(run.workdir / "checkpoints", writable=False).restore(
        number, **step.to_store(abstract)
    )
    return jax.device_get(items)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Traced(nn.Module):
    """The linear network; notes each time it is traced, and whether for training."""

    traces = []  # noqa: RUF012

    @nn.compact
    def __call__(self, *args, train=False, **labels):
        Traced.traces.append(train)
        return tiny.Linear()(*args, **labels)


def test_ten_steps_are_five_restored_and_five(tmp_path, capsys):
    """Bitwise; and one trace is enough for any number of steps."""
    runs, traces = {}, []
    for name, steps in (("whole", 10), ("parts", 5), ("parts", 10)):
        Traced.traces.clear()
        runs[name] = tiny_run(tmp_path / name, Traced(), train__steps=steps, train__checkpoint_every=50)
        assert train.train(runs[name]) == 0
        traces.append(Traced.traces.count(True))
    assert "resuming from the checkpoint of step 5" in capsys.readouterr().out
    assert traces == [1, 1, 1]
    assert_same(stored(runs["whole"], 10), stored(runs["parts"], 10))
    whole, parts = (next(row for row in rows(run.workdir) if row["step"] == 10) for run in runs.values())
    timed = dict.fromkeys(("images_per_second", "images_per_second_per_device"), 0)
    assert whole | timed == parts | timed


def test_metrics_have_each_step_once(tmp_path):
    """A run killed after step 10 was logged but before it was saved: its rows come again, and are not doubled."""
    settings = {"train__steps": 10, "train__log_every": 2, "train__checkpoint_every": 5}
    run = tiny_run(tmp_path, **settings)
    train.train(run)
    first = rows(tmp_path)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [10, 5]
    checkpoints.set_aside_after(5)
    checkpoints.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "loss/blu')
    train.train(tiny_run(tmp_path, **settings))
    again = rows(tmp_path)
    assert [row["step"] for row in again] == [2, 4, 6, 8, 10] == [row["step"] for row in first]
    # A row is the mean since the last one, so that of step 6 is of one step only after the resume.
    assert [row["loss/blurred"] for row in again[3:]] == [row["loss/blurred"] for row in first[3:]]
    assert list((tmp_path / "tb").iterdir())


class Clockwork(nn.Module):
    """The linear network until the eighth step, and NaN from then on: a parameter counts the steps."""

    @nn.compact
    def __call__(self, *args, train=False, **labels):
        raw = tiny.Linear()(*args, **labels)
        clock = self.param("clock", nn.initializers.zeros, ())  # Adam moves it by -learning_rate a step
        raw = raw + given_gradient(1.0)(clock)
        return jnp.where(jax.lax.stop_gradient(clock) < -7.5, jnp.nan, raw)


def test_a_loss_that_stays_nonfinite_stops_the_run(tmp_path):
    settings = {"train__learning_rate": 1.0, "train__warmup_images": 0, "train__checkpoint_every": 5}
    run = tiny_run(tmp_path, Clockwork(), train__log_every=1, train__max_nonfinite_steps=3, **settings)
    with pytest.raises(
        FloatingPointError, match=r"not been finite for 3 steps .* at step 11; the checkpoint of step 5"
    ):
        train.train(run)
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == [5]
    kept = stored(run, 5)
    np.testing.assert_allclose(kept["ema"]["clock"], -5, rtol=0.2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))
    assert [row["nonfinite_steps"] for row in rows(tmp_path)] == [0] * 8 + [1] * 3


def test_nothing_is_saved_while_the_loss_is_not_finite(tmp_path):
    """Reports are rarer than checkpoints here: those between the first NaN and the next report must not be saved."""
    settings = {"train__learning_rate": 1.0, "train__warmup_images": 0, "train__checkpoint_every": 3}
    run = tiny_run(tmp_path, Clockwork(), train__log_every=20, train__max_nonfinite_steps=3, **settings)
    with pytest.raises(FloatingPointError, match="checkpoint of step 6"):
        train.train(run)
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == [6, 3]


def test_the_loop_waits_for_no_transfer(tmp_path, monkeypatch):
    """JAX's guard is on around each step: a batch that is still on the host is refused."""
    run = tiny_run(tmp_path, train__steps=3)
    monkeypatch.setattr(train, "_device_batches", lambda run, start: iter([batch(0)]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train.train(run)


def test_a_full_disk_costs_checkpoints_and_not_the_run(tmp_path, monkeypatch, capsys):
    """No room at step 5, and at step 10 it fills up while Orbax writes: a real limit on the size of files."""
    settings = {"train__steps": 15, "train__checkpoint_every": 5, "train__log_every": 15, "train__keep_last": 3}
    run = tiny_run(tmp_path / "run", **settings)
    save, room = checkpoint.Checkpoints.save, shutil.disk_usage(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, number, *args, **options):
        if number == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        save(self, number, *args, **options)

    def wait(self, wait=checkpoint.Checkpoints.wait):
        try:
            wait(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    rooms = iter([room._replace(free=10_000)])
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: next(rooms, room))
    monkeypatch.setattr(checkpoint.Checkpoints, "save", limited)
    monkeypatch.setattr(checkpoint.Checkpoints, "wait", wait)
    assert train.train(run, final_grid=False) == 0
    said = capsys.readouterr().err
    assert (
        "WARNING: step 5: a checkpoint was not saved in" in said and "it takes 0.02 MiB, and 0.01 MiB are free" in said
    )
    assert "WARNING: step 15: a checkpoint could not be saved in" in said and "Training goes on" in said
    assert (
        saved_steps(tmp_path / "run") == [15] == [int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()]
    )
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: room._replace(free=0))
    more = tiny_run(tmp_path / "run", **settings | {"train__steps": 16})
    with pytest.raises(
        OSError, match=r"a checkpoint was not saved in .* 0.00 MiB are free"
    ):  # the last one must not fail
        train.train(more, final_grid=False)
    assert saved_steps(tmp_path / "run") == [15]


def saved_steps(workdir):
    return checkpoint.Checkpoints(workdir / "checkpoints", writable=False).steps()


def test_measured_spectrum_is_stored_and_used_again(tmp_path):
    changes = {"process__schedule": "information_budget", "model__preconditioning": "spectral"}
    first = tiny_run(tmp_path, train__steps=5, **changes)
    assert train.train(first) == 0
    with np.load(tmp_path / "measured.npz") as file:
        power = file["power"]
    images = np.float32(idx.bundled().images[..., 0]) / 127.5 - 1
    expected = np.mean(scipy.fft.dctn(images, axes=(1, 2), norm="ortho") ** 2, 0)
    np.testing.assert_allclose(power, expected, rtol=1e-3)
    np.savez(tmp_path / "measured.npz", power=power * 4)  # resuming must go on with what the run began with
    resumed = tiny_run(tmp_path, train__steps=8, **changes)
    t = jnp.asarray([0.3, 1.0])
    one, other = (
        [run.experiment.process.blur(t), run.experiment.model.preconditioning.weight(t)] for run in (first, resumed)
    )
    assert np.all(one[0] != other[0]) and np.all(one[1] != other[1]) and np.all(one[0] > 0)
    assert train.train(resumed) == 0


def test_a_spectrum_without_a_run_is_measured_anew(tmp_path):
    """What a run left that was cut off before its first checkpoint may be of other images, or half a file."""
    (tmp_path / "measured.npz").write_bytes(b"PK\x03\x04 cut off")
    run = tiny_run(tmp_path, model__preconditioning="spectral")
    with np.load(tmp_path / "measured.npz") as file:
        assert file["power"].shape == (28, 28)
    assert run.experiment.model.preconditioning


def test_hot_learns_too(tmp_path):
    """One head: no residual anywhere, and the loss falls."""
    changes = {"train__steps": 40, "train__log_every": 20, "train__learning_rate": 0.02, "train__sample_every": 0}
    run = tiny.with_network(train.prepare(tiny.config("hot", **changes), tmp_path), tiny.Linear(heads=1))
    assert train.train(run) == 0
    first, last = rows(tmp_path)
    assert last["loss/blurred"] < first["loss/blurred"] and last["loss/residual"] < 1e-9
    assert (tmp_path / "grids" / "00000040.png").exists()
