"""Sampling: an image is a function of its seed, whatever is drawn with it, and a run that was cut off goes on."""

import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from warm_jax.data import sources
from warm_jax.experiments import experiment
from warm_jax.runtime import mesh
from warm_jax.sampling import batches, generate, store
from warm_jax.training import train

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-3", [0, 1, 2, 3]),
        ("7", [7]),
        ("5, 2-4 ,100", [5, 2, 3, 4, 100]),
        ("3,1-4,3", [3, 1, 2, 4]),
        ("4294967295", [2**32 - 1]),
    ],
)
def test_parse_seeds(text, seeds):
    assert generate.parse_seeds(text).tolist() == seeds


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "1-2-3", "5-3", "1.5", "1,,2", "4294967296", "0-10000000"])
def test_bad_seeds(text):
    with pytest.raises(ValueError, match=f"--seeds={text}: "):
        generate.parse_seeds(text)


# ── The sampler ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Labels(nn.Module):
    """Says D̂ = 0.1 · class + 0.05 everywhere, so that an image is the picture of its class."""

    @nn.compact
    def __call__(self, x, condition, *rest, class_labels=None, **labels):
        self.param("unused", nn.initializers.zeros, ())
        if class_labels is None:
            class_labels = jnp.zeros((x.shape[0], 10))
        wanted = (class_labels @ (0.1 * jnp.arange(10.0) + 0.05))[:, None, None, None]
        s = jnp.exp(4 * condition)[:, None, None, None]
        # D̂ = c_skip x + c_out F with EDM's coefficients and x = input · √(s² + ¼), solved for F.
        x = x * jnp.sqrt(s**2 + 0.25)
        blurred = (wanted - 0.25 / (s**2 + 0.25) * x) * jnp.sqrt(s**2 + 0.25) / (0.5 * s)
        return jnp.concatenate([blurred, jnp.zeros_like(x)], -1)


def expected_class_image(label):
    return np.trunc(np.clip(127.5 * (0.1 * np.asarray(label) + 0.05) + 128, 0, 255))


def params_of(exp, rng=None, size=0.2):
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), jax.eval_shape(exp.model.init, jax.random.key(0)))
    return jax.device_put(tiny.randomised(params, rng or np.random.default_rng(0), size), mesh.replicated(exp.mesh))


def unet(devices):
    """A small U-Net no layer of which is silent, with attention and classes."""
    config = tiny.config(model__channel_mult=(1,), model__patch_size=14, sample__solver="euler", sample__steps=5)
    return tiny.on_devices(experiment.build(config), devices)


def test_an_image_is_the_same_in_any_order_and_grouping():
    """One batch size, and so one program: bitwise."""
    exp = unet(8)
    draw, params, seeds = batches.Sampler(exp, batch_size=8), params_of(exp), np.arange(100, 108)
    whole = draw(params, seeds)
    assert len({image.tobytes() for image in whole.images}) == 8
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 6], [5], [2, 2, 2, 7, 1, 1, 1, 0]):
        part = draw(params, seeds[order])
        np.testing.assert_array_equal(part.images, whole.images[order])
        np.testing.assert_array_equal(part.labels, whole.labels[order])


def test_batch_sizes_and_devices_differ_by_rounding_only():
    """At most one grey level in at most 0.1 % of the values."""
    seeds, drawn = np.arange(64), {}
    for devices, size in ((1, 1), (1, 7), (1, 64), (8, 64)):
        exp = unet(devices)
        draw, params = batches.Sampler(exp, batch_size=size), params_of(exp)
        parts = [draw(params, seeds[first : first + size]) for first in range(0, 64, size)]
        drawn[devices, size] = [np.concatenate([part[k] for part in parts]) for k in (0, 1)]
    images, labels = drawn.pop((1, 64))
    assert images.std() > 5 and len(np.unique(images)) > 50  # not just black and white
    for other_images, other_labels in drawn.values():
        np.testing.assert_array_equal(other_labels, labels)
        difference = np.abs(images.astype(int) - other_images)
        assert difference.max() <= 1 and np.mean(difference > 0) <= 1e-3


