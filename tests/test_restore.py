"""Restoring by exact predictors, against filters and posteriors in closed form; and the program, on files made here."""

import dataclasses
import functools
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import flags as absl_flags
from absl.testing import flagsaver
from PIL import Image
from scipy import fft, ndimage

from warm_jax import main
from warm_jax.cli import flags
from warm_jax.diffusion import oracle
from warm_jax.experiments import experiment
from warm_jax.models import denoiser
from warm_jax.restoration import before_after, limits, posterior, restore
from warm_jax.runtime import checkpoint, mesh, workdirs
from warm_jax.sampling import runs

# ── Exact predictors ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Gaussian(denoiser.Denoiser):
    """Knows that images are Gaussian with this DCT power, and nothing else: the restoration is a Wiener filter."""

    power: np.ndarray = None

    def predict(self, params, x, t, class_labels=None, augment_labels=None, dropout_key=None):
        return oracle.gaussian(self.process, self.power)(x, t)


def lam(height, width):
    return np.pi**2 * ((np.arange(height)[:, None] / height) ** 2 + (np.arange(width) / width) ** 2)


def gaussian(power, system="amortised", batch_size=16, devices=1, **changes):
    """A restorer by the Gaussian oracle."""
    config = tiny.config(system, data__num_classes=0, data__channels=changes.pop("channels", 1), **changes)
    exp = tiny.on_devices(experiment.build(config), devices)
    model = Gaussian(**{f.name: getattr(exp.model, f.name) for f in dataclasses.fields(exp.model)}, power=power)
    return posterior.Restorer(dataclasses.replace(exp, model=model), {}, batch_size)


POWER = 0.05 / (lam(28, 28) + 0.02)
FLAT = np.full((28, 28), 0.3)


def noisy(shape, seed=0):
    return (0.5 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 0.2), (0.3, 0.6), (0.0, 0.1), (5.0, 0.5)])
def test_the_mean_is_the_wiener_filter(alpha, beta):
    """P a / (P a² + s²) for each frequency, by scipy in float64. One program for all levels."""
    restoring, x = gaussian(POWER), noisy((28, 28, 1))
    a = np.exp(-(alpha**2) * lam(28, 28) / 2)
    z = fft.dctn(x[..., 0].astype(np.float64), norm="ortho")
    expected = fft.idctn(POWER * a / (POWER * a**2 + beta**2) * z, norm="ortho")
    np.testing.assert_allclose(restoring(x, alpha, beta)[..., 0], expected, atol=2e-5)


def test_a_model_of_one_line_restores_on_it():
    """Warm at BNR 0.5: at β = 0.6 the blur is 0.3."""
    x, a = noisy((28, 28, 1)), np.exp(-(0.3**2) * lam(28, 28) / 2)
    expected = fft.idctn(
        POWER * a / (POWER * a**2 + 0.36) * fft.dctn(x[..., 0].astype(np.float64), norm="ortho"), norm="ortho"
    )
    np.testing.assert_allclose(gaussian(POWER, "warm")(x, 0.3, 0.6)[..., 0], expected, atol=2e-5)


@pytest.mark.parametrize("size", [(28, 28), (61, 75), (9, 40), (100, 30)])
def test_large_and_small_images_of_any_size(size):
    """Of white images P / (P + s²) for each pixel; tile by tile, on two devices."""
    restoring, x = gaussian(FLAT, devices=2), noisy((*size, 1))
    np.testing.assert_allclose(restoring(x, 0.0, 0.4), x * 0.3 / (0.3 + 0.16), atol=2e-6)


def test_one_compilation_for_all_sizes_and_levels():
    restoring, compiled = gaussian(FLAT), []

    def listen(event, duration, **details):
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    restoring(noisy((28, 28, 1)), 0.1, 0.3)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for size, alpha, beta in [((40, 33), 1.0, 0.2), ((90, 28), 0.0, 0.5), ((5, 5), 2.0, 0.7)]:
            restoring(noisy((*size, 1)), alpha, beta)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_channels_that_the_model_has_not():
    """RGB on grey: one by one. Grey on RGB: a state of √3 β, of which the mean of the channels has the noise β.

    Of Gaussian images whose channels are independent, and so have means of power P / 3: the same filter as for
    P, √3 β.
    """
    grey, colour = noisy((30, 41, 1)), noisy((30, 41, 3), 1)
    for channels, other, noise in ((1, colour, 0.16), (3, grey, 3 * 0.16)):
        restoring = gaussian(FLAT, channels=channels, devices=2, sample__steps=1)
        expected = other * 0.3 / (0.3 + noise)
        np.testing.assert_allclose(restoring(other, 0.0, 0.4), expected, atol=2e-6)
        # One step from β to 0 draws nothing: it is the mean.
        np.testing.assert_allclose(restoring.samples(other, 0.0, 0.4, 2), np.stack([expected] * 2), atol=2e-6)


