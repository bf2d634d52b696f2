"""Bits a dimension of a run: resumed, compared image by image, and the ODE's density against Gaussian closed forms."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from warm_jax.data import sources
from warm_jax.diffusion import bnr, density, likelihood, oracle, process, systems
from warm_jax.evaluation import adaptive, bits, bits_rows, evaluate
from warm_jax.experiments import experiment
from warm_jax.runtime import jsonl, preemption
from warm_jax.training import train

N = 8
LAM = np.pi**2 * ((np.arange(N) / N)[:, None] ** 2 + (np.arange(N) / N) ** 2)
POWER = 0.2 / (LAM + 0.3)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda: process.warm((N, N, 1), bnr.constant(0.5)), id="warm"),
        pytest.param(lambda: systems.blurring((N, N, 1)), id="blurring"),
    ],
)
def test_the_odes_density_is_that_of_the_linear_flow(made, key):
    """Gaussian data: z_T = z √(V_T / V_low) for each frequency, with V = P a² + s²; the prior is N(0, s²)."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        made = made()
        low, rng = likelihood.lowest(made), np.random.default_rng(0)
        z0 = rng.normal(size=(2, N, N)) * np.sqrt(POWER)
        x0 = jnp.einsum("ki,bkl,lj->bij", *(jnp.asarray(part) for part in (_matrix(), z0, _matrix())))[..., None]
        probe = density.probes(key, jnp.arange(2), 1, (N, N, 1), np.dtype("float64"))
        predict, solve = oracle.gaussian(made, POWER), adaptive.solver(1e-7)
        found = jax.jit(lambda x0, probe: density.log_density(predict, made, solve, x0, probe, low))(x0, probe)
        (a, top), (s, s_top) = (
            [np.asarray(of(jnp.asarray(t))) for t in (low, made.highest)] for of in (made.attenuation, made.noise)
        )
    before, after = POWER * a[..., 0] ** 2 + s**2, POWER * top[..., 0] ** 2 + s_top**2
    z = a[..., 0] * z0 * np.sqrt(after / before)
    expected = -0.5 * np.log(2 * np.pi * s_top**2) - z**2 / (2 * s_top**2) + 0.5 * np.log(after / before)
    expected = (expected + np.log(a[..., 0])).sum((1, 2))
    np.testing.assert_allclose(found.log_density, expected, atol=2e-3)
    data = -0.5 * (np.log(2 * np.pi * POWER) + z0**2 / POWER).sum((1, 2))
    np.testing.assert_allclose(found.log_density / N**2, data / N**2, atol=2e-2)  # what both ends cost
    assert 20 < int(found.evaluations) < 2000


def _matrix():
    k, j = np.arange(N)[:, None], np.arange(N)[None]
    return np.sqrt((2 - (k == 0)) / N) * np.cos(np.pi * (j + 0.5) * k / N)


@pytest.fixture
def runs_of(monkeypatch, tmp_path):
    """Trains two steps with the stand-in network: (name, system, changes) -> config and workdir."""
    build = experiment.build

    def with_stand_in(config, measured=None):
        exp = build(config, measured)
        return tiny.with_network(exp, tiny.Linear(heads=exp.model.preconditioning.heads))

    monkeypatch.setattr(experiment, "build", with_stand_in)

    def made(name, system="warm", **changes):
        settings = {"train__steps": 2, "train__checkpoint_every": 2, "train__sample_every": 0, "likelihood__count": 24}
        settings |= {"eval__metrics": ("bpd",), "likelihood__strata": 4, "likelihood__batch_size": 8}
        config = tiny.config(system, **(settings | changes))
        assert train.train(train.prepare(config, tmp_path / name), final_grid=False) == 0
        return config, tmp_path / name

    return made


def scored(config, workdir, against=""):
    judging = evaluate.prepare(config, workdir, "", -1, "once", watch=False, against=str(against))
    status = evaluate.evaluate(judging)
    return status, jsonl.read(workdir / "results.jsonl")


