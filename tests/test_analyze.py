"""From a config to the figures: what is asked for, who joins in, and what is written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import tiny

from warm_jax.analysis import analyze, sweep, trained_models
from warm_jax.data import sources
from warm_jax.evaluation import evaluate, reference
from warm_jax.experiments import experiment
from warm_jax.metrics import moments
from warm_jax.runtime import checkpoint, preemption, workdirs


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    """Every experiment that is built has the stand-in network."""
    monkeypatch.setattr(experiment, "_network", lambda config, shape, around, two: tiny.Linear(heads=around.heads))


def trained(workdir, system="warm", **changes):
    """A workdir with a checkpoint of random weights; its config."""
    config = tiny.config(system, **changes)
    weights = tiny.randomised(tiny.born(experiment.build(config).model), np.random.default_rng(0), 0.02)
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    checkpoints.save(3, {"step": jnp.zeros(())}, weights, wait=True)
    checkpoints.close()
    workdirs.save_config(config, workdir)
    workdirs.save_measured({"power": np.ones((28, 28))}, workdir)
    source = sources.open_source("bundled", image_size=(28, 28), channels=1)
    workdirs.save_data(source, workdir)
    return config


def test_spectra_of_the_data(tmp_path):
    assert analyze.analyze(analyze.prepare(tiny.config(), tmp_path, "spectra", -1)) == 0
    assert (tmp_path / "figures" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    # The spectrum in numpy and scipy: 200 images spread over the set, mean power over rings of rounded radius.
    images = sources.open_source("bundled", image_size=(28, 28), channels=1)
    chosen = np.unique(np.linspace(0, 9999, 200).astype(int))
    x = images.read(chosen)[0][..., 0] / 127.5 - 1
    power = np.mean(scipy.fft.dctn(x, axes=(1, 2), norm="ortho") ** 2, axis=0)
    radius = np.round(np.hypot(*np.meshgrid(np.arange(28), np.arange(28), indexing="ij"))).astype(int)
    with np.load(tmp_path / "figures" / "spectra.npz") as found:
        for k in (1, 5, 27):
            np.testing.assert_allclose(found["power"][found["k"] == k], power[radius == k].mean(), rtol=1e-4)


@pytest.mark.slow
def test_all_figures_of_a_model(tmp_path):
    config = trained(tmp_path, eval__metrics=("lsd",))
    assert analyze.analyze(analyze.prepare(config, tmp_path, "all", -1)) == 0
    made = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert made == {path.stem for path in (tmp_path / "figures").glob("*.npz")}
    assert made == {
        *("spectra", "corruption", "process", "learning", "manifold", "manifold_models"),
        *("sweep_gaussian", "sweep_empirical", "sweep_models", "solvers"),
    }
    assert (tmp_path / "report.html").stat().st_size > 10_000
    with np.load(tmp_path / "figures" / "sweep_models.npz") as found:
        assert str(found["metric"]) == "lsd_db_pixels_20"
        np.testing.assert_array_equal(found["nfe"], [5, 7])  # 2 · steps - 1
        assert found["values"].shape == (1, 2, 2) and np.isfinite(found["values"]).all()
    with np.load(tmp_path / "figures" / "learning.npz") as found:
        np.testing.assert_allclose(found["explained_0.5_alphas"], 0.5 * found["betas"], rtol=1e-6)


def test_a_sweep_of_models_goes_on(tmp_path, monkeypatch):
    """Its finished cells are lines of a file; a signal between two of them ends it; other weights begin anew."""
    config = trained(tmp_path, eval__metrics=("lsd",))
    subject = analyze.prepare(config, tmp_path, "sweep", -1).subject
    measured, kept = [], tmp_path / "sweep.jsonl"

    def score(cell):
        measured.append(cell)
        return 7, {"lsd": cell.bnr + cell.steps + cell.seed}

    against = reference.Reference("r", moments.Moments(np.zeros(1), np.eye(1), 9), moments.Provenance(), *(None,) * 3)
    monkeypatch.setattr(evaluate, "find_reference", lambda run: against)
    monkeypatch.setattr(trained_models, "_measure", lambda *given, **sampled: score)
    monkeypatch.setattr(preemption, "requested", lambda: "SIGTERM" if len(measured) == 3 else "")
    with pytest.raises(InterruptedError, match="SIGTERM"):
        trained_models.score(subject.models, subject.scoring, kept)
    assert len(measured) == 3
    monkeypatch.setattr(preemption, "requested", lambda: "")
    table = trained_models.score(subject.models, subject.scoring, kept)
    assert sorted(measured) == sorted(sweep.cells((0.5,), (3, 4), (0, 1)))  # each once
    np.testing.assert_allclose(table.mean, [[4.0, 5.0]])  # 0.5 + steps + mean of the seeds 0 and 1
    other = {
        bnr: dataclasses.replace(m, weights=jax.tree.map(lambda p: p + 1, m.weights))
        for bnr, m in subject.models.items()
    }
    trained_models.score(other, subject.scoring, kept)
    assert len(measured) == 8


def test_the_scores_of_a_sweep_are_those_of_evaluate(tmp_path):
    """The same images, by another way: drawn by `--mode=sample`'s code, judged by `--mode=evaluate`'s."""
    config = trained(tmp_path, eval__metrics=("lsd",))
    subject = analyze.prepare(config, tmp_path, "sweep", -1).subject
    against = evaluate.find_reference(subject.scoring.judging)
    nfe, scores = trained_models._measure(subject.scoring, against, subject.models)(sweep.Cell(0.5, 4, 1))
    config.eval.first, config.eval.count, config.sample.steps = 20, 20, 4  # smoke's analysis.samples is 20
    assert evaluate.evaluate(evaluate.prepare(config, tmp_path, "", -1, "once", watch=False)) == 0
    row = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert nfe == row["nfe"] == 7
    np.testing.assert_allclose(scores["lsd_db_pixels_20"], row["lsd_db_pixels_20"], rtol=1e-6)


def test_classes_are_drawn_as_the_images_have_them(tmp_path):
    """Independently, so that pairs of states have the same class as often as pairs of images; -1 is told as none."""
    config = trained(tmp_path)
    model = analyze.prepare(config, tmp_path, "manifold", -1).subject.models[0.5]
    told = np.asarray(trained_models.drawn_classes(model, np.array([7, 7, 3, -1]), 500, 0))
    assert told.shape == (500, 10) and set(np.flatnonzero(told.sum(0))) == {3, 7}
    # Half, a quarter, a quarter: four standard deviations of a binomial are at most 45 of 500.
    assert abs(told[:, 7].sum() - 250) < 45 and abs((told.sum(1) == 0).sum() - 125) < 45
    assert not np.array_equal(told, np.asarray(trained_models.drawn_classes(model, np.array([7, 7, 3, -1]), 500, 1)))


def test_who_joins_in(tmp_path):
    base = tiny.config()
    assert analyze.prepare(base, tmp_path / "new", "learning", -1).subject.models == {}
    trained(tmp_path / "hot", "hot")
    trained(tmp_path / "warm", process__bnr=2.0)
    trained(tmp_path / "any", "amortised", process__bnr_min=0.5, process__bnr_max=4.0, process__bnr_zero=0.0)
    base.analysis.models = (str(tmp_path / "hot"), str(tmp_path / "warm"))
    models = analyze.prepare(base, tmp_path / "new", "learning", -1).subject.models
    assert {bnr: model.workdir.name for bnr, model in models.items()} == {0.0: "hot", 2.0: "warm"}
    base.analysis.models, base.analysis.bnrs = (str(tmp_path / "any"),), (0.0, 0.5, 1.0, 10.0)
    models = analyze.prepare(base, tmp_path / "new", "learning", -1).subject.models
    beta = jnp.asarray([2.0])
    assert {bnr: float(model.process.blur(beta)[0]) for bnr, model in models.items()} == {0.5: 1.0, 1.0: 2.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"analysis__bnrs": ()}, "analysis.bnrs is \\(\\); name blur-to-noise ratios from 0 to 10,000, rising"),
        ({"analysis__bnrs": (1.0, 0.5)}, "rising"),
        ({"analysis__bnrs": (-1.0,)}, "analysis.bnrs is \\(-1.0,\\)"),
        ({"analysis__steps": (1,)}, "analysis.steps is \\(1,\\); name numbers of steps from 2"),
        ({"analysis__sweep_steps": (4, 4)}, "analysis.sweep_steps"),
        ({"analysis__solver_nfe": (2,)}, "analysis.solver_nfe is \\(2,\\); name numbers of evaluations from 3"),
        ({"analysis__solver_bnrs": ()}, "analysis.solver_bnrs is"),
        ({"analysis__budget": 1.0}, "analysis.budget is 1.0; it must be from 0.0001 to 0.9999"),
        ({"analysis__image": 10_000}, "analysis.image is 10000; bundled has images 0 to 9999"),
        ({"analysis__repeats": 1}, "analysis.repeats is 1; it must be from 2"),
        ({"analysis__oracle_images": 1}, "analysis.oracle_images is 1"),
        ({"data__source": "zip:nowhere.zip"}, "nowhere.zip"),
    ],
)
def test_refused_settings(tmp_path, changes, named):
    with pytest.raises((ValueError, OSError), match=named):
        analyze.prepare(tiny.config(**changes), tmp_path, "spectra", -1)


def test_what_does_not_join_in(tmp_path, capsys):
    """A checkpoint without a constant BNR is left out, with a line; one on a schedule of the budget can be named."""
    config = trained(tmp_path / "budget", process__schedule="information_budget")
    assert analyze.prepare(config, tmp_path / "budget", "learning", -1).subject.models == {}
    assert "does not join in" in capsys.readouterr().out
    amortised = trained(tmp_path / "any", "amortised", sample__schedule="information_budget")
    assert set(analyze.prepare(amortised, tmp_path / "any", "learning", -1).subject.models) == {0.0, 0.5}
    assert analyze.prepare(amortised, tmp_path / "any", "spectra", -1).subject.models == {}
    amortised.analysis.models = (str(tmp_path / "any"),)
    with pytest.raises(ValueError, match="--checkpoint=3 is of the workdir's own run"):
        analyze.prepare(amortised, tmp_path / "new", "learning", 3)
    hot = trained(tmp_path / "hot", "hot", eval__metrics=("is", "pr"), eval__extractor="fashion_cnn")
    with pytest.raises(ValueError, match="a sweep needs one of fd, fd_infinity, kid"):
        analyze.prepare(hot, tmp_path / "hot", "sweep", -1)
    assert analyze.prepare(hot, tmp_path / "hot", "all", -1).subject.scoring is None


def test_refused_models(tmp_path):
    trained(tmp_path / "hot", "hot")
    trained(tmp_path / "also", "hot")
    trained(tmp_path / "cold", "ddpm")
    config = tiny.config()
    for models, named in (
        (("hot", "also"), "both of BNR 0; name one of them"),
        (("cold",), "cold has no constant BNR"),
        (("nowhere",), "no workdir of a run"),
    ):
        config.analysis.models = tuple(str(tmp_path / name) for name in models)
        with pytest.raises((ValueError, OSError), match=named):
            analyze.prepare(config, tmp_path / "new", "learning", -1)
    with pytest.raises(ValueError, match="--analysis=spectrum: choose one of spectra, corruption"):
        analyze.prepare(config, tmp_path, "spectrum", -1)
    with pytest.raises(FileNotFoundError, match="none"):
        analyze.prepare(config, tmp_path / "none", "report", -1)
    config.analysis.models = ()
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5"):
        analyze.prepare(tiny.config("hot"), tmp_path / "hot", "learning", 5)