def test_a_grey_image_becomes_a_state_of_a_model_of_colour():
    """White noise of √3 β in each channel, uncorrelated, and its mean the image as it was."""
    restoring, image, seen = gaussian(FLAT, channels=3), noisy((120, 100, 1)) * np.float32(0.4 / 0.5), []
    restoring._in_channels(image, 0.4 * restoring.noise_factor(1), lambda x: seen.append(x) or x)
    covariance = np.cov(seen[0].reshape(-1, 3).T.astype(np.float64))
    np.testing.assert_allclose(covariance, 3 * 0.16 * np.eye(3), atol=5 * 0.48 / np.sqrt(12_000))
    np.testing.assert_allclose(seen[0][0].mean(-1, keepdims=True), image, atol=1e-6)


def test_draws_have_the_mean_and_the_variance_of_the_posterior():
    """Of one tile with blur: for each frequency N(P a z / (P a² + s²), P s² / (P a² + s²)).

    Each of 784 means within 5 standard errors; variances, by steps of first order, within 5 % on the whole.
    """
    alpha, beta, count = 1.0, 0.3, 256
    x, a = noisy((28, 28, 1)), np.exp(-lam(28, 28) / 2)
    drawn = gaussian(POWER, batch_size=256, sample__steps=150).samples(x, alpha, beta, count)[..., 0]
    z = fft.dctn(drawn.astype(np.float64), axes=(1, 2), norm="ortho")
    total = POWER * a**2 + beta**2
    mean, variance = POWER * a / total * fft.dctn(x[..., 0].astype(np.float64), norm="ortho"), POWER * beta**2 / total
    off = (z.mean(0) - mean) / np.sqrt(variance / count)
    ratio = z.var(0, ddof=1) / variance
    assert np.abs(off).max() < 5 and np.mean(off**2) == pytest.approx(1, abs=0.2)
    assert ratio.mean() == pytest.approx(1, abs=0.05)  # standard error 0.003
    assert np.abs(ratio - 1).max() < 0.5  # of one frequency 0.09


def test_draws_spread_alike_at_opposite_borders_and_where_tiles_meet():
    """By symmetry: the law of the image that is turned upside down is the law of the image, turned upside down.

    96 draws of 28 pixels, neighbours alike: the standard error of a row's variance is about 0.04.
    """
    drawn = gaussian(POWER, batch_size=64, sample__steps=12).samples(noisy((36, 28, 1)), 1.0, 0.3, 96)[..., 0]
    rows = drawn.var(0, ddof=1, dtype=np.float64).mean(1)
    assert rows[-1] / rows[0] == pytest.approx(1, abs=0.2)
    assert np.abs(rows[4:-4] / rows[4:-4].mean() - 1).max() < 0.15


@pytest.mark.slow
def test_draws_of_a_large_image_have_no_seams():
    """White images: each pixel's variance is P s² / (P + s²), in the middle of a tile and where tiles meet."""
    restoring = gaussian(FLAT, sample__steps=40, batch_size=60)
    x, count = noisy((45, 53, 1)), 200
    drawn = restoring.samples(x, 0.0, 0.4, count).astype(np.float64)
    variance = 0.3 * 0.16 / 0.46
    np.testing.assert_allclose(drawn.mean(0), x * 0.3 / 0.46, atol=5 * np.sqrt(variance / count))
    ratio = drawn.var(0, ddof=1)[..., 0] / variance
    level = ratio.mean()  # 40 steps of first order take some of it, everywhere the same
    assert level == pytest.approx(1, abs=0.15)
    for lines in (ratio.mean(0), ratio.mean(1)):  # of 45 or 53 pixels, 200 draws: standard error below 0.016
        assert np.abs(lines / level - 1).max() < 0.08


def test_the_large_process_blurs_the_large_image():
    """As scipy's Gaussian does far from the border; the tile's process is of another size."""
    of = experiment.build(tiny.config("warm")).process
    large = posterior._of_size(of, (60, 80, 1))
    x = noisy((1, 60, 80, 1))
    blurred = large.attenuate(jnp.asarray(x), jnp.array([4.0]))
    np.testing.assert_allclose(blurred[0, ..., 0], ndimage.gaussian_filter(x[0, ..., 0], 2.0, truncate=8), atol=1e-3)