@pytest.mark.parametrize("trajectory", [False, True])
def test_devices_apart_draw_what_they_draw_together(trajectory):
    """As on a part of a TPU slice: a program a device. At most one grey level in at most 0.1 % of the values."""
    exp, seeds = unet(4), np.arange(10)
    params = params_of(exp)
    drawn = [batches.Sampler(exp, 12, trajectory=trajectory, apart=apart)(params, seeds) for apart in (False, True)]
    together, apart = ([s.images, *(s.trajectory or ())] for s in drawn)
    np.testing.assert_array_equal(drawn[0].labels, drawn[1].labels)
    assert drawn[0].nfe == drawn[1].nfe == 5
    for one, other in zip(together, apart, strict=True):
        assert one.shape == other.shape and one.shape[0] == 10
        difference = np.abs(one.astype(int) - other)
        assert difference.max() <= 1 and np.mean(difference > 0) <= 1e-3


def test_noise_is_bitwise_the_same_for_any_batch_and_devices(monkeypatch):
    """What the solver is given, of unit variance times the highest level."""

    def give_back(predict, process, x, levels, **settings):
        return x, batches.sampler.Record(jnp.zeros((), jnp.int32), None, None)

    monkeypatch.setattr(batches.sampler, "sample", give_back)
    monkeypatch.setattr(batches.pictures, "to_uint8", lambda x: x)
    seeds, drawn = np.array([*range(63), 2**32 - 1]), []
    for devices, size in ((1, 1), (1, 7), (1, 64), (8, 8), (8, 64)):
        exp = tiny.build(devices=devices)
        draw, params = batches.Sampler(exp, batch_size=size), params_of(exp)
        drawn.append(np.concatenate([draw(params, seeds[i : i + size]).images for i in range(0, 64, size)]))
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])
    noise = drawn[0] / 80
    assert len(np.unique(noise[:, 0, 0])) == 64
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=5 / np.sqrt(noise.size))
    correlation = np.corrcoef(noise.reshape(64, -1)) - np.eye(64)
    assert np.abs(correlation).max() < 6 / np.sqrt(784)


def test_class_is_the_seeds_own_or_the_one_asked_for():
    exp = tiny.build(Labels(), sample__batch_size=200)
    draw, params = batches.Sampler(exp), params_of(exp, size=0)
    own = draw(params, np.arange(200))
    np.testing.assert_allclose(own.images[:, 0, 0, 0], expected_class_image(own.labels), atol=1)
    counts = np.bincount(own.labels, minlength=10)
    assert np.sum((counts - 20) ** 2 / 20) < 27.9  # χ² with 9 degrees of freedom, p = 0.001
    asked = draw(params, np.arange(4), np.array([3, -1, 9, -1]))
    assert asked.labels.tolist() == [3, own.labels[1], 9, own.labels[3]]
    np.testing.assert_allclose(asked.images[:, 5, 5, 0], expected_class_image(asked.labels), atol=1)


class Traced(nn.Module):
    """The linear network; notes each time it is traced."""

    traces = []  # noqa: RUF012

    @nn.compact
    def __call__(self, *args, train=False, **labels):
        Traced.traces.append(args[0].shape)
        return tiny.Linear()(*args, **labels)


def test_one_compilation_for_many_batches_and_other_weights():
    exp = tiny.build(Traced())
    draw, weights = batches.Sampler(exp, batch_size=8), [params_of(exp, np.random.default_rng(k)) for k in range(5)]
    draw(weights[0], np.arange(8))
    traces, seconds = len(Traced.traces), draw.compile_seconds
    for first, params in enumerate(weights):
        draw(params, np.arange(first, 8), np.full(8 - first, first))
    assert len(Traced.traces) == traces and draw.compile_seconds == seconds > 0
    with pytest.raises(ValueError, match="9 seeds are more than a batch of 8"):
        draw(params, np.arange(9))


def test_broken_weights_are_named():
    exp = tiny.build()
    draw, params = batches.Sampler(exp, batch_size=8), params_of(exp)
    broken = jax.tree.map(lambda p: p * np.nan, params)
    with pytest.raises(FloatingPointError, match=r"3 of 3 samples are not finite \(the first has seed 41\).*earlier"):
        draw(broken, np.array([41, 3, 12]))
    only_nine = {**params, "class": params["class"].at[9].set(3e38)}  # overflows where the class is 9
    with pytest.raises(FloatingPointError, match=r"1 of 3 samples .* seed 3\)"):
        draw(only_nine, np.array([41, 3, 12]), np.array([1, 9, 2]))
    assert draw(only_nine, np.array([41]), np.array([1])).images.any()  # padding counts for nothing


