"""Levels of photographs: as written, as estimated from images made to order, and which of them a model serves."""

import numpy as np
import pytest
from scipy import fft

from warm_jax.diffusion import bnr
from warm_jax.restoration import estimation, limits
from warm_jax.restoration.estimation import Given, Levels


@pytest.mark.parametrize(
    ("blur", "noise", "expected"),
    [
        ("auto", "auto", (None, None)),
        ("1.5", "auto", (1.5, None)),
        ("auto", "0.2", (None, 0.2)),
        ("0", "25/255", (0.0, 25 / 127.5)),
        ("2e0", "1000/65535", (2.0, 2000 / 65535)),
        ("1", "0.1/1", (1.0, 0.2)),  # of pixels in [0, 1]
    ],
)
def test_parse(blur, noise, expected):
    assert estimation.parse(blur, noise) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("blur", "noise", "named"),
    [
        ("much", "0.1", "--blur=much"),
        ("-1", "0.1", "--blur=-1"),
        ("nan", "0.1", "--blur=nan"),
        ("1", "", "--noise="),
        ("1", "25/", "--noise="),
        ("1", "25/0", "range of 0"),
        ("1", "25/255/255", "--noise="),
        ("1", "inf", "--noise=inf"),
        ("1", "-0.1", "--noise=-0.1"),
    ],
)
def test_levels_that_are_none(blur, noise, named):
    with pytest.raises(ValueError, match=named) as caught:
        estimation.parse(blur, noise)
    assert "auto" in str(caught.value)


# ── Estimates ────────────────────────────────────────────────────────────────────────────────────────────────────────


def power_law_image(alpha, beta, size=(256, 200), channels=1, exponent=-2.5, seed=0):
    """Gaussian, power ∝ r^exponent in the DCT, std 0.3; blurred by α by its definition, and with noise β."""
    rng, (height, width) = np.random.default_rng(seed), size
    ky, kx = np.arange(height)[:, None] / height, np.arange(width) / width
    r = np.hypot(ky, kx)
    r[0, 0] = np.inf
    sharp = rng.standard_normal((channels, height, width)) * r ** (exponent / 2)
    sharp *= 0.3 / np.sqrt(np.sum(r**exponent) / (height * width))
    blurred = fft.idctn(sharp * np.exp(-(alpha**2) * np.pi**2 * (ky**2 + kx**2) / 2), axes=(1, 2), norm="ortho")
    return np.moveaxis(blurred + beta * rng.standard_normal(blurred.shape), 0, 2).astype(np.float32)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("sigma", [2, 10, 25])
def test_estimates_of_a_power_law(alpha, sigma):
    """Noise within 5 %, blur within 0.25 px or 10 %; what is sharp looks noisy: within 10 % above σ = 2, and 0.6 px."""
    found = estimation.estimate(power_law_image(alpha, sigma / 127.5), own_blur=0.0)
    if alpha > 0 or sigma > 2:
        assert found.beta * 127.5 == pytest.approx(sigma, rel=0.05 if alpha else 0.1)
    assert found.alpha == pytest.approx(alpha, rel=0.1, abs=0.6 if alpha == 0 else 0.25)


def test_the_blur_that_photographs_have_by_themselves_does_not_count():
    """Variances add: 1.5 px of which 0.5 are its own leave √2 px."""
    image = power_law_image(1.5, 5 / 127.5)
    assert estimation.estimate(image).alpha == pytest.approx(np.sqrt(2), abs=0.1)
    assert estimation.estimate(power_law_image(0.3, 5 / 127.5)).alpha < 0.4


def test_an_estimate_of_colours_and_of_what_is_given():
    image = power_law_image(2.0, 0.1, channels=3)
    both = estimation.estimate(image, own_blur=0.0)
    assert both == pytest.approx((2.0, 0.1), rel=0.08)
    assert estimation.estimate(image, Given(2.0, None), own_blur=0.0) == pytest.approx((2.0, 0.1), rel=0.03)
    assert estimation.estimate(image, Given(None, 0.1), own_blur=0.0) == pytest.approx((2.0, 0.1), rel=0.08)
    assert estimation.estimate(image, Given(3.0, 0.7)) == (3.0, 0.7)