def test_a_draw_is_a_function_of_its_number_and_the_image():
    """Bitwise, in other groups of the same size."""
    restoring, x = gaussian(POWER, sample__steps=4), noisy((40, 30, 1))
    many, few = restoring.samples(x, 1.0, 0.3, 9), restoring.samples(x, 1.0, 0.3, 5)
    np.testing.assert_array_equal(many[:5], few)
    assert len({draw.tobytes() for draw in many}) == 9
    other = restoring.samples(x + np.float32(1e-3), 1.0, 0.3, 5)
    assert np.abs(other - few).std() > 0.05  # other noise


def test_levels_of_draws():
    """EDM's grid, squeezed: from the photograph's noise to the least trained, exp(P_mean - 3 P_std)."""
    restoring, k = gaussian(POWER, sample__steps=9), np.arange(9) / 8
    expected = (0.3 ** (1 / 7) + k * (np.exp(-4.8) ** (1 / 7) - 0.3 ** (1 / 7))) ** 7
    np.testing.assert_allclose(restoring.levels(0.3), [*expected, 0])
    np.testing.assert_allclose(restoring.levels(0.008), [0.008, 0])


def test_added_noise():
    x = np.zeros((100, 100, 1), np.float32)
    more = posterior.noisier(x, 0.3, 0.5)
    assert more.std() == pytest.approx(0.4, rel=0.03)  # 0.3² + 0.4² = 0.5²
    np.testing.assert_array_equal(more, posterior.noisier(x, 0.3, 0.5))


def test_too_many_pixels_to_draw(monkeypatch):
    monkeypatch.setattr(posterior, "SAMPLE_PIXELS", 999)
    with pytest.raises(ValueError, match=r"40×30 pixels are too many .* the limit is 999; .* --estimate=mean"):
        gaussian(POWER).samples(noisy((30, 40, 1)), 1.0, 0.3, 1)
    monkeypatch.setattr(posterior, "SAMPLE_NUMBERS", 28 * 28 * 5 - 1)
    with pytest.raises(ValueError, match=r"5 draws are too many numbers at once, the limit is 3,919; ask for fewer"):
        gaussian(POWER).samples(noisy((5, 28, 1)), 1.0, 0.3, 5)


def test_too_long_to_draw():
    """A matrix of a side's frequencies would be of terabytes; what is counted is mirrored up to a tile."""
    restoring = gaussian(POWER)
    with pytest.raises(ValueError, match="4194304×28 pixels are too many"):
        restoring.samples(np.zeros((1, 1 << 22, 1), np.float32), 1.0, 0.3, 1)
    with pytest.raises(ValueError, match=r"a side of 8193 pixels is too long .* limit is 8,192"):
        restoring.samples(np.zeros((8193, 3, 1), np.float32), 1.0, 0.3, 1)


@pytest.mark.parametrize(
    ("channels", "alpha", "beta", "count", "named"),
    [
        (1, 1.0, 0.0, 1, "beta=0.0; noise must be more than 0"),
        (1, 1.0, np.nan, 1, "beta=nan"),
        (1, 1.0, np.inf, 1, "beta=inf"),
        (1, -0.1, 0.1, 1, "alpha=-0.1; blur must be a number of pixels, at least 0"),
        (1, np.nan, 0.1, 1, "alpha=nan"),
        (2, 1.0, 0.1, 1, r"shape \(30, 30, 2\); it must be \[height, width, channels\], of 1 or 3 channels"),
        (4, 1.0, 0.1, 1, "of 1 or 3 channels"),
        (1, 1.0, 0.1, 0, "0 draws; it must be at least 1"),
    ],
)
def test_what_is_no_photograph(channels, alpha, beta, count, named):
    restoring, image = gaussian(FLAT), noisy((30, 30, channels))
    with pytest.raises(ValueError, match=named):
        restoring.samples(image, alpha, beta, count)
    if count:
        with pytest.raises(ValueError, match=named):
            restoring(image, alpha, beta)


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────

