"""A value and its error in words, against cases rounded by hand."""

import math

import pytest

from warm_jax.runtime.rounding import with_error


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (8.571, 0.31, "8.57 ± 0.31"),
        (0.918, 10.3, "1 ± 10"),
        (-2.2594, 0.0037, "-2.2594 ± 0.0037"),
        (12346, 678, "12350 ± 680"),
        (0.5, 0.0996, "0.50 ± 0.10"),  # 0.0996 to two digits is 0.10
        (9.996, 0.5, "10.00 ± 0.50"),
        (0.00022, 7.5e-5, "0.000220 ± 0.000075"),
        (-0.001, 0.02, "-0.001 ± 0.020"),
        (-0.0001, 0.02, "0.000 ± 0.020"),  # no minus before a zero
        (1.2e-7, 3.4e-8, "(1.20 ± 0.34)e-07"),
        (3e-8, 2.5e-6, "(0.0 ± 2.5)e-06"),
        (2.5e8, 1e7, "(2.50 ± 0.10)e+08"),
        (0.5, 1e-12, "0.50000000 ± 0.00000010"),  # not more than eight digits
        (3.14159, 0.0, "3.142"),
        (3.14159, None, "3.142"),
        (3.14159, math.nan, "3.142"),
        (3.14159, math.inf, "3.142"),
        (123456.7, None, "123457"),
        (math.nan, 0.1, "–"),
        (None, 0.1, "–"),
        (math.inf, None, "–"),
    ],
)
def test_by_hand(value, error, words):
    assert with_error(value, error) == words


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
@pytest.mark.parametrize("ratio", [1e-3, 0.1, 3.0])
def test_both_have_the_same_decimals_and_nothing_is_lost(exponent, ratio):
    value, error = 2.3456 * 10.0**exponent, 2.3456 * 10.0**exponent * ratio
    text, _, power = with_error(value, error).replace("(", "").partition(")")
    first, second = text.split(" ± ")
    assert len(first.partition(".")[2]) == len(second.partition(".")[2])
    scale = float("1" + power) if power else 1.0
    assert float(second) * scale == pytest.approx(error, rel=0.05)
    assert float(first) * scale == pytest.approx(value, abs=0.05 * error)
