"""One colour for each blur-to-noise ratio, the same in every picture, whatever other ratios are shown beside it.

A smooth function of ln BNR from violet through blue, teal and green to amber; outside of 0.1 to 20 it stands still.
Lightness rises with the BNR, so that the order can be seen by colour-blind eyes and in grey too, and no colour fades on
white. The two ends have colours of their own: BNR 0 (noise alone, EDM) is black, ∞ (blur alone) is crimson.
"""

import math

import numpy as np

# BNR and sRGB of the points that the ramp runs through, straight in ln BNR and sRGB between them.
_RAMP = (
    (0.1, (74, 12, 92)),
    (0.3, (66, 36, 140)),
    (0.5, (58, 76, 172)),
    (1.0, (24, 130, 160)),
    (2.0, (40, 162, 98)),
    (5.0, (118, 174, 40)),
    (10.0, (222, 160, 0)),
    (20.0, (240, 170, 20)),
)
_NOISE_ALONE, _BLUR_ALONE = "#000000", "#B01046"


def of_bnr(bnr: float | int) -> str:
    """The colour of a BNR from 0 to ∞, as "#RRGGBB"; ValueError for one that is negative or not a number."""
    if not bnr >= 0:
        raise ValueError(f"a blur-to-noise ratio is at least 0, not {bnr}")
    if bnr in (0, math.inf):
        return _NOISE_ALONE if bnr == 0 else _BLUR_ALONE
    places, points = zip(*_RAMP, strict=True)
    channels = [np.interp(math.log(bnr), np.log(places), channel) for channel in zip(*points, strict=True)]
    return "#" + "".join(f"{round(channel):02X}" for channel in channels)