def test_bits_are_resumed_and_compared_image_by_image(runs_of, monkeypatch, capsys):
    """A signal after the first shard, then the rest: the same number as at once. The difference is of paired images."""
    monkeypatch.setattr(bits, "SHARD", 8)
    config, workdir = runs_of("one")
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", lambda: "SIGTERM" if list(workdir.glob("evaluations/bpd-*/*")) else "")
        status, rows = scored(config, workdir)
    assert status == preemption.EXIT_AGAIN and not rows
    kept = list(workdir.glob("evaluations/bpd-*/*.npz"))
    assert [path.name for path in kept] == ["00000000-8.npz"]
    before = kept[0].stat().st_mtime_ns
    status, rows = scored(config, workdir)
    assert status == 0 and kept[0].stat().st_mtime_ns == before
    row, shards = rows[0], sorted(workdir.glob("evaluations/bpd-*/*.npz"))
    assert len(shards) == 3 and row["split"] == "training images" and row["bpd_count"] == 24
    nats = np.concatenate([np.load(path)["nats"] for path in shards])
    assert row["bpd"] == pytest.approx(nats.mean() / (784 * np.log(2)))
    parts = sum(row["bpd_by_level"]) + row["bpd_prior"] + row["bpd_last"]
    assert parts == pytest.approx(row["bpd"], abs=1e-4)
    for path in shards:
        path.unlink()
    again = scored(config, workdir)[1][-1]
    assert again["bpd"] == row["bpd"]  # at once

    other, folder = runs_of("other", seed=1, likelihood__seed=0)
    paired = scored(other, folder, workdir)[1][-1]
    (own,) = {path.parent for path in folder.glob("evaluations/bpd-*/*") if not _same(path, nats)}
    mine = np.concatenate([np.load(path)["nats"] for path in sorted(own.glob("*.npz"))])
    less = (mine - nats) / (784 * np.log(2))
    assert paired["bpd_difference"] == pytest.approx(less.mean(), rel=1e-5)
    assert paired["bpd_difference_std"] == pytest.approx(less.std(ddof=1) / np.sqrt(24), rel=1e-5)
    assert "image by image: bpd " in capsys.readouterr().out
    json.dumps(paired)


def _same(path, nats):
    first = int(path.name.partition("-")[0])
    return np.allclose(np.load(path)["nats"], nats[first : first + 8])


def test_what_cannot_be_measured_is_refused_before_anything_is_read(runs_of, tmp_path):
    for system, reason in (("cold", "adds no noise"), ("ihdm", "kernel density"), ("pfgmpp", "Gaussian noise")):
        with pytest.raises(ValueError, match=reason):
            bits.check(tiny.config(system, eval__metrics=("bpd",)))
    for changes, reason in (
        ({"likelihood__strata": 2}, "likelihood.strata is 2; it must be from 3 to 4096"),
        ({"likelihood__count": 1}, "likelihood.count is 1; it must be from 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            bits.check(tiny.config(eval__metrics=("bpd",), **changes))
    fd = tiny.config(eval__metrics=("fd",))
    with pytest.raises(ValueError, match=r"--against=x compares bits a dimension; ask for them: --config.eval.metrics"):
        evaluate.prepare(fd, tmp_path, "", -1, "once", watch=False, against="x")
    with pytest.raises(ValueError, match="is of a model"):
        evaluate.prepare(tiny.config(eval__metrics=("bpd",)), tmp_path, "bundled", -1, "once", watch=False)


def test_test_splits_are_found(tmp_path):
    (tmp_path / "data_batch_1.bin").touch()
    assert sources.test_split("cifar10:a.tar.gz") == "cifar10:a.tar.gz@test"
    assert sources.test_split(str(tmp_path)) == f"cifar10:{tmp_path}@test"
    assert [sources.test_split(spec) for spec in ("bundled", "cifar10:a.tar.gz@test", "zip:a.zip")] == ["", "", ""]
    (tmp_path / "t10k-images-idx3-ubyte.gz").touch()
    assert sources.test_split(f"idx:{tmp_path}") == f"idx:{tmp_path}/t10k-images-idx3-ubyte.gz"


def test_bits_above_a_level_are_those_of_whole_strata():
    found = bits.Measured(
        np.ones(2), np.array([[1.0, 2, 4], [1, 2, 4]]), np.zeros((3, 1)), np.array([0.5, 0.5]), np.zeros(2),
        np.array([0.01, 0.1, 1, 10]), 3,
    )  # fmt: skip
    assert bits_rows.above(found, 0.03)[0] in (0.01, 0.1)
    edge, values = bits_rows.above(found, 0.8)
    assert edge == 1 and list(values) == [4.5, 4.5]
    assert list(bits_rows.above(found, 0.0)[1]) == [7.5, 7.5]