UNTRAINED = {"data__num_classes": 0, "model__preconditioning": "spectral"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A U-Net with Wiener filters in its preconditioning, whose own outputs are 0: it is the Wiener filter of POWER."""
    folder, config = tmp_path_factory.mktemp("untrained"), tiny.config("amortised", **UNTRAINED)
    exp = experiment.build(config)
    shapes = jax.eval_shape(exp.model.init, jax.random.key(0))
    zeros = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), mesh.replicated(exp.mesh))
    workdirs.save_config(config, folder)
    workdirs.save_measured({"power": POWER}, folder)
    checkpoint.Checkpoints(folder / "checkpoints").save(3, None, zeros, wait=True)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A folder of photographs: a grey one, a coloured one larger than a tile, and one smaller than a tile."""
    folder, rng = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    for name, shape in (("a", (40, 33)), ("b", (30, 64, 3)), ("c", (20, 28))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def run(monkeypatch, workdir, capsys):
    """The command line in this process: arguments -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(main.pathlib.Path(main.__file__).parent.parent)
    build = runs.build
    monkeypatch.setattr(runs, "build", lambda *given: tiny.on_devices(build(*given), 1))  # compiles in half the time
    quick = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=quick))

    def call(*arguments, system="amortised"):
        config = [f"--config=configs/smoke.py:{system}", f"--workdir={workdir}", "--mode=restore"]
        if system == "amortised":
            config += [f"--config.{key.replace('__', '.')}={value}" for key, value in UNTRAINED.items()]
        with flagsaver.flagsaver():
            absl_flags.FLAGS.unparse_flags()
            monkeypatch.setattr(sys, "argv", ["main", *config, *map(str, arguments)])
            capsys.readouterr()
            try:
                status = main.main(flags.parse(sys.argv))
            except SystemExit as error:
                status = error.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


LEVELS = ("--blur=1", "--noise=25/255")
HEADS = 23  # pixels of the headings of before_after.png


def test_a_folder_from_the_command_line(run, pictures, tmp_path):
    out = tmp_path / "out"
    status, said, err = run(f"--images={pictures}", f"--out={out}", *LEVELS)
    assert status == 0, err
    assert "a.png: 33×40, blur 1 px, noise 0.196 (25/255), BNR 5.1" in said and "3 of 3 are in" in said
    assert sorted(path.name for path in out.iterdir()) == [
        "a.png",
        "b.png",
        "before_after.png",
        "c.png",
        "restore.json",
    ]
    for name in ("a", "b", "c"):
        assert Image.open(out / f"{name}.png").size == Image.open(pictures / f"{name}.png").size
    note = json.loads((out / "restore.json").read_text())
    entry = note["images"]["b.png"]
    made_with = note["made_with"][entry["made_with"]]
    assert made_with["checkpoint_step"] == 3 and len(made_with["weights"]) == 64
    assert (entry["width"], entry["height"], entry["bits"], entry["estimated"]) == (64, 30, 8, [])
    assert entry["restored_as"] == pytest.approx({"alpha": 1, "beta": 25 / 127.5, "bnr": 5.1})
    times = {path: path.stat().st_mtime_ns for path in out.glob("?.png")}
    Image.open(pictures / "c.png").point(lambda v: 255 - v).save(pictures / "c.png")
    assert run(f"--images={pictures}", f"--out={out}", *LEVELS)[0] == 0  # what is the same is kept
    assert [path.name for path, time in times.items() if path.stat().st_mtime_ns != time] == ["c.png"]
    times = {path: path.stat().st_mtime_ns for path in out.glob("?.png")}
    assert run(f"--images={pictures / 'a.png'}", f"--out={out}", "--blur=2", "--noise=25/255")[0] == 0
    assert [path.name for path, time in times.items() if path.stat().st_mtime_ns != time] == ["a.png"]  # made anew


def wiener(image, alpha, beta):
    """By scipy in float64, of an image of the model's size."""
    a = np.exp(-(alpha**2) * lam(28, 28) / 2)
    z = fft.dctn(image.astype(np.float64), axes=(0, 1), norm="ortho")
    gain = (POWER * a / (POWER * a**2 + beta**2)).reshape(28, 28, *[1] * (image.ndim - 2))
    return fft.idctn(gain * z, axes=(0, 1), norm="ortho")


def test_from_file_to_file_it_is_the_wiener_filter(run, tmp_path):
    """The network being silent. Rounded to 8 and to 16 bits; in colour, each channel by itself."""
    folder, rng = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    stored = {
        "grey": rng.integers(0, 256, (28, 28), np.uint8),
        "colour": rng.integers(0, 256, (28, 28, 3), np.uint8),
        "deep": rng.integers(0, 2**16, (28, 28), np.uint16),
        "alike": rng.integers(0, 256, (28, 28, 1), np.uint8).repeat(3, 2),
    }
    for name, array in stored.items():
        Image.fromarray(array).save(folder / f"{name}.png")
    status, said, _ = run(f"--images={folder}", f"--out={tmp_path / 'out'}", *LEVELS)
    assert status == 0 and said.count("grey, stored as RGB") == 1 and said.count("colours one by one") == 1
    for name, array in stored.items():
        half = np.iinfo(array.dtype).max / 2
        expected = half * (np.clip(wiener(array / half - 1, 1.0, 25 / 127.5), -1, 1) + 1)
        found = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert found.dtype == array.dtype and np.abs(expected - found).max() <= 0.5 + half * 1e-4, name


@pytest.mark.slow
def test_draws_from_the_command_line(run, pictures, tmp_path):
    out = tmp_path / "out"
    arguments = (f"--images={pictures / 'b.png'}", f"--out={out}", "--estimate=sample", "--count=2", *LEVELS)
    status, _, err = run(*arguments)
    assert status == 0, err
    draws = [np.asarray(Image.open(out / f"b_{i}.png")).astype(int) for i in range(2)]
    assert draws[0].shape == (30, 64, 3) and np.abs(draws[0] - draws[1]).mean() > 1
    shown = np.asarray(Image.open(out / "before_after.png"))
    assert shown.shape == (HEADS + 256 + 6, 8 * len("b.png") + 16 + 3 * 256 + 4, 3)  # the image and two draws


def test_broken_images_do_not_stop_the_others(run, pictures, tmp_path):
    (pictures / "text.png").write_text("this is no image")
    content = (pictures / "b.png").read_bytes()
    (pictures / "cut.png").write_bytes(content[: len(content) // 2])
    (pictures / "a.jpg").write_bytes(b"")
    status, said, err = run(f"--images={pictures}", f"--out={tmp_path / 'out'}", *LEVELS)
    assert status == 1 and "3 of 6 are in" in said
    for name in ("text.png", "cut.png", "a.jpg"):
        assert f"WARNING: {name}: not a readable PNG, JPEG or WebP" in err
    note = json.loads((tmp_path / "out" / "restore.json").read_text())
    assert set(note["failures"]) == {"text.png", "cut.png", "a.jpg"} and set(note["images"]) == {
        "a.png",
        "b.png",
        "c.png",
    }
    assert (tmp_path / "out" / "a_png.png").exists()  # two images of one stem: by their whole names


@pytest.fixture
def copying(run, monkeypatch):
    """The command line with a restorer that leaves images as they are: it loads and compiles nothing."""
    monkeypatch.setattr(runs, "load_ema", lambda source: (3, {}))
    monkeypatch.setattr(posterior.Restorer, "__call__", lambda self, image, alpha, beta: image)
    monkeypatch.setattr(posterior.Restorer, "samples", lambda self, image, a, b, count: np.stack([image] * count))
    return run


def pixels(path):
    return np.asarray(Image.open(path)).tolist()


def test_each_draw_becomes_a_file(copying, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(
        posterior.Restorer, "samples", lambda self, x, a, b, n: np.stack([np.full_like(x, v) for v in (-1, 0, 1, 2)])
    )
    out = tmp_path / "out"
    status, said, _ = copying(f"--images={pictures / 'b.png'}", f"--out={out}", "--estimate=sample", *LEVELS)
    assert status == 0 and "by ancestral steps (4)" in said  # of configs/smoke.py: Heun, 4 steps
    assert "sample.solver=heun would not draw" in said and "vary too little; for their right spread" in said
    for i, value in enumerate((0, 128, 255, 255)):
        np.testing.assert_array_equal(pixels(out / f"b_{i}.png"), np.full((30, 64, 3), value))
    shown = np.asarray(Image.open(out / "before_after.png"))
    left = 8 * len("b.png") + 16
    assert shown.shape == (HEADS + 256 + 6, left + 4 * 256 + 6, 3)  # the image and three draws
    assert (shown[:HEADS] < 128).any(axis=(0, 2)).nonzero()[0].max() > left + 3 * 258  # a text above the last, too
    assert (shown[HEADS:, :left] < 128).any()  # and the file's name at the left
    shown = shown[HEADS:, left:]
    before = Image.open(pictures / "b.png").resize((256, 120), 0)
    np.testing.assert_array_equal(shown[68:188, :256], np.asarray(before))
    assert shown[128, 300:1000:258].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_results_of_other_photographs_stay(copying, pictures, tmp_path):
    """Whatever the settings, the folder and the name; a rerun of the first keeps them too."""
    out, other, before = tmp_path / "out", tmp_path / "other", pixels(pictures / "a.png")
    assert copying(f"--images={pictures / 'a.png'}", f"--out={out}", "--blur=1", "--noise=0.2")[0] == 0
    assert copying(f"--images={pictures / 'b.png'}", f"--out={out}", "--blur=2", "--noise=0.2")[0] == 0
    other.mkdir()
    for name in ("a.png", "a.jpg"):
        Image.fromarray(np.full((40, 40), 7, np.uint8)).save(other / name)
        status, said, err = copying(f"--images={other / name}", f"--out={out}", "--blur=1", "--noise=0.2")
        assert status == 1 and "0 of 1 are in" in said
        named = f"WARNING: {name}: a.png there is the result of {(pictures / 'a.png').resolve()}; name another --out"
        assert named in err
    assert pixels(out / "a.png") == before and pixels(out / "b.png") == pixels(pictures / "b.png")
    (other / "a.png").write_bytes((pictures / "a.png").read_bytes())  # the same photograph, moved
    for folder in (pictures, other):
        status, said, _ = copying(f"--images={folder / 'a.png'}", f"--out={out}", "--blur=1.0", "--noise=51/510")
        assert status == 0 and "0 images restored" in said and "1 of 1 are in" in said


def test_a_result_stays_until_the_next_is_made(copying, pictures, tmp_path):
    """The photograph being broken now; it is none of those that are counted and shown."""
    out, before = tmp_path / "out", pixels(pictures / "a.png")
    (pictures / "b.png").unlink()
    (pictures / "c.png").unlink()
    assert copying(f"--images={pictures}", f"--out={out}", *LEVELS)[0] == 0
    (out / "before_after.png").unlink()
    for make in (lambda path: path.write_text("this is no image"), lambda path: (path.unlink(), os.mkfifo(path))):
        make(pictures / "a.png")
        status, said, err = copying(f"--images={pictures}", f"--out={out}", *LEVELS)
        assert status == 1 and "0 of 1 are in" in said and "WARNING: a.png: not a" in err
        assert pixels(out / "a.png") == before and not (out / "before_after.png").exists()


def test_a_sheet_of_what_can_be_read(pictures):
    """One of two rows: a photograph, and a result that is gone or broken meanwhile, fail alone."""
    (pictures / "text.png").write_text("this is no image")
    rows = [[pictures / "a.png", pictures / "d.png"], [pictures / "text.png", pictures / "a.png"]]
    before_after.write(pictures / "sheet.png", rows)
    assert not (pictures / "sheet.png").exists()
    before_after.write(pictures / "sheet.png", [*rows, [pictures / "b.png", pictures / "c.png"]])
    found = np.asarray(Image.open(pictures / "sheet.png"))
    found = found[HEADS:, 8 * len("b.png") + 16 :]
    assert found.shape == (256 + 6, 514, 3)  # c.png, of 28×20 pixels, is grey, and 9 times as large
    grey = np.asarray(Image.open(pictures / "c.png").resize((252, 180), 0))
    np.testing.assert_array_equal(found[38:218, 260:512], np.stack([grey] * 3, 2))


def test_a_long_name_is_shortened_in_its_middle():
    assert before_after.short("a.png") == "a.png" and before_after.short("x" * 24) == "x" * 24
    assert before_after.short("IMG_20240102_panorama_of_the_valley.jpeg") == "IMG_2024010..valley.jpeg"
    assert before_after.short("br\udce9.png") == "br?.png"  # a byte of the disk's that is no UTF-8


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_it_goes_on_after_a_full_disk_or_a_crash(copying, pictures, tmp_path, monkeypatch, error):
    """Where some results of an image are written, and the note was not."""
    write, arguments = workdirs.write_atomically, (f"--images={pictures / 'a.png'}", f"--out={tmp_path / 'out'}")

    def full(path, content):
        if path.name == "a_1.png":
            raise error
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(workdirs, "write_atomically", full)
        if isinstance(error, OSError):
            assert copying(*arguments, "--estimate=sample", *LEVELS)[0] == 1
        else:
            with pytest.raises(KeyboardInterrupt):
                copying(*arguments, "--estimate=sample", *LEVELS)
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["a_0.png"]
    assert copying(*arguments, "--estimate=sample", "--count=2", *LEVELS)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("a*.png")) == ["a_0.png", "a_1.png"]
    assert copying(*arguments, *LEVELS)[0] == 0
    assert [path.name for path in (tmp_path / "out").glob("a*.png")] == ["a.png"]


def test_results_whose_names_change(copying, pictures, tmp_path):
    """A second image of one stem comes, and goes again."""
    out, expected = tmp_path / "out", (["a.png"], ["a_jpg.png", "a_png.png"], ["a.png", "a_jpg.png"])
    for names in expected:
        if len(names) == 2 and names[1] == "a_png.png":
            Image.open(pictures / "a.png").save(pictures / "a.jpg")
        else:
            (pictures / "a.jpg").unlink(missing_ok=True)
        assert copying(f"--images={pictures}", f"--out={out}", *LEVELS)[0] == 0
        assert sorted(path.name for path in out.glob("a*.png")) == names


def test_links_to_results_are_not_restored_over_them(run, pictures, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.png").symlink_to(pictures / "a.png")
    status, _, err = run(f"--images={links}", f"--out={pictures}", *LEVELS)
    assert status == 2 and "is the folder of the images" in err


def test_estimated_levels(run, tmp_path):
    """Noise by which an image was made is found; an image too small for that fails alone, with the remedy."""
    folder, rng = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    noisy_ = 128 + 30 * np.sin(np.arange(64) / 9)[:, None] + 20 * rng.standard_normal((64, 64))
    Image.fromarray(np.clip(noisy_, 0, 255).astype(np.uint8)).save(folder / "a.png")
    Image.fromarray(np.full((20, 20), 99, np.uint8)).save(folder / "b.png")
    status, said, err = run(f"--images={folder}", f"--out={tmp_path / 'out'}", "--blur=0")
    assert status == 1 and "WARNING: b.png: 20×20 pixels tell too little" in err
    entry = json.loads((tmp_path / "out" / "restore.json").read_text())["images"]["a.png"]
    assert entry["noise"] * 127.5 == pytest.approx(20, rel=0.1) and entry["estimated"] == ["noise"]
    assert "(noise estimated)" in said


def test_noise_is_added_where_that_was_asked_for(run, pictures, tmp_path):
    """The largest BNR of configs/smoke.py:amortised is 10."""
    arguments = (f"--images={pictures / 'a.png'}", f"--out={tmp_path / 'out'}", "--blur=3", "--noise=0")
    status, said, err = run(*arguments)
    assert status == 2 and err.startswith("error: noise 0 is below the least") and "--add_noise" in err
    status, said, err = run(*arguments, "--add_noise")
    assert status == 0 and "noise was added, from 0 up to 0.3" in said


def test_goes_on_after_a_signal(run, pictures, tmp_path, monkeypatch):
    """The image at hand is finished; the same command does the others."""
    call, out = posterior.Restorer.__call__, tmp_path / "out"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return call(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(posterior.Restorer, "__call__", interrupted)
        status, said, _ = run(f"--images={pictures}", f"--out={out}", *LEVELS)
    assert status == 75 and "SIGTERM: kept what was restored" in said
    assert {number: signal.getsignal(number) for number in before} == before
    assert [path.name for path in out.glob("?.png")] == ["a.png"]
    first = (out / "a.png").stat().st_mtime_ns
    status, said, _ = run(f"--images={pictures}", f"--out={out}", *LEVELS)
    assert status == 0 and "2 images restored" in said and "3 of 3" in said
    assert (out / "a.png").stat().st_mtime_ns == first


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), ("--mode=restore needs --images=FOLDER",)),
        (("--images=nowhere",), ("nowhere", "no such file or folder")),
        (("--images={0}", "--blur=much"), ("--blur=much", "auto")),
        (("--images={0}", "--noise=25/0"), ("--noise=25/0", "25/255")),
        (("--images={0}", "--blur=0", "--noise=0"), ("nothing to restore", "--blur=PIXELS")),
        (("--images={0}", "--blur=9", "--noise=0.1"), ("ratio of 90", "from 0.05 to 10", "--add_noise")),
        (("--images={0}", "--blur=0", "--noise=60"), ("noise 60 is above the most", "11", "three P_std from P_mean")),
        (("--images={0}", "--count=0", "--estimate=sample"), ("--count=0", "from 1 to 10,000")),
        (("--images={0}", "--estimate=median"), ("median", "mean")),
        (("--images={0}", "--out={0}"), ("is the folder of the images",)),
        (("--images={0}/a.png", "--out={0}"), ("is the folder of the images",)),
        (("--images={0}", "--out={0}/a.png"), ("a.png is a file; name a folder",)),
        (("--images={0}", "--out={0}/../restored.PNG"), ("restored.PNG would be a folder", "name a folder")),
        (("--images={0}", "--blur=150"), ("blur 150 px is more than this model knows, 110 px at its most noise",)),
        (("--images={0}", "--noise=65535/1"), ("noise 1.31e+05 is above the most", "three P_std from P_mean")),
        (("--images={0}", "--checkpoint=7"), ("no checkpoint of step 7", "3")),
        (("--images={0}", "--config.sample.guidance=2"), ("sample.guidance is 2", "leave it at 1")),
        (("--images={0}", "--config.model.channels=16"), ("model.channels was 8 and is now 16",)),
    ],
)
def test_wrong_input(run, pictures, arguments, named):
    before = sorted(pictures.iterdir())
    status, _, err = run(*(text.format(pictures) for text in arguments))
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    for text in named:
        assert text in err, err
    assert sorted(pictures.iterdir()) == before


@pytest.mark.parametrize("system", ["ddpm", "blurring", "ihdm", "cold", "pfgmpp"])
def test_systems_that_cannot(run, pictures, system):
    status, _, err = run(f"--images={pictures}", *LEVELS, system=system)
    assert status == 2 and f"a {system} model cannot restore photographs" in err and ":amortised" in err


def test_files_that_were_not_made_here_stay(run, pictures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"mine")
    status, _, err = run(f"--images={pictures}", f"--out={tmp_path / 'out'}", *LEVELS)
    assert status == 2 and "b.png is there and was not made by --mode=restore" in err
    assert (tmp_path / "out" / "b.png").read_bytes() == b"mine"


def test_a_damaged_note(run, pictures, tmp_path):
    (tmp_path / "out").mkdir()
    entry = (
        '{"made_with": {}, "images": {"a.png": {"made_with": "", "source": "", "sha256": "", "finished": true, %s}}}'
    )
    wrong = ('"../a.png"', '""', '".."', '"restore.json"', '"before_after.png"', "7")
    for damaged in ("{", "[]", *(entry % f'"outputs": [{name}]' for name in wrong), entry % '"outputs": ""'):
        (tmp_path / "out" / "restore.json").write_text(damaged)
        status, _, err = run(f"--images={pictures}", f"--out={tmp_path / 'out'}", *LEVELS)
        assert status == 2 and "restore.json is damaged" in err


@pytest.mark.parametrize(
    ("system", "changes", "least", "most"),
    [
        ("amortised", {}, np.exp(-1.2 - 3.6), np.exp(-1.2 + 3.6)),
        ("warm", {"process__beta_min": 0.05, "process__beta_max": 5.0}, 0.05, 5.0),
        ("hot", {"process__P_std": 0.5}, np.exp(-2.7), np.exp(0.3)),
    ],
)
def test_the_limits_of_a_model(system, changes, least, most):
    found = restore.limits_of(experiment.build(tiny.config(system, **changes)))
    assert (found.least, found.most) == pytest.approx((least, most))
    assert ("beta_min" in found.why_least, "beta_max" in found.why_most) == (least == 0.05, most == 5.0)
    blur = {"amortised": 10.0, "warm": 0.5, "hot": 0.0}[system]  # configs/systems.py
    assert found.most_blur(1.0) == pytest.approx(blur)
    assert isinstance(found, limits.Limits) and found.zero == (system == "amortised")


def test_two_images_of_one_result(tmp_path):
    names = [tmp_path / name for name in ("a.png", "a.jpg", "a_png.png", "before_after.png")]
    with pytest.raises(ValueError, match=r"a_png\.png would be the result of two images"):
        restore._outputs(restore._names(names), restore.Asked(""))
    found = restore._outputs(restore._names([names[0], names[1], names[3]]), restore.Asked(""))
    assert list(found.values()) == [("a_png.png",), ("a_jpg.png",), ("before_after_png.png",)]


def test_photographs_in_subfolders(copying, pictures, tmp_path):
    """Those that prepare reads: below the folder, behind links, of equal names; not what was restored before."""
    for name in ("holiday", "work"):
        (pictures / name).mkdir()
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(pictures / name / "1.png")
    (tmp_path / "far").mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "far" / "2.webp", lossless=True)
    (pictures / "linked").symlink_to(tmp_path / "far")
    out = pictures / "restored"
    for fresh in (6, 0):
        status, said, err = copying(f"--images={pictures}", f"--out={out}", "--blur=1.0", "--noise=51/510")
        assert status == 0 and f"{fresh} images restored" in said and "6 of 6 are in" in said, err
    written = {path.name for path in out.iterdir()}
    assert {"holiday_1_png.png", "work_1_png.png", "2.png", "a.png"} <= written
    (pictures / "gone.png").symlink_to("nowhere")
    status, said, err = copying(f"--images={pictures}", f"--out={out}", "--blur=1.0", "--noise=51/510")
    assert status == 1 and "gone.png: not a file, or a link that leads nowhere" in err and "6 of 7" in said


def test_a_network_that_knows_classes_is_told_none(run, pictures, tmp_path, workdir):
    """Which it never saw, unless classes were hidden from it; so the program says."""
    config, asked = tiny.config("amortised", **UNTRAINED), restore.Asked(str(pictures), "1", "0.2")
    run_ = restore.prepare(config, workdir, asked, str(tmp_path / "out"), -1)
    assert restore._said_before(run_) == [] and isinstance(run_.source, runs.Run)
    exp = tiny.build()
    run_ = dataclasses.replace(run_, source=dataclasses.replace(run_.source, experiment=exp))
    assert "never saw an image without its class" in restore._said_before(run_)[0]
