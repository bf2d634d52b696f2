"""An export, read without Orbax and run without this package; bitwise back; and what is wrong with one."""

import hashlib
import importlib.util
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from test_warm_start import random_params

from warm_jax.convert import bundle, export, model_card, sample_script
from warm_jax.convert.from_edm import save_workdir
from warm_jax.experiments import experiment, family
from warm_jax.runtime import pictures, workdirs
from warm_jax.sampling import batches, runs

FACTS = {"checkpoint_step": 5, "origin": None, "begun_from": None, "licence": None}


def params_of(exp):
    return random_params(exp, seed=3)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The export of a stand-in network that compiles quickly, and the images of its sampler."""
    folder = tmp_path_factory.mktemp("export")
    exp = tiny.build(devices=1, sample__solver="stochastic", sample__S_churn=2.0)
    params = params_of(exp)
    export.write(folder, exp, params, None, FACTS, ("cpu", "cuda", "tpu"))
    seeds, labels = np.array([5, 2**32 - 1, 0, 7]), np.array([-1, 3, -1, 9])
    samples = batches.Sampler(exp, batch_size=4)(params, seeds, labels)
    return folder, params, seeds, labels, samples.images


@pytest.fixture
def smoke(tmp_path):
    """An export's two files, of a real network that needs the data's spectrum."""
    config = tiny.config(process__schedule="information_budget", process__bnr=None)
    measured = family.Measured(np.exp(np.random.default_rng(0).normal(size=(28, 28))))
    exp = experiment.build(config, measured)
    params = params_of(exp)
    bundle.save(tmp_path, exp, params, measured, FACTS | {"sampler": {"platforms": ["cpu"]}})
    return tmp_path, exp, params, measured


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def alone(code, cwd, *blocked, isolated=()):
    """The output, which knows ASCII alone, of a process that cannot import what is blocked."""
    command = [sys.executable, *isolated, "-c", BLOCK.replace("{blocked}", repr(blocked)) + code]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_runs_without_this_package(stand_in, tmp_path):
    """In a process without it, with any batch; the same images as its own sampler, seed by seed and class by class."""
    folder, _, seeds, labels, images = stand_in
    shutil.copytree(folder, tmp_path / "e")
    specs = [importlib.util.find_spec(name) for name in ("jax", "numpy", "safetensors", "flatbuffers")]
    paths = [str(pathlib.Path(spec.origin).parent.parent) for spec in specs]
    code = f"""
sys.path += {paths!r}
import runpy
sys.argv = ["sample.py", "--seeds=2-3,0", "--classes=4", "--batch=2", "--out=three.npz"]
made = runpy.run_path("sample.py", run_name="__main__")
assert not any(name.split(".")[0] in ("warm_jax", "flax", "orbax", "PIL") for name in sys.modules)
np = made["np"]
four = made["draw"](np.array({seeds.tolist()}, np.uint32), np.array({labels.tolist()}, np.int32), 64)
np.save("four.npy", four)
for out in ("grid.png", "apart"):
    made["save"](made["pathlib"].Path(out), four, range(4), None)
"""
    said = alone(code, tmp_path / "e", "warm_jax", "flax", "orbax", "ml_collections", isolated=["-s", "-P"])
    assert said.splitlines()[0] == r"3 images of 28\xd728\xd71 in three.npz"
    assert said.splitlines()[1].startswith("licence of the weights: not known; the weights may be bound")
    four = np.load(tmp_path / "e" / "four.npy")
    assert np.abs(four.astype(int) - images).max() <= 1 and (four == images).mean() > 0.999
    assert images.std() > 10 and np.abs(four[0].astype(int) - four[1]).max() > 50
    with np.load(tmp_path / "e" / "three.npz") as three:
        assert three["seeds"].tolist() == [2, 3, 0] and three["classes"].tolist() == [4, 4, 4]
        assert three["images"].shape == (3, 28, 28, 1) and three["images"].dtype == np.uint8
    # Its PNGs, read by Pillow.
    for number in range(4):
        np.testing.assert_array_equal(pictures.load_png(tmp_path / "e" / "apart" / f"{number:06}.png"), four[number])
    grid = pictures.load_png(tmp_path / "e" / "grid.png")
    np.testing.assert_array_equal(grid, np.block([[[four[0]], [four[1]]], [[four[2]], [four[3]]]]).reshape(grid.shape))


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The functions of `sample.py` in a folder whose `model.json` says what it reads, for calls with arguments."""

    def run(*arguments, classes=10, licence="no commercial use"):
        about = {"config": {"data": {"num_classes": classes}}, "licence": licence}
        about["process"] = {"image_shape": [2, 3, 3]}
        (tmp_path / "model.json").write_text(json.dumps(about))
        (tmp_path / "sample.py").write_text(sample_script.TEXT)
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
        return runpy.run_path(str(tmp_path / "sample.py"))

    return run