def test_the_noise_of_nothing_but_noise():
    """White noise has all of its quantiles: the median's standard error is 1.17 / √n."""
    noise = 0.3 * np.random.default_rng(1).standard_normal((256, 256, 1)).astype(np.float32)
    assert estimation.wavelet_noise(noise) == pytest.approx(0.3, rel=0.02)
    ramp = np.linspace(-1, 1, 256, dtype=np.float32)[:, None, None] * np.ones((1, 256, 1), np.float32)
    assert estimation.wavelet_noise(noise + ramp) == pytest.approx(0.3, rel=0.02)  # two vanishing moments


def test_an_image_of_one_colour_and_one_too_small():
    found = estimation.estimate(np.full((64, 64, 3), 0.25, np.float32))
    assert found.alpha == 0 and found.beta < 1e-3
    with pytest.raises(ValueError, match=r"31×40 pixels tell too little .*give --blur and --noise"):
        estimation.estimate(np.zeros((40, 31, 1), np.float32))


def test_bars_of_a_letterbox_tell_nothing():
    """More than half of the image is black or white, without noise."""
    image = np.clip(power_law_image(0.5, 0.1, size=(100, 200)), -0.98, 0.98)
    boxed = np.concatenate([-np.ones((70, 200, 1), np.float32), image, np.ones((70, 200, 1), np.float32)])
    assert estimation.wavelet_noise(boxed) == pytest.approx(estimation.wavelet_noise(image), rel=0.1)
    assert estimation.wavelet_noise(image) == pytest.approx(0.1, rel=0.1)
    assert estimation.wavelet_noise(np.ones((40, 40, 3), np.float32)) == 0


def test_what_is_given_may_lie_beyond_what_is_looked_for():
    image = power_law_image(25.0, 0.1)
    assert estimation.estimate(image, Given(25.0, None)) == pytest.approx((25.0, 0.1), rel=0.03)
    assert estimation.estimate(image, Given(None, 131070.0)).beta == 131070.0


# ── What a model serves ──────────────────────────────────────────────────────────────────────────────────────────────


AMORTISED = limits.Limits(0.01, 10.0, "by training", "by training", (0.5, 10.0), True, bnr.constant(0.5))
WITHOUT_ZERO = limits.Limits(0.01, 10.0, "by training", "by training", (0.5, 10.0), False, bnr.constant(0.5))
LINE = limits.Limits(0.01, 10.0, "by training", "by training", None, False, bnr.constant(0.5))
HOT = limits.Limits(0.01, 10.0, "by training", "by training", None, False, bnr.constant(0.0))


@pytest.mark.parametrize(
    ("known", "given", "served"),
    [
        (AMORTISED, (1.0, 0.2), (1.0, 0.2)),
        (AMORTISED, (0.0, 0.2), (0.0, 0.2)),
        (AMORTISED, (0.04, 0.2), (0.0, 0.2)),  # between 0 and 0.5 · 0.2 = 0.1: the nearest
        (AMORTISED, (0.06, 0.2), (0.1, 0.2)),
        (AMORTISED, (2.04, 0.2), (2.0, 0.2)),  # 2 % beyond the largest ratio
        (WITHOUT_ZERO, (0.06, 0.2), (0.1, 0.2)),
        (LINE, (0.12, 0.2), (0.1, 0.2)),
        (LINE, (4.9, 10.0), (5.0, 10.0)),
        (HOT, (0.0, 1.0), (0.0, 1.0)),
        (HOT, (0.03, 1.0), (0.0, 1.0)),
    ],
)
def test_levels_that_are_served(known, given, served):
    found = known.serve(Levels(*given), add_noise=False)
    assert found.levels == pytest.approx(served) and not found.added
    assert len(found.notes) == (given != served)


