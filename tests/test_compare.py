"""The comparison: which rows there are, that it goes on where it was, and what its table says."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from warm_jax.evaluation import compare
from warm_jax.experiments import experiment
from warm_jax.runtime import preemption


@pytest.fixture
def small(monkeypatch):
    """Systems by name with the stand-in network, which compiles in a second."""
    build = experiment.build

    def with_stand_in(config, measured=None):
        exp = build(config, measured)
        return tiny.with_network(exp, tiny.Linear(heads=exp.model.preconditioning.heads))

    monkeypatch.setattr(experiment, "build", with_stand_in)

    def make(system, **changes):
        settings = {"train__steps": 2, "train__checkpoint_every": 2, "eval__count": 20, "eval__metrics": ("fd", "lsd")}
        settings |= {"compare__systems": ("warm", "ihdm"), "compare__repeated": ("warm",), "train__sample_every": 0}
        return tiny.config(system, **(settings | changes)).lock()

    return make


def test_a_comparison_from_start_to_end(small, tmp_path, monkeypatch, capsys):
    """One seed of ihdm and two of warm; a signal after the first row; then the rest, and what is done is not redone."""
    run = compare.prepare(small, tmp_path)
    assert [(job.system, job.seed) for job in run.jobs] == [("warm", 0), ("ihdm", 0), ("warm", 1)]
    assert [job.config.seed for job in run.jobs] == [0, 0, 1]
    lines = tmp_path / "compare.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", lambda: "SIGTERM" if lines.exists() else "")
        assert compare.compare(run) == preemption.EXIT_AGAIN
    first = lines.read_text()
    assert len(first.splitlines()) == 1 and (tmp_path / "warm-0" / "checkpoints" / "2").exists()
    assert compare.compare(compare.prepare(small, tmp_path)) == 0
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert lines.read_text().startswith(first) and len(rows) == 3
    assert [(row["system"], row["seed"], row["solver"], row["nfe"]) for row in rows] == [
        *(("warm", 0, "heun", 7), ("ihdm", 0, "perturb", 4), ("warm", 1, "heun", 7)),
    ]
    warm = [row["fd_fashion_cnn_20"] for row in rows if row["system"] == "warm"]
    cells = (tmp_path / "compare.md").read_text().splitlines()[2].split(" | ")
    assert cells[:4] == ["| warm", "heun", "7", "2"]
    mean, spread = cells[4].split(" ± ")
    assert float(spread) == pytest.approx(abs(warm[0] - warm[1]) / np.sqrt(2), rel=0.05)  # std of two, n - 1
    assert float(mean) == pytest.approx(sum(warm) / 2, abs=0.06 * float(spread))
    assert "ihdm, Heun: " in (tmp_path / "compare.md").read_text()
    width, height = Image.open(tmp_path / "compare.png").size
    assert width > 10 * 58 and height == 19 + 2 * 62  # the headings, and a row for each system
    capsys.readouterr()
    assert compare.compare(compare.prepare(small, tmp_path)) == 0
    assert "── " not in capsys.readouterr().out and len(lines.read_text().splitlines()) == 3
    with pytest.raises(ValueError, match=r"warm-0: train.learning_rate was 0.003 and is now 0.5"):
        compare.prepare(lambda system: small(system, train__learning_rate=0.5), tmp_path)  # its weights are others
    more = compare.prepare(lambda system: small(system, compare__steps=3, eval__count=30), tmp_path)
    assert compare.table(more) == "nothing is finished yet"  # rows of other settings do not count


def test_a_system_that_cannot_run_is_known_before_the_first_is_trained(small, tmp_path):
    with pytest.raises(ValueError, match="there is no system 'lukewarm'; choose one of warm"):
        compare.prepare(lambda system: small(system, compare__systems=("warm", "lukewarm")), tmp_path)
    with pytest.raises(ValueError, match=r"compare.shown is 0; it must be at least 1"):
        compare.prepare(lambda system: small(system, compare__shown=0), tmp_path)
    for changes, message in (
        ({"compare__systems": ("warm", "warm")}, "name each system once"),
        ({"eval__metrics": ("beauty",)}, "warm: eval.metrics is"),
        ({"sample__class_label": 99}, "warm: sample.class_label is 99"),
        ({"sample__guidance": 2.0}, "warm: sample.guidance is 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.prepare(lambda system, changes=changes: small(system, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_heun_on_more_steps_than_a_system_has_is_left_out_with_the_reason(small, tmp_path):
    run = compare.prepare(lambda system: small(system, compare__systems=("cold",), compare__steps=400), tmp_path)
    assert run.jobs[0].samplings == (("euler", 4),) and "300 levels" in run.refusals["cold"]


def test_bits_alone_are_compared_without_samples_and_a_recorded_row_is_not_made_again(small, tmp_path):
    """The record has the row with its config; a comparison elsewhere reads it and trains nothing."""

    def make(system):
        bits = {"eval__metrics": ("bpd",), "likelihood__count": 8, "likelihood__strata": 3}
        named = {
            "compare__systems": ("hot", "warm"),
            "compare__repeated": (),
            "compare__record": str(tmp_path / "kept"),
        }
        return small(system, **bits, **named, likelihood__batch_size=8)

    assert compare.compare(compare.prepare(make, tmp_path / "one")) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "kept" / "hot.jsonl").read_text().splitlines()]
    assert row["scores"] == ["bpd", "bpd_std", "bpd_above", "bpd_above_std"] and row["bpd_count"] == 8
    assert row["config"]["process"]["system"] == "hot" and row["config"]["train"]["steps"] == 2
    table = (tmp_path / "one" / "compare.md").read_text()
    assert table.splitlines()[0].startswith("| system | solver | NFE | seeds | bpd | bpd_above |")
    assert not (tmp_path / "one" / "shown").exists() and not list((tmp_path / "one").glob("*/samples"))
    assert compare.compare(compare.prepare(make, tmp_path / "two")) == 0
    assert not list((tmp_path / "two").glob("*/checkpoints"))
    assert (tmp_path / "two" / "compare.md").read_text() == table
