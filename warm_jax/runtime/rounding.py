"""Numbers for people: a value with its error, the same in tables, messages and figures."""

import math

_PLAIN = (1e-4, 1e6)  # sizes that are written without an exponent
_MOST_DIGITS = 8  # of a value, however small its error


def with_error(value: float | int | None, error: float | int | None) -> str:
    """`value` ± `error`: two significant digits of the error, and the value to the same decimal place.

    `8.571, 0.31` becomes "8.57 ± 0.31", `0.918, 10.3` becomes "1 ± 10", `12346, 678` becomes "12350 ± 680". Very large
    and very small ones share one exponent, "(1.20 ± 0.34)e-07". Where nothing is known of the error (None, nan,
    infinity) or it is 0, four significant digits of the value alone; "–" for a value that is None or not finite.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if error is None or not math.isfinite(error) or error == 0:
        return f"{value:.0f}" if 1e4 <= abs(value) < _PLAIN[1] else f"{value:.4g}"
    size = max(abs(value), abs(error))
    power = 0 if _PLAIN[0] <= size < _PLAIN[1] else math.floor(math.log10(size))
    value, error = value / 10.0**power, abs(error) / 10.0**power
    error = max(error, 10.0 ** (math.floor(math.log10(max(abs(value), error))) + 2 - _MOST_DIGITS))
    places = 1 - math.floor(math.log10(float(f"{error:.1e}")))  # rounded first: 0.0996 is 0.10, not 0.100
    numbers = (round(number, places) + 0.0 for number in (value, error))  # + 0.0: no minus before a zero
    text = " ± ".join(f"{number:.{max(places, 0)}f}" for number in numbers)
    return f"({text})e{power:+03d}" if power else text
