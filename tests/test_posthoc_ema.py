"""Averages in a real training: equal to sums over its parameters of every step, stored, resumed, and used."""

import dataclasses
import functools
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
import tiny

from warm_jax import api
from warm_jax.analysis import analyze
from warm_jax.convert import bundle, export
from warm_jax.data import sources
from warm_jax.diffusion import ema
from warm_jax.evaluation import evaluate
from warm_jax.experiments import experiment, posthoc_ema
from warm_jax.runtime import checkpoint, workdirs
from warm_jax.sampling import generate, runs
from warm_jax.training import step, train

pytestmark = pytest.mark.usefixtures("quick_compile")
STEPS, LENGTHS = 14, (0.05, 0.1)
SETTINGS = {
    **{"train__decay": "none", "train__sample_every": 0, "train__warmup_images": 0, "train__learning_rate": 0.02},
    **{"train__posthoc_ema": LENGTHS, "train__posthoc_every": 2, "train__keep_last": 99, "train__log_every": 14},
}


def run(workdir, steps=STEPS, **changes):
    changes = SETTINGS | {"train__steps": steps} | changes
    made = tiny.with_network(train.prepare(tiny.config(**changes), workdir), tiny.Linear())
    assert train.train(made, final_grid=False) == 0
    return made


def restored(workdir, number, *names, folder="checkpoints"):
    abstract = step.to_store(step.abstract_state(tiny.build(devices=1, train__posthoc_ema=LENGTHS)))
    reader = checkpoint.Checkpoints(workdir / folder, writable=False)
    return jax.device_get(reader.restore(number, **{name: abstract[name] for name in names}))


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a training of 14 steps, with a checkpoint of each."""
    with pytest.MonkeyPatch.context() as patch:  # as quick_compile, which is of one test
        quick = functools.partialmethod(jax.stages.Lowered.compile, {"xla_backend_optimization_level": 0})
        patch.setattr(jax.stages.Lowered, "compile", quick)
        workdir = tmp_path_factory.mktemp("runs") / "whole"
        run(workdir, train__checkpoint_every=1)
    return workdir


@pytest.fixture(scope="module")
def parameters(whole):
    """The parameters after each step, from 1, in float64."""
    found = [restored(whole, number, "train")["train"]["params"] for number in range(1, STEPS + 1)]
    return jax.tree.map(lambda *each: np.stack(each).astype(np.float64), *found)


def direct(parameters, sigma_rel, t):
    """The average by its definition: each step's parameters by the integral of the profile over it."""
    share = np.diff((np.arange(t + 1) / t) ** (ema.gamma(sigma_rel) + 1))
    return jax.tree.map(lambda p: np.tensordot(share, p[:t], 1), parameters)