def test_the_script_says_its_licence_and_its_arguments(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script("--help")["parse"]()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "Licence of the weights: no commercial use." in said
    assert "--classes" in said and "--seeds" in said and "FILE.npz" in said
    assert "warm_jax" not in sample_script.TEXT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes=10"], "from 0 to 9"),
        (["--classes=0-2"], "3 classes for 16 images: give one for all, or one each"),
        (["--seeds=x"], "give whole numbers, as 0-15,20"),
        (["0"], "count is 0: give a number of at least 1"),
        (["--out=picture.jpg"], "--out=picture.jpg: give a folder, FILE.png or FILE.npz"),
        (["--batch=0"], "--batch=0: it must be at least 1"),
    ],
)
def test_bad_arguments_of_the_script(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        script(*arguments)["parse"]()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_script_of_no_classes_takes_none(script, capsys):
    with pytest.raises(SystemExit):
        script("--classes=0", classes=0)["parse"]()
    assert "unrecognized arguments" in capsys.readouterr().err
    colour = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    content = script(classes=0)["png"](colour)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), colour)


def test_export_and_import_are_bitwise_and_need_no_orbax(smoke):
    folder, _, params, measured = smoke
    code = f"""
sys.path.insert(0, {str(pathlib.Path(__file__).parent.parent)!r})
import numpy as np
from warm_jax.convert import bundle
made = bundle.load(".")
np.savez("again.npz", power=made.measured.power, **bundle.flatten(made.params))
print(made.experiment.config.process.system, made.experiment.process.image_shape, len(made.about["process"]["levels"]))
"""
    assert alone(code, folder, "orbax", "tensorstore").strip() == "warm (28, 28, 1) 5"
    with np.load(folder / "again.npz") as again:
        expected = bundle.flatten(params) | {"power": measured.power}
        assert set(again.files) == set(expected)
        for name, value in expected.items():
            assert again[name].dtype == value.dtype and again[name].tobytes() == value.tobytes(), name


def test_back_into_a_workdir_bitwise(smoke, tmp_path):
    """And it is sampled by the config that made it, measured spectrum and all."""
    folder, exp, params, measured = smoke
    workdir = tmp_path / "run"
    assert export.import_export(export.prepare_import(str(folder), str(workdir))) == 0
    run = runs.open_run(exp.config, workdir, -1)
    jax.tree.map(np.testing.assert_array_equal, runs.load_ema(run)[1], params)
    np.testing.assert_array_equal(workdirs.load_measured(workdir)["power"], measured.power)
    t = jnp.array([0.1, 10.0])
    np.testing.assert_array_equal(run.experiment.process.blur(t), exp.process.blur(t))
    with pytest.raises(ValueError, match="holds a run already"):
        export.prepare_import(str(folder), str(workdir))
    # As a kill before the checkpoint was whole leaves it: the same command begins anew.
    (workdir / "checkpoints" / "0").rename(workdir / "checkpoints" / "0.orbax-checkpoint-tmp")
    assert export.import_export(export.prepare_import(str(folder), str(workdir))) == 0
    jax.tree.map(np.testing.assert_array_equal, runs.load_ema(run)[1], params)