@pytest.mark.parametrize(
    ("known", "given", "named", "remedy"),
    [
        (AMORTISED, (0.0, 0.0), "nothing to restore", False),
        (LINE, (0.0, 0.0), "nothing to restore", False),
        (AMORTISED, (2.0, 0.1), r"ratio of 20, .* from 0.5 to 10, there a blur of 1 px", True),
        (AMORTISED, (1.0, 0.0), r"noise 0 is below the least .* 0.01 \(1.2[78]/255, by training\)", True),
        (AMORTISED, (0.0, 0.001), "noise 0.001 is below the least", True),
        (AMORTISED, (1.0, 11.0), "noise 11 is above the most", False),
        (AMORTISED, (200.0, 5.0), "ratio of 40", False),  # at most 10 · 10 px
        (WITHOUT_ZERO, (0.0, 2.0), "there a blur of 1 px", False),
        (LINE, (1.0, 0.2), r"knows only blur 0.1 px there; use an :amortised one", True),
        (LINE, (0.0, 1.0), r"knows only blur 0.5 px there", False),
        (HOT, (1.0, 0.2), r"knows only blur 0 px there", False),
    ],
)
def test_levels_that_are_refused(known, given, named, remedy):
    with pytest.raises(ValueError, match=named) as caught:
        known.serve(Levels(*given), add_noise=False)
    assert ("--add_noise" in str(caught.value)) == remedy


@pytest.mark.parametrize(
    ("known", "given", "beta"),
    [
        (AMORTISED, (2.0, 0.1), 0.2),  # α / the largest ratio
        (AMORTISED, (1.0, 0.0), 0.1),
        (AMORTISED, (0.0, 0.001), 0.01),  # the least
        (LINE, (1.0, 0.2), 2.0),
        (AMORTISED, (1.0, 0.2), 0.2),  # as it is
    ],
)
def test_noise_that_is_added_is_the_least_that_helps(known, given, beta):
    found = known.serve(Levels(*given), add_noise=True)
    assert found.levels == pytest.approx((given[0], beta), rel=1e-5, abs=1e-5)
    assert found.added == (beta != given[1])


@pytest.mark.parametrize(
    ("known", "given", "named"),
    [
        (AMORTISED, (110.0, None), "blur 110 px is more than this model knows, 100 px at its most noise, 10"),
        (HOT, (0.1, None), "more than this model knows, 0 px .*; use an :amortised one"),
        (LINE, (6.0, None), "more than this model knows, 5 px .*; use an :amortised one"),
        (AMORTISED, (None, 11.0), "noise 11 is above the most"),
        (LINE, (None, 11.0), "noise 11 is above the most"),
        (AMORTISED, (None, 0.0), "noise 0 is below the least .* --add_noise"),
        (AMORTISED, (2.0, 0.1), "ratio of 20"),
        (AMORTISED, (104.0, None), None),
        (LINE, (5.0, None), None),
        (HOT, (0.0, None), None),
        (LINE, (None, 9.0), None),
        (WITHOUT_ZERO, (None, 9.0), None),
        (AMORTISED, (None, 9.0), None),
        (AMORTISED, (None, None), None),
    ],
)
def test_one_level_that_no_other_helps_is_refused(known, given, named):
    if named is None:
        assert known.check(Given(*given), add_noise=False) is None
    else:
        with pytest.raises(ValueError, match=named):
            known.check(Given(*given), add_noise=False)
    assert AMORTISED.check(Given(None, 0.0), add_noise=True) is None


def test_limits_of_grey_are_told_in_its_own_units():
    """By a model of colour, which is told √3 β: blur 1 needs √3 β · 10 ≥ 1, and the least is 0.01 / √3."""
    grey = AMORTISED.for_noise_times(3**0.5)
    found = grey.serve(Levels(1.0, 0.02), add_noise=True)
    assert found.levels == pytest.approx((1.0, 0.1 / 3**0.5), rel=1e-5)
    assert found.notes == ("noise was added, from 0.02 up to 0.0577",)
    assert grey.serve(Levels(1.0, 0.06), add_noise=False).levels == (1.0, 0.06)  # a ratio of 17
    with pytest.raises(
        ValueError, match=r"ratio of 50, .* from 0.866 to 17.3, there a blur of 0.346 px; .* to 0.0577 "
    ):
        grey.serve(Levels(1.0, 0.02), add_noise=False)
    with pytest.raises(ValueError, match=r"least that this model knows, 0.00577 \(0.736/255, by training, for grey\)"):
        grey.serve(Levels(0.0, 0.005), add_noise=False)
    line = LINE.for_noise_times(3**0.5)
    assert line.most_blur(1.0) == pytest.approx(0.5 * 3**0.5)


@pytest.mark.parametrize("system", ["ddpm", "blurring", "ihdm", "cold", "pfgmpp", "another"])
def test_other_systems_are_refused(system):
    with pytest.raises(ValueError, match=f"a {system} model cannot restore .*:amortised"):
        limits.check_system(system)
