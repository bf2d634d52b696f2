"""Which levels a model can restore: those that it was trained on, or nearly so; why not, and what helps, elsewhere."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from warm_jax.diffusion.bnr import Schedule
from warm_jax.restoration.estimation import Given, Levels

SYSTEMS = ("hot", "warm", "amortised")
TOLERANCE, RELATIVE = 0.05, 0.05  # pixels, and share of the blur: so far off a model's own line counts as on it
_REASONS = {
    "pfgmpp": "its noise is heavy-tailed, and a photograph's is not",
    "ddpm": "its states are scaled images with noise, and it knows no blur",
    "blurring": "its blur and its noise are tied to one path, on which images are scaled too",
    "ihdm": "it makes small steps back from blur, at one noise only",
    "coloured": "its noise has a colour, and a photograph's is taken to be white",
    "coloured_warm": "its noise has a colour, and a photograph's is taken to be white",
    "heat_flow": "its blur and its noise are tied to one path, on which images are scaled too",
    "own": "nothing is known of its states",
    "cold": "it takes blurred images without noise, and photographs have some",
}


def check_system(system: str) -> None:
    """Raises ValueError, with the reason, where states of a system are no photographs with blur and noise."""
    if system not in SYSTEMS:
        reason = _REASONS.get(system, "its states are not blurred images with noise")
        raise ValueError(
            f"a {system} model cannot restore photographs: {reason}; use an :amortised model, for any blur and noise, "
            "or :hot, for noise alone"
        )


def trained_noise(beta_min: float, beta_max: float, P_mean: float, P_std: float) -> tuple[float, float]:
    """The least and the most noise that training saw: from `beta_min` to `beta_max`, ln β within 3 P_std of P_mean."""
    return max(beta_min, math.exp(P_mean - 3 * P_std)), min(beta_max, math.exp(P_mean + 3 * P_std))


class Served(NamedTuple):
    """What is done about a photograph's levels."""

    levels: Levels  # at which the model is asked
    added: bool  # whether noise is added first, up to levels.beta
    notes: tuple[str, ...]  # for people: what differs from what was given


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a model was trained on.

    Attributes:
      least, most: Noise, units of x.
      why_least, why_most: What sets them, for people.
      ratios: The least and the most BNR of an amortised model; None: it knows one line.
      zero: Whether an amortised model knows BNR 0 as well.
      line: β -> α of a model that knows one line.
    """

    least: float
    most: float
    why_least: str
    why_most: str
    ratios: tuple[float, float] | None
    zero: bool
    line: Schedule

    def for_noise_times(self, factor: float) -> "Limits":
        """The limits of images whose noise the model is told `factor` times: of grey ones, by a model of RGB."""
        if factor == 1:
            return self
        return dataclasses.replace(
            self,
            least=self.least / factor,
            most=self.most / factor,
            why_least=f"{self.why_least}, for grey",
            why_most=f"{self.why_most}, for grey",
            ratios=None if self.ratios is None else (self.ratios[0] * factor, self.ratios[1] * factor),
            line=lambda beta: self.line(factor * beta),
        )

    def most_blur(self, beta: float) -> float:
        """The most blur in pixels that it can restore at noise `beta`."""
        return self.ratios[1] * beta if self.ratios else float(self.line(jnp.asarray(beta, jnp.float32)))

    def _noise_for(self, alpha: float, beta: float) -> float:
        """The least noise, of at least `beta`, at which the model knows blur `alpha`; inf where there is none."""
        low = max(beta, self.least)
        if self.most_blur(low) >= alpha:
            return low
        high = self.most
        if self.most_blur(high) < alpha:
            return float("inf")
        for _ in range(60):
            middle = np.sqrt(low * high).item()
            low, high = (low, middle) if self.most_blur(middle) >= alpha else (middle, high)
        return high

    def _nearest(self, alpha: float, beta: float) -> float:
        """The blur nearest to `alpha` that it can restore at noise `beta`."""
        if self.ratios is None:
            return float(self.line(jnp.asarray(beta, jnp.float32)))
        least, most = (ratio * beta for ratio in self.ratios)
        if self.zero and alpha < least / 2:
            return 0.0
        return min(max(alpha, least), most)

    def _refusal(self, alpha: float, beta: float) -> str:
        """Why the levels are refused, with the nearest that are not; empty where they are served."""
        for wrong, how, limit, why in (
            (beta < self.least, "below the least", self.least, self.why_least),
            (beta > self.most, "above the most", self.most, self.why_most),
        ):
            if wrong:
                return f"noise {beta:.3g} is {how} that this model knows, {limit:.3g} ({limit * 127.5:.3g}/255, {why})"
        nearest = self._nearest(alpha, beta)
        between = self.ratios is not None and self.zero and alpha <= self.ratios[0] * beta  # of 0 and the least ratio
        if between or abs(alpha - nearest) <= max(TOLERANCE, RELATIVE * alpha):
            return ""
        if self.ratios is None:
            known = f"this model knows only blur {nearest:.3g} px there; use an :amortised one"
        else:
            known = (
                f"this model knows blur-to-noise ratios from {self.ratios[0]:.3g} to {self.ratios[1]:.3g}, "
                f"there a blur of {nearest:.3g} px"
            )
        return f"blur {alpha:.3g} px at noise {beta:.3g} is a blur-to-noise ratio of {alpha / beta:.3g}, and {known}"

    def check(self, given: Given, add_noise: bool) -> None:
        """Raises ValueError, as `serve`, where what is given of blur and noise is served with nothing that is not."""
        alpha, beta = given
        if alpha is None and beta is None:
            return
        if alpha is None:
            alpha = max(self._nearest(0.0, beta), 1e-9)  # 0 without noise would be nothing to restore
        if beta is None:
            if alpha - (most := self.most_blur(self.most)) > max(TOLERANCE, RELATIVE * alpha):
                raise ValueError(
                    f"blur {alpha:.3g} px is more than this model knows, {most:.3g} px at its most noise, "
                    f"{self.most:.3g} ({self.why_most})" + ("" if self.ratios else "; use an :amortised one")
                )
            return
        self.serve(Levels(alpha, beta), add_noise)

    def serve(self, given: Levels, add_noise: bool) -> Served:
        """The levels to restore at, which are `given` or very near; with `add_noise`, at more noise where that helps.

        A blur up to 0.05 px or 5 % off what the model knows is taken for that, and so is one between none at all and
        that of the least ratio. ValueError for other levels, with the limits and the remedy.
        """
        alpha, beta = given
        if alpha == 0 and beta == 0:
            raise ValueError("no blur and no noise: there is nothing to restore; give --blur=PIXELS or --noise=LEVEL")
        notes: list[str] = []
        refusal, wanted, added = self._refusal(alpha, beta), self._noise_for(alpha, beta), False
        if refusal and beta < wanted < float("inf"):
            if not add_noise:
                text = f"{wanted:.3g} ({wanted * 127.5:.3g}/255)"
                raise ValueError(f"{refusal}; --add_noise adds noise up to {text}, where it can be restored")
            notes.append(f"noise was added, from {beta:.3g} up to {wanted:.3g}")
            beta, added = wanted, True
            refusal = self._refusal(alpha, beta)
        if refusal:
            raise ValueError(refusal)
        nearest = self._nearest(alpha, beta)
        if abs(nearest - alpha) > 1e-6:
            notes.append(f"restored as of blur {nearest:.3g} px, the nearest to {alpha:.3g} that this model knows")
        return Served(Levels(nearest, beta), added, tuple(notes))