@pytest.mark.parametrize("name", ["weights.safetensors", "sampler.stablehlo"])
def test_its_script_refuses_what_is_damaged(stand_in, tmp_path, name):
    folder = shutil.copytree(stand_in[0], tmp_path / "e")
    about = json.loads((folder / "model.json").read_text("utf-8"))
    for part in (about["weights"], about["sampler"]):  # as --mode=export notes it
        part["sha256"] = hashlib.sha256((folder / part["file"]).read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(about), "utf-8")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    done = subprocess.run([sys.executable, "sample.py", "1"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (folder / "samples").exists()
    assert done.stderr == f"error: {folder.resolve() / name} is damaged; copy or make the export again\n"


def test_the_whole_program(smoke, tmp_path, monkeypatch):
    """But for the StableHLO, which another test makes: from a checkpoint to files that say where it is from."""
    folder, exp, params, measured = smoke
    workdir, out = tmp_path / "run", tmp_path / "out"
    export.import_export(export.prepare_import(str(folder), str(workdir)))
    note = {"source": "x.pkl", "sha256": "00", "licence": "no commercial use"}
    (workdir / "origin.json").write_text(json.dumps(note))
    program = types.SimpleNamespace(serialize=lambda: b"a program")
    monkeypatch.setattr(export, "program", lambda exp, platforms: program)
    assert export.export(export.prepare(exp.config, workdir, str(out), 0, ("cpu", "tpu"))) == 0
    made = bundle.load(out)
    jax.tree.map(np.testing.assert_array_equal, made.params, params)
    np.testing.assert_array_equal(made.measured.power, measured.power)
    assert made.about["origin"] == note and made.about["licence"] == "no commercial use"
    assert made.about["sampler"]["platforms"] == ["cpu", "tpu"] and made.about["checkpoint_step"] == 0
    levels = exp.sampled.levels(exp.config.sample.steps)
    assert made.about["process"]["levels"] == levels.tolist()
    assert "no commercial use" in (out / "README.md").read_text()
    assert (out / "sampler.stablehlo").read_bytes() == b"a program" and (out / "sample.py").exists()


def test_start_images_come_along(tmp_path):
    """Of a system that starts from images: their low frequencies, bitwise."""
    config = tiny.config("ihdm")
    start = np.random.default_rng(0).normal(size=(5, 3, 3, 1)).astype(np.float32)
    measured = family.Measured(np.ones((28, 28)), start)
    exp = experiment.build(config, measured)
    bundle.save(tmp_path, exp, params_of(exp), measured, FACTS)
    np.testing.assert_array_equal(bundle.load(tmp_path).measured.start, start)
    (tmp_path / "start.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"start\.safetensors"):
        bundle.load(tmp_path)


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def _edit(folder, **changes):
    about = json.loads((folder / "model.json").read_text())
    about.pop("sha256")  # as an older version wrote it
    (folder / "model.json").write_text(json.dumps(about | changes), "utf-8")


def _other_weights(folder):
    exp = bundle.load(folder).experiment
    tensors = bundle.flatten(random_params(exp, seed=9))
    bundle.tensors.write_safetensors(folder / "weights.safetensors", tensors)


def _fewer_tensors(folder):
    path = folder / "weights.safetensors"
    flat = bundle.tensors.read_safetensors(path)[0]
    flat.pop("map_layer0/kernel")
    bundle.tensors.write_safetensors(path, flat)
    about = json.loads((folder / "model.json").read_text())
    _edit(folder, weights=about["weights"] | {"sha256": bundle.tensors.sha256(path)})


def _cut(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_cut, ValueError, r"weights\.safetensors has sha256 .*: truncated, or another file.*export both again"),
        (_other_weights, ValueError, r"weights\.safetensors has sha256 .*truncated, or another file"),
        (lambda f: (f / "weights.safetensors").rename(f / "w.st"), FileNotFoundError, r"no weights at .*safetensors"),
        (lambda f: (f / "model.json").unlink(), FileNotFoundError, "is no folder of --mode=export"),
        (lambda f: (f / "model.json").write_text("{"), ValueError, "does not describe a model"),
        (lambda f: (f / "model.json").write_text("[]"), ValueError, "does not describe a model"),
        (lambda f: _edit(f, schema_version=2), ValueError, "schema_version 2; this version reads up to 1: update"),
        (lambda f: _edit(f, schema_version="1"), ValueError, "schema_version '1'"),
        (lambda f: _edit(f, weights=None), ValueError, "lacks what schema 1 has"),
        (lambda f: _edit(f, spectrum=None), ValueError, "has no spectrum, and this model needs it"),
        (_fewer_tensors, ValueError, "holds other tensors than the model"),
    ],
)
def test_a_spoilt_export_is_refused(smoke, spoil, error, message):
    spoil(smoke[0])
    with pytest.raises(error, match=message) as caught:
        bundle.load(smoke[0])
    assert str(smoke[0]) in str(caught.value)


def test_a_program_for_other_machines_is_refused(stand_in, tmp_path):
    folder = shutil.copytree(stand_in[0], tmp_path / "e")
    exp = tiny.build(devices=1, sample__solver="euler", sample__steps=1)
    with pytest.raises(ValueError, match=r"sampler\.stablehlo has sha256 .*, expected .*Export the model again"):
        (folder / "sampler.stablehlo").write_bytes(b"another program")
        bundle.load_program(folder)
    sampler = json.loads((folder / "model.json").read_text())["sampler"]
    _edit(folder, sampler={key: value for key, value in sampler.items() if key != "sha256"})  # an older version's
    (folder / "sampler.stablehlo").write_bytes(export.program(exp, ("tpu",)).serialize())
    with pytest.raises(ValueError, match=r"exported for tpu, and this JAX runs on cpu; .*--platforms=tpu,cpu"):
        bundle.load_program(folder)
    (folder / "sampler.stablehlo").write_bytes(b"not a program")
    with pytest.raises(ValueError, match="is damaged, or newer than this JAX"):
        bundle.load_program(folder)
    (folder / "sampler.stablehlo").unlink()
    with pytest.raises(FileNotFoundError, match=r"sampler\.stablehlo is not there"):
        bundle.load_program(folder)
    assert bundle.load_program(stand_in[0]).platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("name", ["README.md", "sample.py", "weights.safetensors"])
def test_files_of_others_are_not_replaced(stand_in, tmp_path, name):
    (tmp_path / name).write_text("mine", "utf-8")
    with pytest.raises(ValueError, match=rf"{name} is there and was not made by --mode=export; name another --out"):
        export._check_free(tmp_path)
    folder = shutil.copytree(stand_in[0], tmp_path / "e")
    export._check_free(folder)  # one of ours is made anew
    (folder / "model.json").unlink()
    export._check_free(folder)  # as is one that was cut off before its last two files


def test_what_cannot_be_exported(tmp_path):
    config = tiny.config()
    with pytest.raises(ValueError, match=r"--platforms=cpu,metal: choose some of cpu, cuda, rocm, tpu"):
        export.prepare(config, tmp_path, "", -1, ("cpu", "metal"))
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        export.prepare(config, tmp_path, "", -1, ("cpu",))
    guided = tiny.config(sample__guide="runs/weak", sample__guidance=2.0)
    with pytest.raises(ValueError, match=r"sample\.guide is set"):
        export.prepare(guided, tmp_path, "", -1, ("cpu",))


# ── The card ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_card_says_what_the_workdir_knows(smoke, tmp_path):
    folder, exp, params, _ = smoke
    workdir = tmp_path / "run"
    workdir.mkdir()
    save_workdir(exp, params, workdir)
    seen = {"source": "zip:clothes.zip", "images": 12345, "fingerprint": "abc123", "skipped": ["a.png"]}
    (workdir / "data.json").write_text(json.dumps(seen))
    row = {"images": "samples", "scores": ["fid50k"], "fid50k": 2.3456, "count": 50000, "solver": "heun", "nfe": 35}
    row |= {"reference": "zip:clothes.zip", "reference_count": 12345, "extractor": "inception", "numbers": "0-49999"}
    paper = {
        "images": "samples",
        "protocol": "paper",
        "rounds": 3,
        "fid50k_min": 1.9,
        "fid50k_mean": 2.0,
        "count": 50000,
    }
    rows = [row, row | {"images": "folder:x", "fid50k": 77.7}, paper]
    (workdir / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken")
    said = model_card.text(bundle.read_about(folder), workdir)
    for text in (
        "System `warm`",
        "zip:clothes.zip`: 12,345 images, fingerprint `abc123`",
        "1 broken images were left out",
        "5 steps of 16 images, 80 in all",
        "fid50k 2.346: 50000 samples, solver heun, nfe 35, numbers 0-49999; against zip:clothes.zip (12345 images)",
        "fid50k 1.9 (minimum of 3 rounds)",
        "BNR information_budget",
        "Not known to the folder",
        "--from_export=. --workdir=runs/run",
        "(1, 28, 28, 1)",
    ):
        assert text in said, text
    assert "77.7" not in said
    assert not re.search(r"\b(FOLDER|RUN|TODO|NAME)\b|<[^>]*>|\.\.\.|…", said), "nothing to fill in"
    licensed = bundle.read_about(folder) | {
        "licence": "no commercial use",
        "origin": {"source": "x.pkl", "sha256": "ff"},
    }
    said = model_card.text(licensed, tmp_path / "nothing")
    assert "no commercial use." in said and "Converted from `x.pkl` (sha256 `ff`)" in said
    assert "Which images it was trained on is not known" in said and "it was not scored there" in said
