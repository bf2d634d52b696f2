"""Own images: what is chosen of a prepared set and a machine, and from a folder of photographs to samples."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver
from PIL import Image

from configs import cifar10, fashion_mnist, ffhq64, images, lsun_church128
from warm_jax.cli import modes
from warm_jax.data import sources
from warm_jax.experiments import automatic, experiment, family, recipes
from warm_jax.runtime import host, workdirs

ROOT = pathlib.Path(__file__).parent.parent
PHOTOS = recipes.Images("zip:mine.zip", 70_000, 64, 64, 3, 0, 0.5)
GPUS = recipes.Machine("gpu", 8, 80 * 2**30)
LAPTOP = recipes.Machine("cpu", 2, 0)


def chosen(shape=(64, 64), machine=GPUS, given=None, **facts):
    photos = PHOTOS._replace(height=shape[0], width=shape[1], **facts)
    return {key: value for key, (value, _) in recipes.choose(photos, machine, given or {}).items()}


@pytest.mark.parametrize(
    ("side", "count", "recipe", "but"),
    [
        (32, 50_000, cifar10, {}),
        (64, 70_000, ffhq64, {}),
        # The published summary gives no recipe for 128; its config has flips alone, and churn.
        (128, 126_227, lsun_church128, {"data.augment": "edm", "sample.steps": 40}),
    ],
)
def test_accelerators_get_the_published_recipe(side, count, recipe, but):
    config, found = recipe.get_config(), chosen((side, side), count=count)
    for key in ("data.augment", "train.batch_size", "train.steps", "train.learning_rate", "train.warmup_images",
                "train.decay", "train.ema_halflife_images", "model.channels", "model.channel_mult", "model.num_blocks",
                "model.attention", "model.dropout", "model.dtype", "sample.steps", "data.num_workers"):  # fmt: skip
        section, name = key.split(".")
        assert found[key] == but.get(key, config[section][name]), key
    assert found["data.augment_probability"] == config.data.augment_probability


def test_small_sets_are_regularised_as_afhq():
    small, large = chosen(count=15_803), chosen(count=1_281_167)
    assert (small["model.dropout"], small["data.augment_probability"]) == (0.25, 0.15)
    assert (large["model.dropout"], large["data.augment"]) == (0.1, "none")


@pytest.mark.parametrize(("count", "seen"), [(40, 2_000_000), (10_000, 40_000_000), (10**6, 200_000_000)])
def test_passes_over_the_set(count, seen):
    found = chosen(count=count)
    assert found["train.steps"] * 256 <= seen < (found["train.steps"] + 1) * 256
    assert chosen(count=count, given={"train.batch_size": 64})["train.steps"] == seen // 64


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 24, 1024])
def test_the_batch_divides_over_the_devices(devices):
    found = chosen(machine=GPUS._replace(devices=devices))
    assert found["train.batch_size"] % (devices * found["train.accumulation"]) == 0


def test_accumulation_is_by_memory():
    """Twice the pixels of FFHQ-64 are some 0.6 GiB an image: 256 of them fit into no 16 GiB, 32 do not either."""
    parts = [chosen((128, 128), machine=recipes.Machine("gpu", n, m * 2**30))["train.accumulation"]
             for n, m in ((1, 16), (1, 80), (8, 16), (8, 80))]  # fmt: skip
    assert parts[0] > parts[1] > parts[3] == 1 and parts[0] > parts[2] > 1
    assert chosen((128, 128), machine=recipes.Machine("gpu", 1, 0))["train.accumulation"] == parts[0]  # unknown: 16


@pytest.mark.parametrize("shape", [(28, 28), (32, 32), (48, 64), (50, 50), (64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("machine", [LAPTOP, GPUS])
@pytest.mark.parametrize("system", [name for name in images.NAMES if name not in ("flipped_snr", "coloured", "own")])
def test_every_choice_can_be_built(shape, machine, system):
    if shape == (50, 50) and machine is GPUS:
        with pytest.raises(ValueError, match=r"50×50 pixels; .* multiples of 8: .*--image_size=48 or 56"):
            chosen(shape, machine)
        return
    config = images.get_config(system)
    with config.unlocked(), config.ignore_type():
        for key, value in chosen(shape, machine).items():
            section, name = key.split(".")
            config[section][name] = config[section][name] if config[section][name] is not None else value
    made = experiment.build(config)
    assert made.process.image_shape == (*shape, 3)
    grid = max(shape) // config.model.patch_size
    assert machine is GPUS or grid <= (16 if max(shape) <= 128 else 32)


def test_a_process_of_ones_own_is_asked_for_its_file():
    config = images.get_config("own")
    with pytest.raises(ValueError, match=r"process\.file is unset"):
        family.SYSTEMS["own"].build((16, 16, 3), config.process, family.Measured(np.ones((16, 16))))


def test_odd_sides_are_refused_with_the_command():
    with pytest.raises(ValueError, match=r"45×45 .*multiples of 2.*--image_size=44 or 46"):
        chosen((45, 45), LAPTOP)


def test_a_cpu_batch_divides_over_what_shares_it():
    assert chosen(machine=LAPTOP)["train.batch_size"] == host.CPU_BATCH
    assert all(host.CPU_BATCH % devices == 0 for devices in (1, 2, 4, 8))


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty made photographs, PNG and JPEG, of mixed sizes, grey and colour; in a fresh folder of their own."""
    place, rng = tmp_path_factory.mktemp("elsewhere"), np.random.default_rng(0)
    (place / "photographs").mkdir()
    for number in range(40):
        height, width = rng.integers(20, 60, 2)
        shade = np.linspace(0, 200, width)[None, :, None] + rng.integers(0, 50, (height, 1, 3))
        pixels = shade.astype(np.uint8) if number % 5 else shade[..., 0].astype(np.uint8)
        Image.fromarray(pixels).save(place / "photographs" / f"{number:02}.{'jpg' if number % 2 else 'png'}")
    return place