def assert_close(found, expected, tolerance=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


def remake(workdir, number, sigma_rel):
    shapes = jax.eval_shape(tiny.build(devices=1).model.init, jax.random.key(0))
    return posthoc_ema.reconstruct(workdir, posthoc_ema.plan(workdir, number, sigma_rel), shapes)


def test_averages_of_a_real_training(whole, parameters):
    moved = parameters["gain"][-1] - parameters["gain"][0]
    assert np.abs(moved).max() > 0.1
    assert steps_in(whole / "posthoc") == list(range(2, STEPS + 1, 2))
    for number, folder in ((1, "checkpoints"), (7, "checkpoints"), (6, "posthoc"), (14, "posthoc")):
        averages = restored(whole, number, "averages", folder=folder)["averages"]
        for sigma_rel, found in zip(LENGTHS, averages, strict=True):
            assert_close(found, direct(parameters, sigma_rel, number))


@pytest.mark.parametrize("number", [14, 11])  # 11 has no snapshot: the checkpoint has the averages of its own step
def test_the_ema_of_any_length(whole, parameters, number):
    """A tracked length to rounding; others as near as their profile's error allows, and nearer than the tracked."""
    for sigma_rel in LENGTHS:
        assert_close(remake(whole, number, sigma_rel), direct(parameters, sigma_rel, number))
    for sigma_rel in (0.07, 0.08, 0.15):
        found, expected = remake(whole, number, sigma_rel), direct(parameters, sigma_rel, number)
        gamma = ema.gamma(sigma_rel)
        # ‖profile‖ = (γ + 1) / √(t (2γ + 1)), and Cauchy and Schwarz.
        bound = posthoc_ema.plan(whole, number, sigma_rel).fit.error * (gamma + 1) / np.sqrt(number * (2 * gamma + 1))
        for name, value in expected.items():
            path = parameters[name][:number]
            assert np.linalg.norm(found[name] - value) <= bound * np.linalg.norm(path - path[-1]) + 1e-5, name
        tracked = [direct(parameters, other, number)["gain"] for other in LENGTHS]
        away = min(np.linalg.norm(other - expected["gain"]) for other in tracked)
        assert np.linalg.norm(found["gain"] - expected["gain"]) < 0.1 * away


def test_the_plain_ema_and_the_training_are_as_without(whole, tmp_path):
    """Bitwise; and a checkpoint without averages has no such item."""
    run(tmp_path, train__checkpoint_every=14, train__posthoc_ema=())
    plain, kept = (restored(folder, STEPS, "train", "ema") for folder in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, plain, kept)
    assert not (tmp_path / "posthoc").exists() and not (tmp_path / "checkpoints" / "14" / "averages").exists()
    assert (whole / "checkpoints" / "14" / "averages").exists()


def test_cut_off_after_snapshots_that_no_checkpoint_has(whole, tmp_path):
    """As after kill -9: they are made again, to the same bits, and what else was left there is gone."""
    workdir = tmp_path / "parts"
    run(workdir, 9, train__checkpoint_every=5)
    shutil.rmtree(workdir / "checkpoints" / "9")
    assert steps_in(workdir / "posthoc") == [2, 4, 6, 8]
    (workdir / "posthoc" / "8" / "left").touch()
    shutil.copytree(workdir / "posthoc" / "6", workdir / "posthoc" / "11")
    for name in ("10.orbax-checkpoint-tmp", "removed-9"):
        (workdir / "posthoc" / name).mkdir()
    run(workdir, STEPS, train__checkpoint_every=5)
    assert steps_in(workdir / "posthoc") == steps_in(whole / "posthoc")
    assert not (workdir / "posthoc" / "8" / "left").exists()
    for number in steps_in(whole / "posthoc"):
        parts, expected = (restored(folder, number, "averages", folder="posthoc") for folder in (workdir, whole))
        jax.tree.map(np.testing.assert_array_equal, parts, expected)
    parts, expected = (restored(folder, STEPS, "train", "ema", "averages") for folder in (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, parts, expected)


def test_averages_cannot_begin_in_the_middle(tmp_path):
    """And a workdir from before there were any goes on, and is sampled, without."""
    run(tmp_path, 5, train__posthoc_ema=())
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["train"]["posthoc_ema"], saved["train"]["posthoc_every"]
    del saved[workdirs.DIGESTS]  # which versions of then did not write
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"train.posthoc_ema was \[\] and is now \[0.05, 0.1\]"):
        train.prepare(tiny.config(**SETTINGS, train__steps=8), tmp_path)
    old = workdirs.load_config(tmp_path)
    assert old.train.posthoc_ema == ()
    assert int(runs.load_ema(tiny.with_network(runs.open_run(old, tmp_path, -1), tiny.Linear()))[0]) == 5
    with pytest.raises(ValueError, match=r"--ema=0.08: .* was trained with the plain EMA alone .*train.posthoc_ema="):
        runs.open_run(old, tmp_path, -1, ema=0.08)
    run(tmp_path, 8, train__posthoc_ema=())
    assert steps_in(tmp_path / "checkpoints")[-1] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__posthoc_ema": (0.05, 0.4)},
            r"posthoc_ema is \(0.05, 0.4\), of which one is 0.4; .*from 0.001 to 0.2887",
        ),
        ({"train__posthoc_ema": (0.1, 0.05)}, "rising, each once"),
        ({"train__posthoc_ema": (0.05, 0.1, 0.105)}, "0.1 and 0.105 tell next to the same: leave 10 %"),
        ({"train__posthoc_ema": (0.1,), "train__posthoc_every": 0}, "posthoc_every is 0; it must be from 1"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(tiny.config(**changes))


def test_what_cannot_be_made(whole, tmp_path):
    """Too short or too long for the snapshots that there are."""
    with pytest.raises(ValueError, match=r"--ema is 0.3; a relative length"):
        posthoc_ema.plan(whole, STEPS, 0.3)
    reach = r"the 6 snapshots in .*posthoc up to step 14 come no closer .* than \d+% .*; ask for one from (.*) to (.*),"
    for sigma_rel in (0.005, 0.28):
        with pytest.raises(ValueError, match=reach) as refused:
            posthoc_ema.plan(whole, STEPS, sigma_rel)
    least, most = map(float, re.search(reach, str(refused.value)).groups())
    assert least < 0.04 and most > 0.15
    for good, bad in ((least, least - 0.005), (most, most + 0.005)):
        posthoc_ema.plan(whole, STEPS, good)
        with pytest.raises(ValueError, match="come no closer"):
            posthoc_ema.plan(whole, STEPS, bad)
    for name in ("checkpoints", "config.json"):
        (tmp_path / name).symlink_to(whole / name)
    assert posthoc_ema.plan(tmp_path, STEPS, 0.08).fit.error == pytest.approx(0.044, abs=0.005)  # of its own step alone
    with pytest.raises(ValueError, match=r"the 0 snapshots in .* come no closer .*ask for one from 0.0\d+ to 0.1\d*,"):
        posthoc_ema.plan(tmp_path, STEPS, 0.2)
    imported = tmp_path / "imported"
    (imported / "checkpoints" / str(STEPS) / "ema").mkdir(parents=True)
    shutil.copy(whole / "config.json", imported)
    with pytest.raises(
        ValueError, match=r"checkpoints/14 holds the plain EMA alone, .* which was imported; leave --em"
    ):
        runs.check_ema(imported, STEPS, 0.08)


def test_a_damaged_snapshot_is_passed_over_where_the_others_suffice(whole, tmp_path, capsys):
    """As if it were not there, and what is made with it says so; a snapshot that was restored counts again."""
    less, run_of = tmp_path / "less", runs.Run(tiny.build(devices=1, **SETTINGS), tmp_path, STEPS, ema=0.08)
    less.mkdir()
    for folder in (tmp_path, less):
        shutil.copytree(whole / "posthoc", folder / "posthoc")
        for name in ("checkpoints", "config.json"):
            (folder / name).symlink_to(whole / name)
    shutil.rmtree(less / "posthoc" / "8")
    swap = tmp_path / "posthoc" / "8" / "averages"
    shutil.rmtree(swap)
    shutil.copytree(whole / "posthoc" / "6" / "averages", swap)
    assert len(posthoc_ema.plan(tmp_path, STEPS, 0.08).steps) == 7
    step, loaded = runs.load_ema(run_of)
    jax.tree.map(np.testing.assert_array_equal, loaded, remake(less, STEPS, 0.08))
    said = capsys.readouterr().err
    assert (
        said.count("WARNING: snapshot 8 in") == 1 and "item averages: 0/" in said and "the EMA is made of the" in said
    )
    note = runs.made_with(run_of, step, loaded)["ema"]
    assert note == posthoc_ema.plan(less, STEPS, 0.08).note() != posthoc_ema.plan(whole, STEPS, 0.08).note()
    shutil.rmtree(tmp_path / "posthoc")
    shutil.copytree(less / "posthoc", tmp_path / "posthoc")
    shutil.copytree(whole / "posthoc" / "8", tmp_path / "posthoc" / "8")
    assert len(posthoc_ema.plan(tmp_path, STEPS, 0.08).steps) == 7


def test_damaged_snapshots_are_refused_where_the_others_do_not_suffice(whole, tmp_path):
    for name in ("checkpoints", "config.json"):
        (tmp_path / name).symlink_to(whole / name)
    shutil.copytree(whole / "posthoc", tmp_path / "posthoc")
    for number in (2, 4, 6, 8, 10, 12):
        shutil.rmtree(tmp_path / "posthoc" / str(number) / "averages")
    shapes = jax.eval_shape(tiny.build(devices=1).model.init, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"--ema=0.2: the \d snapshots in .* \(those of 2, 4 are damaged: restore them\)"
    ):
        posthoc_ema.make(tmp_path, STEPS, 0.2, shapes)


def test_it_is_sampled_and_scored_and_exported(whole, tmp_path, monkeypatch):
    """As a model whose plain EMA these weights are; and its name stands beside the images and the scores."""
    other = tmp_path / "other"
    wanted = posthoc_ema.plan(whole, STEPS, 0.08)
    checkpoints = checkpoint.Checkpoints(other / "checkpoints")
    checkpoints.save(STEPS, None, jax.device_put(remake(whole, STEPS, 0.08), jax.devices()[0]), wait=True)
    shutil.copy(whole / "config.json", other)
    shutil.copy(whole / "data.json", other)
    np.savez(tmp_path / "few.npz", images=sources.open_source("bundled").read(np.arange(40))[0])
    changes = {"sample__steps": 2, "eval__count": 16, "eval__reference": f"npz:{tmp_path / 'few.npz'}"}
    config = tiny.config(**SETTINGS, train__steps=STEPS, eval__metrics=("lsd",), **changes)
    images = {}
    for folder, length in ((whole, 0.08), (other, None)):
        file = tmp_path / f"{folder.name}.npz"
        drawing = generate.prepare(config, folder, "0-15", str(file), -1, ema=length)
        assert generate.sample(tiny.with_network(drawing, tiny.Linear())) == 0
        with np.load(file) as stored:
            images[folder], made_with = stored["images"], json.loads(str(stored["made_with"]))
        assert made_with.get("ema") == (wanted.note() if length else None)
    np.testing.assert_array_equal(images[whole], images[other])
    judging = evaluate.prepare(config, whole, "", -1, "once", False, (0.05, 0.08))
    judging = dataclasses.replace(judging, sampling=tiny.with_network(judging.sampling, tiny.Linear()))
    assert evaluate.evaluate(judging) == 0
    first, second = (json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines())
    assert (first["ema"], second["ema"]) == (0.05, 0.08) and second["ema_made_of"] == wanted.note()
    judged = [np.load(path)["pixels"] for path in whole.glob("evaluations/*/00000000-16.npz")]
    same = [np.array_equal(pixels, images[other]) for pixels in judged]
    assert sorted(same) == [False, True]
    assert first["lsd_db_pixels_16"] != second["lsd_db_pixels_16"]
    with pytest.raises(ValueError, match="it does not go with --images"):
        evaluate.prepare(config, whole, "bundled", -1, "once", False, (0.08,))
    exporting = export.prepare(config, whole, str(tmp_path / "export"), -1, ("cpu",), 0.08)
    exporting = dataclasses.replace(exporting, source=tiny.with_network(exporting.source, tiny.Linear()))
    monkeypatch.setattr(export, "program", lambda exp, platforms: types.SimpleNamespace(serialize=bytes))
    assert export.export(exporting) == 0
    made = json.loads((tmp_path / "export" / "model.json").read_text())
    assert made["ema"] == wanted.note() and "0.08" in (tmp_path / "export" / "README.md").read_text()
    stored = bundle.unflatten(bundle.tensors.read_safetensors(tmp_path / "export" / "weights.safetensors")[0])
    assert_close(stored, remake(whole, STEPS, 0.08), 0)


def test_what_ignores_an_ema_refuses_it(tmp_path):
    """Figures without models, a workdir without a checkpoint, and a run to watch that keeps no averages."""
    with pytest.raises(ValueError, match=r"--ema=0.08 .*--analysis=spectra shows no model; .*one of learning, manif"):
        analyze.prepare(tiny.config(), tmp_path, "spectra", -1, 0.08)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*train first"):
        analyze.prepare(tiny.config(), tmp_path, "learning", -1, 0.08)
    for length, message in ((0.08, "--ema=0.08: .*trained with the plain EMA alone"), (0.4, "--ema is 0.4; .* 0.2887")):
        with pytest.raises(ValueError, match=message):
            evaluate.prepare(tiny.config(), tmp_path, "", -1, "once", True, (length,))


def test_snapshots_leave_room_for_the_checkpoints(tmp_path, monkeypatch, capsys):
    """A disk for three checkpoints (1,592 parameters, six copies), of which two are kept, and three snapshots (two)."""
    disk, sizes = shutil.disk_usage(tmp_path), {"checkpoints": 6 * 4 * 1592 + 100, "posthoc": 2 * 4 * 1592}

    def usage(folder):
        used = sum(size * len(list((tmp_path / name).glob("[0-9]"))) for name, size in sizes.items())
        return disk._replace(free=3 * sum(sizes.values()) - used)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    run(tmp_path, 9, train__posthoc_every=1, train__checkpoint_every=2, train__keep_last=2)
    said = capsys.readouterr().err
    assert said.count("Training goes on, and nothing of it is lost; what --ema makes") == 6
    assert "each later checkpoint is tried" not in said
    assert steps_in(tmp_path / "checkpoints") == [8, 9] and steps_in(tmp_path / "posthoc") == [1, 2, 3]


def test_it_is_loaded_in_a_notebook(whole, monkeypatch):
    monkeypatch.setattr(api.experiment, "_network", lambda config, shape, around, two: tiny.Linear(heads=around.heads))
    model = api.load(whole, ema=0.08)
    assert_close(jax.device_get(model.weights), remake(whole, STEPS, 0.08), 0)
    assert (model.ema, model.step) == (0.08, STEPS)