@pytest.mark.parametrize(("solver", "steps", "nfe"), [("heun", 4, 7), ("euler", 3, 3), ("multistep", 5, 5)])
def test_nfe_is_what_was_evaluated(solver, steps, nfe):
    """Counted by calls to the host while it runs; 2 N - 1 for Heun is from the EDM paper."""
    calls = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, *args, train=False, **labels):
            jax.debug.callback(lambda: calls.append(1))
            return tiny.Linear()(*args, **labels)

    exp = tiny.build(Counted(), devices=1, sample__solver=solver, sample__steps=steps)
    drawn = batches.Sampler(exp, batch_size=4)(params_of(exp), np.arange(4))
    jax.effects_barrier()
    assert drawn.nfe == len(calls) == nfe


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.config(train__steps=6, train__checkpoint_every=3, train__sample_every=0)
    assert train.train(tiny.with_network(train.prepare(config, folder), tiny.Linear())) == 0
    return folder


@pytest.fixture(autouse=True)
def signals():
    """The handlers of this process as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def sample(workdir, seeds, out="", step=-1, **changes):
    """Exit status of the program."""
    config = tiny.config(**{"train__steps": 6, "sample__batch_size": 8} | changes)
    return generate.sample(tiny.with_network(generate.prepare(config, workdir, seeds, str(out), step), tiny.Linear()))


def stop_after(monkeypatch, number):
    """A real SIGTERM while the batch of that number is drawn."""
    call, count = batches.Sampler.begin, []

    def interrupted(self, *args):
        count.append(1)
        if len(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, *args)

    monkeypatch.setattr(batches.Sampler, "begin", interrupted)
    return count


def png(path):
    return np.asarray(Image.open(path))


def test_folder_npz_and_grid_agree(workdir, tmp_path, capsys):
    assert sample(workdir, "0-9,1234567", tmp_path / "folder") == 0
    said = capsys.readouterr().out
    assert "11 of 11 images to draw, 8 at a time" in said and "NFE 7 (heun, 4 steps)" in said
    assert "images/s" in said and "compiled the sampler in" in said and "checkpoint of step 6" in said
    names = sorted(path.name for path in (tmp_path / "folder").glob("*.png"))
    assert names == [*(f"{i:06d}.png" for i in range(10)), "1234567.png", "grid.png"]
    assert sample(workdir, "0-9,1234567", tmp_path / "all.npz") == 0
    with np.load(tmp_path / "all.npz") as stored:
        images, labels, seeds = stored["images"], stored["labels"], stored["seeds"]
    assert images.shape == (11, 28, 28, 1) and images.dtype == np.uint8 and seeds.tolist() == [*range(10), 1234567]
    assert set(labels) <= set(range(10)) and len(set(labels)) > 2
    for seed, image in zip(seeds, images, strict=True):
        np.testing.assert_array_equal(png(tmp_path / "folder" / f"{seed:06d}.png"), image[..., 0])
    assert sample(workdir, "0-3", tmp_path / "four.png") == 0
    grid = png(tmp_path / "four.png")[::2, ::2]  # two by two, each pixel twice, two white ones between
    assert grid.shape == (58, 58) and (grid[28:30] == 255).all()
    np.testing.assert_array_equal(grid[30:, :28], images[2, ..., 0])


def test_default_out_and_what_is_there_is_kept(workdir, capsys):
    assert sample(workdir, "0-3") == 0
    assert (workdir / "samples" / "000003.png").exists()
    times = {path: path.stat().st_mtime_ns for path in (workdir / "samples").glob("0*.png")}
    capsys.readouterr()
    assert sample(workdir, "0-5") == 0
    assert "2 of 6 images to draw" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert sample(workdir, "0-3", sample__steps=3) == 0  # other settings make other images
    assert "4 of 4 images to draw" in capsys.readouterr().out


@pytest.mark.parametrize("label", [3, -1])
def test_an_npz_with_the_names_of_guided_diffusion(tmp_path, label):
    """`np.savez(path, images, labels)` of its sampling script; without classes no labels."""
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    kept = store.File(tmp_path / "all.npz", {"step": 1}, names="arr")
    kept.add(np.array([7, 5]), store.Samples(images, np.array([label, label]), 3))
    kept.pause()
    again = store.File(tmp_path / "all.npz", {"step": 1}, names="arr")
    assert len(again.missing(np.array([5, 7]))) == 0
    again.finish(np.array([5, 7]))
    with np.load(tmp_path / "all.npz") as stored:
        np.testing.assert_array_equal(stored["arr_0"], images[::-1])
        assert ("arr_1" in stored) == (label >= 0) and "images" not in stored
    assert sources.open_source(str(tmp_path / "all.npz")).images.shape == (2, 4, 4, 3)


@pytest.mark.parametrize("name", ["folder", "all.npz", "grid.png"])
def test_goes_on_after_a_signal(workdir, tmp_path, monkeypatch, capsys, name):
    """With the same bytes in the end as without one."""
    assert sample(workdir, "0-29", tmp_path / "whole" / name) == 0
    with monkeypatch.context() as patch:
        count = stop_after(patch, 2)
        assert sample(workdir, "0-29", tmp_path / name) == 75
    assert len(count) == 2
    assert "SIGTERM: kept what was drawn" in capsys.readouterr().out
    if name != "folder":
        assert not (tmp_path / name).exists()
    assert sample(workdir, "0-29", tmp_path / name) == 0
    assert "14 of 30 images to draw" in capsys.readouterr().out
    if name == "all.npz":
        with np.load(tmp_path / name) as one, np.load(tmp_path / "whole" / name) as other:
            for key in ("images", "labels", "seeds"):
                np.testing.assert_array_equal(one[key], other[key])
    for path in (tmp_path / "whole").rglob("*.png"):
        np.testing.assert_array_equal(png(path), png(tmp_path / path.relative_to(tmp_path / "whole")))
    assert not list(tmp_path.glob("*.partial.npz"))


def test_a_full_disk_ends_it_and_the_same_command_goes_on(workdir, tmp_path, monkeypatch, capsys):
    """A thread finds it full; what is there is whole."""
    save = generate.store.pictures.save_png

    def full(path, image, **scale):
        if path.name == "000009.png":
            raise OSError(28, "No space left on device", str(path))
        save(path, image, **scale)

    with monkeypatch.context() as patch:
        patch.setattr(generate.store.pictures, "save_png", full)
        with pytest.raises(OSError, match=r"No space left on device: .*000009.png"):
            sample(workdir, "0-39", tmp_path)
    there = {path: png(path) for path in tmp_path.glob("0*.png")}
    assert 8 <= len(there) < 24  # the third batch was not begun to be written
    assert not list(tmp_path.glob(".0*"))
    assert sample(workdir, "0-39", tmp_path) == 0
    assert f"{40 - len(there)} of 40 images to draw" in capsys.readouterr().out
    assert all((png(path) == image).all() for path, image in there.items())


def test_a_named_checkpoint_and_settings_of_its_own(workdir, tmp_path, capsys):
    assert sample(workdir, "0-3", tmp_path / "a.npz", step=3, sample__solver="multistep", sample__steps=9) == 0
    said = capsys.readouterr().out
    assert "checkpoint of step 3" in said and "NFE 9 (multistep, 9 steps)" in said
    assert sample(workdir, "0-3", tmp_path / "b.npz", sample__class_label=7) == 0
    with np.load(tmp_path / "b.npz") as stored:
        assert stored["labels"].tolist() == [7] * 4
    assert sample(workdir, "0-3", tmp_path / "c.npz", sample__bnr=0.5) == 0  # as trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample__bnr": 1.0}, r"sample.bnr is 1.0, but this network was trained at BNR 0.5"),
        ({"process__bnr": 1.0}, r"process.bnr was 0.5 and is now 1.0"),
        ({"model__channels": 16}, r"model.channels was 8 and is now 16"),
        ({"sample__class_label": 10}, r"sample.class_label is 10; it must be 0 to 9"),
        ({"sample__solver": "rk4"}, r"unknown solver 'rk4'; choose one of heun, euler, multistep"),
        ({"sample__steps": 0}, r"sample.steps is 0; it must be from 1 to 10,000"),
        ({"step": 4}, r"no checkpoint of step 4 in .*; there are \[3, 6\]"),
    ],
)
def test_what_does_not_fit_is_refused(workdir, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        sample(workdir, "0-3", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_pictures_is_left_alone(workdir, tmp_path):
    """Only what sampling made is replaced, as samples.json says."""
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "000001.png")
    with pytest.raises(ValueError, match="not made by --mode=sample; name another --out"):
        sample(workdir, "0-3", tmp_path)
    assert png(tmp_path / "000001.png").shape == (4, 4)


@pytest.mark.parametrize("step", [-1, 6])
def test_damaged_weights(workdir, tmp_path, capsys, step):
    """The latest is passed over for the one before; one that was asked for by name is an error."""
    import shutil

    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "6" / "ema")
    if step == -1:
        assert sample(copy, "0-3", tmp_path / "out") == 0
        assert "checkpoint of step 3" in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match=r"checkpoint 6 in .* cannot be read"):
            sample(copy, "0-3", tmp_path / "out", step=6)
