"""Every number of a config reaches what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config

from warm_jax.diffusion import bnr, loss
from warm_jax.experiments import experiment, family
from warm_jax.runtime import pictures, workdirs
from warm_jax.training import preview


def build(**changes):
    return experiment.build(config(**changes))


def test_process_settings_reach_the_process(key):
    p = build(process__bnr=1.5, process__P_mean=0.4, process__P_std=0.3).process
    np.testing.assert_allclose(p.blur(jnp.asarray([2.0])), [3.0])
    drawn = np.log(p.draw_levels(key, 20_000))
    assert abs(drawn.mean() - 0.4) < 0.01 and abs(drawn.std() - 0.3) < 0.01
    grid = build(process__beta_min=0.1, process__beta_max=10.0, process__rho=1.0).process.levels(3)
    np.testing.assert_allclose(grid, [10, 5.05, 0.1, 0])


def test_model_settings_reach_the_model():
    exp = build(model__sigma_data=0.7, model__dropout=0.3, model__dtype="bfloat16", model__remat=(4,))
    np.testing.assert_allclose(exp.model.preconditioning.weight(jnp.asarray([2.0])), [(4 + 0.49) / 1.4**2], rtol=1e-6)
    network = exp.model.network
    assert (network.dropout, network.dtype, network.remat) == (0.3, jnp.bfloat16, (4,))
    assert network.out_channels == 2 and network.second_condition and network.augment_labels == 0
    hot = build(process__bnr=0.0)
    assert hot.model.network.out_channels == 1 and not hot.process.blurs


def test_the_budget_follows_the_spectrum():
    spectrum = 1 / (1 + np.arange(28)[:, None] ** 2 + np.arange(28) ** 2)
    made = config(process__schedule="information_budget", process__information_budget=0.2)
    alpha = experiment.build(made, family.Measured(spectrum)).process.blur(jnp.asarray([0.0, 0.3]))
    flat = experiment.build(made, family.Measured(np.ones((28, 28)))).process.blur(jnp.asarray([0.0, 0.3]))
    assert alpha[0] == 0 and alpha[1] > flat[1] > 0  # less to lose where there is little detail


def test_levels_and_noise_are_drawn_apart(key):
    """With one key for both, the levels would be the first numbers of the noise."""
    p = build().process
    example = loss.draw(p, key, jnp.zeros((16, 28, 28, 1)))
    noise = np.ravel((example.x - example.blurred) / example.t[:, None, None, None])
    level = (np.log(example.t) + 1.2) / 1.2
    assert not np.allclose(level, noise[:16], atol=1e-3) and abs(np.corrcoef(level, noise[:16])[0, 1]) < 0.8


def test_spectrum_is_the_mean_power_of_the_images():
    from warm_jax.data import arrays

    images = np.random.RandomState(0).randint(0, 256, (30, 6, 8, 1)).astype(np.uint8)
    import scipy.fft

    expected = np.mean(scipy.fft.dctn(images / 127.5 - 1, axes=(1, 2), norm="ortho") ** 2, axis=(0, 3))
    np.testing.assert_allclose(experiment.measure(config(), arrays.from_arrays("x", images)).power, expected, rtol=1e-4)
    some = experiment.measure(config(), arrays.from_arrays("x", images), most=2).power
    ends = np.mean(scipy.fft.dctn(images[[0, 29]] / 127.5 - 1, axes=(1, 2), norm="ortho") ** 2, axis=(0, 3))
    np.testing.assert_allclose(some, ends, rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "byte"),
    [(-9.0, 0), (-1.0, 0), (-127 / 127.5, 1), (0.0, 128), (-0.003, 127), (0.999, 255), (1.0, 255), (9.0, 255)],
)
def test_bytes_by_edms_rule(x, byte):
    """trunc(clip(127.5 x + 128, 0, 255)), worked by hand; 127.5 · 0.999 + 128 = 255.37 is clipped."""
    assert int(pictures.to_uint8(jnp.full((1, 1, 1), x))[0, 0, 0]) == byte


def test_bytes_survive_the_round_trip():
    images = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(pictures.to_uint8(pictures.from_uint8(images)), images)


def test_a_grid_has_each_image_in_its_place(tmp_path):
    images = np.stack([np.full((3, 4, 1), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    sheet = pictures.grid(images, columns=2)
    assert sheet.shape == (13, 10, 1) and np.all(sheet[3:5] == 255) and np.all(sheet[10:, 6:] == 255)
    assert [int(sheet[r, c, 0]) for r in (0, 5, 10) for c in (0, 6)] == [10, 20, 30, 40, 50, 255]
    pictures.save_png(tmp_path / "a.png", sheet)
    np.testing.assert_array_equal(pictures.load_png(tmp_path / "a.png"), sheet)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_preview_says_which_class_a_column_is():
    """A column for each of three classes: a text above each, the images under them as they are; else a plain grid."""
    images = np.random.RandomState(0).randint(0, 256, (6, 32, 32, 1)).astype(np.uint8)
    sheet, large = preview.sheet(images, 3, 3), images.repeat(2, 1).repeat(2, 2)
    left, top = 8 * len("class") + 16, 13 + 6
    assert sheet.shape == (top + 2 * 70, left + 3 * 66 - 2, 1)
    for i in range(6):
        y, x = top + i // 3 * 70, left + i % 3 * 66
        np.testing.assert_array_equal(sheet[y : y + 64, x : x + 64], large[i])
        assert (sheet[:top, x : x + 64] < 128).any()
    plain = preview.sheet(images, 3, 0)
    np.testing.assert_array_equal(plain, pictures.grid(images, 3).repeat(2, 0).repeat(2, 1))


def test_key_of_a_seed_does_not_depend_on_the_backend_or_the_process():
    """Threefry is specified bit by bit (Salmon et al. 2011): these words are the same everywhere."""
    assert jax.random.key_data(jax.random.key(7)).tolist() == [0, 7]


@pytest.mark.parametrize(
    ("system", "changes", "message"),
    [
        ("pfgmpp", {"process__augmented_dims": 0.0}, r"augmented_dims is 0.0; it must be from 0.001"),
        ("pfgmpp", {"sample__solver": "stochastic"}, "its noise is not Gaussian.*choose heun or euler or multistep"),
        ("ihdm", {"process__steps": 0}, "process.steps is 0; it must be from 1"),
        ("ihdm", {"sample__solver": "heun"}, "neither ε nor x0; choose perturb"),
        ("ihdm", {"sample__steps": 3}, "it takes 4 steps, not 3"),
        ("ihdm", {"process__start": "zeros"}, "choose one of images, colours"),
        ("cold", {"sample__solver": "ancestral"}, "no score; choose euler or heun"),
        ("cold", {"sample__steps": 301}, "has 300 levels"),
        ("cold", {"process__kernels": "box"}, "choose one of linear, exponential"),
        ("ddpm", {"process__schedule": "sine"}, "choose one of linear, cosine"),
        ("ddpm", {"model__preconditioning": "clean"}, "for ddpm choose one of noise, edm"),
        ("blurring", {"process__d_min": 0.0}, "process.d_min is 0.0"),
        ("amortised", {"process__bnr": 1.0}, "amortised draws it for each image"),
        ("amortised", {"sample__bnr": 20.0}, "trained from 0.05 to 10.0, and at 0"),
        ("amortised", {"sample__bnr": 0.0, "process__bnr_zero": 0.0}, "never saw it"),
        ("warm", {"process__schedule": "sine"}, "choose one of constant, information_budget"),
        ("warm", {"sample__schedule": "information_budget"}, "only an amortised model"),
        ("warm", {"sample__bnr": 1.0}, "was trained at BNR 0.5 and knows no other"),
        ("cold", {"process__bnr": 0.5}, "cold has none"),
    ],
)
def test_what_a_system_cannot_do_is_refused_with_the_choices(system, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(config(system, **changes))


def test_an_amortised_model_is_sampled_at_the_bnr_that_is_asked_for():
    t = jnp.asarray([2.0])
    for asked, alpha in ((None, 1.0), (0.0, 0.0), (3.0, 6.0)):
        exp = experiment.build(config("amortised", sample__bnr=asked))
        np.testing.assert_allclose(exp.sampled.blur(t), [alpha], rtol=1e-6)
        np.testing.assert_allclose(exp.to_sample.preconditioning.conditions(t)[1], np.log1p(alpha / 0.01) / 4 + 0 * t)
    power = 100 / (1 + np.arange(28)[:, None] ** 2 + np.arange(28) ** 2) ** 1.5
    made = config("amortised", sample__schedule="information_budget")
    budget = experiment.build(made, family.Measured(power)).sampled
    levels = jnp.asarray([0.3, 1.0])
    np.testing.assert_allclose(bnr.information_lost(power, budget.blur(levels), levels), 0.05, rtol=1e-3)
    high = jnp.asarray([70.0])  # there the budget asks for less than was trained
    assert bnr.information_budget(power, 0.05)(high) < 0.05 * 70
    np.testing.assert_allclose(budget.blur(high), [0.05 * 70], rtol=1e-6)


def test_a_grid_of_its_own():
    """`sample.beta_min` and `sample.rho` by EDM's equation 5; not those of training. Refused where there is none."""
    exp = experiment.build(config("amortised", sample__beta_min=0.05, sample__rho=20.0, sample__bnr=2.0))
    ramp = np.linspace(80 ** (1 / 20), 0.05 ** (1 / 20), 5) ** 20
    np.testing.assert_allclose(exp.sampled.levels(5), [*ramp, 0], rtol=1e-12)
    np.testing.assert_allclose(exp.process.levels(2), [80, 0.002, 0], rtol=1e-12)
    for system, changes, named in (
        ("ddpm", {"sample__rho": 7.0}, "sample.rho is 7.0, but ddpm has not EDM's grid: leave it unset"),
        ("warm", {"sample__beta_min": 90.0}, "0 < beta_min < beta_max, not beta_min=90"),
        ("hot", {"sample__rho": 0.01}, "sample.rho is 0.01; it must be from 0.1 to 1,000, or unset"),
    ):
        with pytest.raises(ValueError, match=named):
            experiment.build(config(system, **changes))


def test_a_config_from_before_the_grid_could_be_chosen(tmp_path):
    saved = config()
    del saved.sample["beta_min"], saved.sample["rho"]
    workdirs.save_config(saved, tmp_path)
    loaded = workdirs.load_config(tmp_path)
    assert loaded.sample.beta_min is None and loaded.sample.rho is None
    np.testing.assert_allclose(experiment.build(loaded).sampled.levels(2), [80, 0.002, 0], rtol=1e-12)