def test_from_a_folder_of_photographs_to_samples(folder):
    """Three commands in a folder outside of the repository; the third repeats nothing of the second's settings."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    config, tiny = f"--config={ROOT}/configs/images.py", ["patch_size=8", "channels=8", "channel_mult=(1,)"]
    settings = [f"--config.model.{one}" for one in tiny]
    settings += ["--config.train.steps=2", "--config.train.sample_every=0", "--config.sample.steps=2"]
    said = []
    for arguments in (
        ["--mode=prepare", "--images=folder:photographs", "--image_size=16", "--channels=3", "--out=mine.zip"],
        [config, "--config.data.source=zip:mine.zip", *settings],
        [config, "--mode=sample", "--seeds=0-3"],
    ):
        command = [sys.executable, "-m", "warm_jax", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "chosen for zip:mine.zip (40 images of 16×16×3, no classes)" in said[1]
    assert "--config.KEY=VALUE gives another" in said[1] and "the standard deviation of 40 of the images" in said[1]
    assert "settings that are not given are those of runs/images/config.json" in said[2]
    assert sorted(path.name for path in (folder / "runs/images/samples").glob("0*.png")) == [
        f"{seed:06}.png" for seed in range(4)
    ]
    stored = json.loads((folder / "runs/images/config.json").read_text())
    flat = workdirs.flat(workdirs.load_config(folder / "runs/images"))
    assert not [key for key in images.UNSET if flat[key] is None], "config.json has plain values"
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(c))) for c in contents(folder / "mine.zip")]).astype(np.float64)
    assert stored["model"]["sigma_data"] == round(np.std(pixels / 127.5 - 1), 2)


def contents(path):
    import zipfile

    with zipfile.ZipFile(path) as archive:
        return [archive.read(name) for name in archive.namelist() if name.endswith(".png")]


def source(path, shape=(16, 16, 3), labels=(0, 1, 2, 0)):
    rng = np.random.default_rng(1)
    np.savez(path, images=rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8), labels=np.asarray(labels))
    return f"npz:{path}"


def test_what_is_given_is_kept_and_what_follows_from_it(tmp_path):
    config = images.get_config()
    config.data.source, config.train.batch_size, config.data.num_classes = source(tmp_path / "a.npz"), 64, 0
    automatic.settle(config, tmp_path, GPUS)
    assert (config.train.batch_size, config.data.num_classes) == (64, 0)
    assert (config.train.steps, config.data.image_size, config.data.channels) == (2_000_000 // 64, 16, 3)
    assert isinstance(config.model.channel_mult, tuple)


def test_classes_are_the_sets(tmp_path, capsys):
    config = images.get_config()
    config.data.source = source(tmp_path / "a.npz")
    automatic.settle(config, tmp_path, LAPTOP)
    assert config.data.num_classes == 3 and "3 classes" in capsys.readouterr().out


def test_a_run_that_has_begun_keeps_what_it_has(tmp_path, capsys):
    """Whatever the machine is now; and its images need not be there to sample."""
    config = images.get_config()
    config.data.source = source(tmp_path / "a.npz")
    automatic.settle(config, tmp_path, LAPTOP)
    workdirs.save_config(config, tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    again = images.get_config()
    (tmp_path / "a.npz").unlink()
    automatic.settle(again, tmp_path, GPUS)
    assert again.to_dict() == config.to_dict()


def test_other_images_in_the_workdir_of_a_run_are_refused(tmp_path):
    """By what they are; not by their size, which would be wrong only here."""
    config = images.get_config()
    config.data.source = source(tmp_path / "a.npz")
    automatic.settle(config, tmp_path, LAPTOP)
    workdirs.save_config(config, tmp_path)
    workdirs.save_data(sources.open_source(config.data.source), tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    other = images.get_config()
    other.data.source = source(tmp_path / "b.npz", (64, 64, 3))
    with pytest.raises(ValueError, match=r"the images have changed since .*another --workdir"):
        automatic.settle(other, tmp_path, LAPTOP)


def test_configs_that_say_all_are_left_alone(tmp_path):
    for config in (cifar10.get_config(), fashion_mnist.get_config("ihdm")):
        before = config.to_dict()
        automatic.settle(config, tmp_path)
        assert config.to_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "data.source is unset; name the prepared images, --config.data.source=zip:FILE.zip"),
        (
            {"data.source": "zip:missing.zip"},
            "missing.zip is not there; make it with --mode=prepare, or name another with --config.data.source",
        ),
    ],
)
def test_bad_input(tmp_path, change, message):
    config = images.get_config()
    config.update_from_flattened_dict(change)
    with pytest.raises((ValueError, OSError), match=message):
        automatic.settle(config, tmp_path, LAPTOP)


def test_values_that_nothing_fills_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"seed|data\.num_classes is unset; give it with --config\.data\.num_classes"):
        experiment.build(images.get_config())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("process.bnr", -1.0, "process.bnr is -1.0; it must be from 0 to 10,000"),
        ("train.batch_size", 0, "train.batch_size is 0; it must be from 1"),
        ("train.batch_size", 33, r"33 does not divide over 2 device\(s\) .*; use 32 or 34"),
        ("data.image_size", 32, r"is 16×16 pixels, not 32×32 .*--mode=prepare"),
        ("data.num_classes", 5, "data.num_classes is 5, .* has 3 classes; set it to 3"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_said_what_was_chosen(tmp_path, capsys, key, value, message):
    config = images.get_config()
    config.update_from_flattened_dict({"data.source": source(tmp_path / "a.npz"), key: value})
    with pytest.raises(ValueError, match=message):
        automatic.settle(config, tmp_path, LAPTOP)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("side", [16, 32, 48, 64, 128, 250, 256])
def test_a_first_training_on_a_cpu_is_bounded(side):
    """By its convolutions: at 64 channels they cost four times those at 32, on a grid of side / patch."""
    found = chosen((side, side), LAPTOP)
    grid, widths = (side / found["model.patch_size"]) ** 2, found["model.channels"] ** 2
    work = found["train.steps"] * host.CPU_BATCH * grid * widths
    assert work <= 38_400 * 16**2 * 64**2
    assert found["train.steps"] == {16: 1800, 32: 1800, 256: 300}.get(side, found["train.steps"])


def test_what_is_said_is_short(tmp_path, capsys):
    config = images.get_config()
    config.data.source = source(tmp_path / "a.npz", (256, 256, 3))
    automatic.settle(config, tmp_path, LAPTOP)
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 9 and "--config.train.steps=N" in said and "--image_size=64" in said


def test_no_rule_for_sizes_no_system():
    with pytest.raises(ValueError, match="no system 'ihdm'; choose one of warm, amortised, hot, pfgmpp, ddpm"):
        images.get_config("ihdm")


@pytest.fixture
def topology():
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(topology="cpu:24"):
        yield


def test_preflight_is_of_the_machine_it_is_for(tmp_path, topology):
    config = images.get_config()
    config.data.source = source(tmp_path / "a.npz", (64, 64, 3))
    modes.prepare("preflight", config, tmp_path)
    assert config.train.batch_size == 24  # of 24 devices, which are not here
