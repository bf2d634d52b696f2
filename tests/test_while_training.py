"""Scores and the report of a training: the same bits as without them, compiled once, and what a failure leaves."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from warm_jax.analysis import report
from warm_jax.evaluation import named_scores, reference, while_training
from warm_jax.metrics import fashion
from warm_jax.runtime import checkpoint, mesh
from warm_jax.sampling import batches
from warm_jax.training import step, train

pytestmark = pytest.mark.usefixtures("quick_compile")
SCORED = {"train__evaluate_every": 2, "train__evaluate_count": 16, "train__steps": 5, "train__sample_every": 0}


def made(workdir, **changes):
    run = train.prepare(tiny.config(**(SCORED | changes)), workdir)
    return tiny.with_network(run, tiny.Linear())


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final(run):
    """All arrays of the last checkpoint, as bytes."""
    shapes = step.to_store(step.abstract_state(run.experiment))
    found = checkpoint.Checkpoints(run.workdir / "checkpoints", writable=False).restore_latest(**shapes)
    return found[0], [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found[1])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training that is scored at steps 2 and 4, how often its parts were traced, and one that is not scored."""
    place = tmp_path_factory.mktemp("scored")
    run, traced = made(place / "scored"), {"sampler": 0, "features": 0}
    with pytest.MonkeyPatch.context() as patch:
        real_draw, real_load = batches.Sampler.draw, fashion.load

        def draw(self, *arguments):
            traced["sampler"] += 1
            return real_draw(self, *arguments)

        def load():
            found = real_load()

            def apply(params, images):
                traced["features"] += 1
                return found.apply(params, images)

            return dataclasses.replace(found, apply=apply)

        patch.setattr(batches.Sampler, "draw", draw)
        patch.setattr(fashion, "load", load)
        score = while_training.prepare(run)
        traced["features"] = 0  # shapes were asked for
        assert train.train(run, final_grid=False, score=score, at_end=report.write) == 0
    other = made(place / "other", train__evaluate_every=0)
    assert while_training.prepare(other) is None
    assert train.train(other, final_grid=False) == 0
    return run, other, traced


def test_the_training_is_the_same_bits(trained):
    run, other, _ = trained
    assert final(run) == final(other)
    losses = [[row for row in rows(r.workdir) if "loss/blurred" in row] for r in (run, other)]
    assert [r["loss/blurred"] for r in losses[0]] == [r["loss/blurred"] for r in losses[1]]


def test_it_is_scored_when_asked_and_compiled_once(trained):
    run, _, traced = trained
    scored = [row for row in rows(run.workdir) if any(key.startswith("score/") for key in row)]
    assert [row["step"] for row in scored] == [2, 4]
    assert list(scored[0]) == ["step", "score/fd_fashion_cnn_16", "score/lsd_db_pixels_16"]
    assert traced == {"sampler": 1, "features": 1}


def test_the_score_is_that_of_the_images(trained):
    """Of the weights of step 5: the same images drawn anew and scored by the functions of --mode=evaluate."""
    run, *_ = trained
    score = while_training.prepare(run)
    shapes = step.to_store(step.abstract_state(run.experiment))
    ema = checkpoint.Checkpoints(run.workdir / "checkpoints", writable=False).restore_latest(**shapes)[1]["ema"]
    found = score(5, ema)
    images = batches.Sampler(run.experiment, 16)(ema, np.arange(16), np.full(16, -1)).images
    config = run.experiment.config
    against = reference.measure(config, run.source, reference.load_extractor(config))
    assert found == pytest.approx(named_scores.score_images(score._run, against, iter([images])))


def test_the_report_is_there_with_the_environment_of_the_training(trained):
    run, other, _ = trained
    page = (run.workdir / "report.html").read_text()
    assert "Scores while training" in page and "Of the training." in page and "trained from step" in page
    assert not (other.workdir / "report.html").exists()
    about = json.loads((other.workdir / "environment.json").read_text())
    assert about["jax"] == jax.__version__ and about["trained from step"] == "0"
    (other.workdir / "environment.json").write_text(json.dumps(about | {"jax": "0.0.7"}))
    assert "0.0.7" in report.write(other.workdir).read_text()


def test_a_score_or_a_report_that_fails_ends_no_run(tmp_path, capsys):
    run = made(tmp_path, train__steps=2)
    score = while_training.prepare(run)
    weights = jax.tree.map(lambda x: x * np.nan, step.init_state(run.experiment).ema)
    assert score(2, jax.device_put(weights, mesh.replicated(run.experiment.mesh))) == {}
    assert "step 2: not scored (" in capsys.readouterr().err

    def full(workdir):
        raise OSError("No space left on device")

    assert train.train(run, final_grid=False, at_end=full) == 0
    assert "no report was written (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__extractor": "vgg"}, r"train\.evaluate_every is 2, of 16 images: eval\.extractor is 'vgg'"),
        ({"eval__metrics": ("fd_infinity",)}, r"of 16 images: eval\.count is 16; it must be at least 20"),
        ({"eval__reference": "elsewhere.npz"}, r"elsewhere\.npz is not there; make it with --mode=stats"),
        ({"train__evaluate_count": 1}, r"train\.evaluate_count is 1; it must be from 2"),
        ({"train__evaluate_every": -1}, r"train\.evaluate_every is -1; it must be from 0"),
    ],
)
def test_bad_input_before_anything_is_compiled(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        while_training.prepare(made(tmp_path, **changes))
