"""The colours of BNRs can be told apart, by colour-blind eyes too, and read on white. All by published formulas."""

import itertools

import numpy as np
import pytest

from warm_jax.analysis.colours import of_bnr

PAPER = (0.0, 0.5, 1.0, 2.0, 10.0, np.inf)
# Linear sRGB as protanopes and deuteranopes see it (Viénot, Brettel and Mollon 1999).
SEEN = {
    "all": np.eye(3),
    "protan": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "deutan": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour):
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear sRGB, white D65."""
    xyz = XYZ @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", SEEN)
def test_the_papers_ratios_are_told_apart(eyes):
    points = {bnr: lab(SEEN[eyes] @ linear(of_bnr(bnr))) for bnr in PAPER}
    for one, other in itertools.combinations(PAPER, 2):
        assert np.linalg.norm(points[one] - points[other]) > 14, (one, other)  # 2.3 is just noticed


def test_the_order_is_seen_in_lightness_and_the_change_is_smooth():
    ratios = np.geomspace(0.1, 20, 400)
    points = np.array([lab(linear(of_bnr(bnr))) for bnr in ratios])
    assert np.all(np.diff(points[:, 0]) > -0.3) and np.all(np.diff(points[::20, 0]) > 0)  # bytes are rounded
    assert np.linalg.norm(np.diff(points, axis=0), axis=1).max() < 3
    assert of_bnr(1e-9) == of_bnr(0.1) != of_bnr(0.0) and of_bnr(1e9) == of_bnr(20.0) != of_bnr(np.inf)


@pytest.mark.parametrize("bnr", [*PAPER, 0.1, 0.18, 0.27, 5.0, 20.0])
def test_text_in_it_can_be_read_on_white(bnr):
    luminance = XYZ[1] @ linear(of_bnr(bnr))
    assert 1.05 / (luminance + 0.05) > 2  # WCAG's contrast


@pytest.mark.parametrize("bad", [-0.5, float("nan")])
def test_what_is_no_ratio_is_refused(bad):
    with pytest.raises(ValueError, match="at least 0, not"):
        of_bnr(bad)
