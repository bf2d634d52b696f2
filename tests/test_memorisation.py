"""Memorisation and guidance figures: what is drawn, compared, refused; copies are found and fresh images are not."""

import jax
import numpy as np
import pytest
import tiny

from warm_jax.analysis import analyze, memorisation, of_samples, score_plots
from warm_jax.data import sources
from warm_jax.experiments import experiment
from warm_jax.runtime import checkpoint, workdirs

pytestmark = pytest.mark.usefixtures("quick_compile")
BUNDLED = {"image_size": (28, 28), "channels": 1}


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    """Every experiment that is built has the stand-in network."""
    monkeypatch.setattr(experiment, "_network", lambda config, shape, around, two: tiny.Linear(heads=around.heads))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """300 of the bundled images, and 60 others."""
    folder = tmp_path_factory.mktemp("images")
    for name, first, count in (("seen", 0, 300), ("others", 300, 60)):
        found, labels = sources.open_source("bundled").read(np.arange(first, first + count))
        np.savez(folder / f"{name}.npz", images=found, labels=labels)
    return folder


def trained(workdir, images, **changes):
    """A workdir with two checkpoints of random weights; its config."""
    config = tiny.config(data__source=f"npz:{images / 'seen.npz'}", eval__metrics=("lsd",), **changes)
    model = experiment.build(config).model
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep_last=2)
    for step in (2, 3):
        weights = tiny.randomised(model.init(jax.random.key(0)), np.random.default_rng(step), 0.02)
        checkpoints.save(step, {"step": np.zeros(())}, weights, wait=True)
    checkpoints.close()
    workdirs.save_config(config, workdir)
    workdirs.save_data(sources.open_source(config.data.source, **BUNDLED), workdir)
    return config


def test_copies_are_found_and_held_out_images_are_not():
    """A Gaussian in 20 dimensions: of 200 samples 100 are training images, moved by a thousandth of their distance."""
    rng = np.random.default_rng(0)
    training, fresh, held_out = (rng.normal(size=(n, 20)) for n in (2000, 100, 200))
    samples = np.concatenate([training[500:600] + 1e-3 * rng.normal(size=(100, 20)), fresh])
    blank = np.zeros((1, 2, 2, 1), np.uint8)
    shown = [np.broadcast_to(blank, (n, 2, 2, 1)) for n in (200, 2000)]
    made = memorisation.compare(*shown, np.arange(2000) * 3, [samples] * 2, [training] * 2, [held_out] * 2)
    assert np.all(made.ratios[:, :100] < 0.01) and np.mean(made.ratios[0, 100:] < 0.5) == 0
    assert set(made.shown[:4]) < set(range(100))
    for number, nearest in zip(made.shown, made.numbers[0, :, 0], strict=True):
        assert number >= 100 or nearest == 3 * (500 + number)
    assert memorisation.verdict(made.ratios[0], made.held_out[0]).endswith("copies")
    assert "no sign of copying" in memorisation.verdict(made.ratios[0, 100:], made.held_out[0])
    assert "100 by half; name analysis.held_out" in memorisation.verdict(made.ratios[0], np.zeros(0))
    assert memorisation.share(np.array([0.5, 1, 2, 0.1])) == (0.5, 0.25)  # √(p (1 - p) / n)
    assert score_plots.memorisation(made).get_axes()


def test_the_figure_of_a_checkpoint(tmp_path, images):
    config = trained(tmp_path, images, analysis__held_out=f"npz:{images / 'others.npz'}")
    assert analyze.analyze(analyze.prepare(config, tmp_path, "memorisation", -1)) == 0
    assert (tmp_path / "figures" / "memorisation.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "figures" / "memorisation.npz") as found:
        assert found["ratios"].shape == (2, 20) and found["held_out"].shape == (2, 20)
        assert found["training_images"] == 300 and found["nearest"].shape == (2, 10, 3, 28, 28, 1)
        source = sources.open_source(config.data.source, **BUNDLED)
        np.testing.assert_array_equal(source.read(found["numbers"][1, 0])[0], found["nearest"][1, 0])
        # The nearest in pixels of the first shown sample, and its ratio, by numpy alone.
        every = source.read(np.arange(300))[0].reshape(300, -1).astype(float)
        apart = np.linalg.norm(every - found["samples"][0].reshape(-1), axis=1)
        nearest = int(apart.argmin())
        next_one = np.sort(np.linalg.norm(every - every[nearest], axis=1))[1]
        assert found["numbers"][1, 0, 0] == nearest
        assert found["ratios"][1, found["shown"][0]] == pytest.approx(apart[nearest] / next_one)


def test_guidance_by_weight_and_interval(tmp_path, images):
    """An earlier checkpoint guides; without guidance the interval means nothing; a second run measures nothing."""
    config = trained(
        tmp_path,
        images,
        sample__guide=str(tmp_path),
        sample__guide_checkpoint=2,
        sample__guidance=2.0,
        sample__solver="euler",
        analysis__guidance_intervals=((), (0.1, 1.0)),
    )
    assert analyze.analyze(analyze.prepare(config, tmp_path, "guidance", -1)) == 0
    with np.load(tmp_path / "figures" / "guidance.npz") as found:
        assert str(found["metric"]) == "lsd_db_pixels_20"
        # Euler's four steps look at 80, 7.5, 0.28 and 0.002: all guided, or one of them.
        np.testing.assert_array_equal(found["nfe"], [[4, 4], [8, 5]])
        assert np.isfinite(found["mean"]).all() and found["mean"][0, 0] == found["mean"][0, 1]
        assert len({*found["mean"].ravel()}) == 3
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 2 + 4
    assert of_samples.guidance(analyze.prepare(config, tmp_path, "guidance", -1).subject.asked).nfe[1, 1] == 5
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("memorisation", {"analysis__held_out": "nowhere/x.zip"}, "nowhere/x.zip is not there"),
        ("memorisation", {"analysis__held_out": "SEEN"}, "the training images; name others"),
        ("memorisation", {"data__source": "bundled"}, "was trained on other images than bundled"),
        ("memorisation", {"analysis__models": ("x",)}, "is of the workdir's own run; leave analysis.models empty"),
        ("guidance", {}, "never saw an image without its class"),
        ("guidance", {"analysis__guidance_weights": (2.0, 1.0)}, "name weights rising"),
        ("guidance", {"analysis__guidance_intervals": ((5, 0.2),), "data__label_dropout": 0.1}, "the lower one first"),
    ],
)
def test_bad_requests_are_named(tmp_path, images, name, changes, message):
    trained(tmp_path, images)
    seen = f"npz:{images / 'seen.npz'}"
    changes = {key: seen if value == "SEEN" else value for key, value in changes.items()}
    config = tiny.config(**({"data__source": seen, "eval__metrics": ("lsd",)} | changes))
    with pytest.raises((ValueError, OSError), match=message):
        analyze.prepare(config, tmp_path, name, -1)


def test_without_a_checkpoint_there_is_nothing_to_remember(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        analyze.prepare(tiny.config(), tmp_path, "memorisation", -1)
