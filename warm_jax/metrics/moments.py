"""Mean and covariance of features: streamed, merged, stored in a file, and never compared with those of something else.

A covariance of 50,000 × 2048 features needs no second pass: `Statistics` holds the count n, the mean m and the scatter
S = Σ (x - m)(x - m)ᵀ in float64, and two of them add by Chan, Golub and LeVeque (1983), equations 1.1 and 2.1:

    n = n₁ + n₂,   m = m₁ + δ n₂/n,   S = S₁ + S₂ + δδᵀ n₁n₂/n,   δ = m₂ - m₁.

The naive Σ xxᵀ - n mmᵀ loses the digits that the difference of two nearly equal Fréchet terms needs.
"""

import dataclasses
import os

import numpy as np
from jaxtyping import Float, Float64, Shaped

from warm_jax.weights import archives

# How images in [-1, 1] became bytes: EDM's rule, and that of published FIDs.
UINT8_RULE = "trunc(clip(127.5 x + 128, 0, 255))"
FILE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean `[d]` and unbiased covariance `[d, d]` in float64 of `count` features (None: a file that does not say)."""

    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]
    count: int | None

    def __post_init__(self):
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("the mean or the covariance of the features is not finite")
        scale = np.abs(self.covariance).max(initial=0.0)
        if np.abs(self.covariance - self.covariance.T).max(initial=0.0) > 1e-5 * scale:
            raise ValueError("the covariance of the features is not symmetric")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What has been seen of a stream of features: count, mean `[d]` and scatter `[d, d]`, float64."""

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]

    @classmethod
    def empty(cls, dim: int) -> "Statistics":
        """Nothing seen yet of features of dimension `dim`."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def update(self, features: Shaped[np.ndarray, "n d"]) -> "Statistics":
        """With n more features; ValueError if their dimension differs or one of them is not finite."""
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(features)} features are NaN or infinite")
        if not len(features):
            return self
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return self.merge(Statistics(len(features), mean, centred.T @ centred))

    def merge(self, other: "Statistics") -> "Statistics":
        """Both streams together; the order does not matter beyond rounding."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of dimension {self.mean.size} and of {other.mean.size} do not merge")
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Statistics(count, self.mean + delta * (other.count / count), scatter)

    def finalize(self) -> Moments:
        """Mean and unbiased covariance (divided by n - 1, as numpy.cov and every published FID); needs two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        return Moments(self.mean, self.scatter / (self.count - 1), self.count)


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """Moments of features that are all in memory."""
    return Statistics.empty(features.shape[1]).update(features).finalize()


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What moments or features were computed from; None where it is not known, and then not compared."""

    extractor: str | None = None
    extractor_hash: str | None = None  # sha256 of the weights
    uint8_rule: str | None = None
    resolution: tuple[int, int, int] | None = None  # height, width, channels, before the extractor's resize
    data_hash: str | None = None  # of the data manifest

    def require_same(self, other: "Provenance", names: tuple[str, str] = ("the samples", "the reference")) -> None:
        """ValueError naming both values where two known fields differ: such numbers must not be compared."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not None and theirs is not None and mine != theirs:
                label = field.name.replace("_", " ")
                raise ValueError(f"{label} differs: {names[0]} have {mine!r}, {names[1]} has {theirs!r}")


def provenance_arrays(provenance: Provenance) -> dict[str, np.ndarray]:
    """The known fields as arrays that need no pickle."""
    fields = dataclasses.asdict(provenance)
    return {name: np.asarray(value) for name, value in fields.items() if value is not None}


def read_provenance(arrays: dict[str, np.ndarray]) -> Provenance:
    """The inverse of `provenance_arrays`; absent fields are None."""
    known = {f.name: arrays[f.name] for f in dataclasses.fields(Provenance) if f.name in arrays}
    values = {name: tuple(int(n) for n in a) if name == "resolution" else str(a) for name, a in known.items()}
    return Provenance(**values)


def moment_arrays(moments: Moments) -> dict[str, np.ndarray]:
    """What a statistics file holds of them: mean, covariance and count; the first two also as `mu` and `sigma`.

    By these names EDM's, pytorch-fid's and clean-fid's programs read them.
    """
    if moments.count is None:
        raise ValueError("statistics without a count are not written: nobody could tell later what they are worth")
    named = {"mean": moments.mean, "covariance": moments.covariance, "mu": moments.mean, "sigma": moments.covariance}
    return {"version": np.asarray(FILE_VERSION), **named, "count": np.asarray(moments.count)}


def save(path: str | os.PathLike, moments: Moments, provenance: Provenance) -> None:
    """The statistics file: moments and provenance."""
    archives.write_npz(path, **moment_arrays(moments), **provenance_arrays(provenance))


def load(path: str | os.PathLike) -> tuple[Moments, Provenance]:
    """Moments and provenance from a file of `save`, or from a foreign one: see `parse`."""
    return parse(path, archives.read_npz(path))


def parse(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> tuple[Moments, Provenance]:
    """Moments and provenance from the arrays of a file of `save`, or of a foreign one with `mu` and `sigma`.

    EDM, pytorch-fid and clean-fid write `mu` and `sigma` and say neither count nor extractor: both come back unknown,
    so that whoever names the file vouches for it. clean-fid's "clean" mode resizes with PIL's bicubic filter, and its
    numbers are not comparable with ours; its "legacy_tensorflow" mode is.
    """
    if {"mean", "covariance", "count"} <= arrays.keys():
        if int(arrays.get("version", 0)) != FILE_VERSION:
            raise ValueError(f"{path} has version {arrays.get('version')}; this program reads {FILE_VERSION}")
        mean, covariance, count = arrays["mean"], arrays["covariance"], int(arrays["count"])
    elif {"mu", "sigma"} <= arrays.keys():
        mean, covariance, count = arrays["mu"], arrays["sigma"], None
    else:
        images = f"; it has images: npz:{path} compares with them" if {"arr_0", "images", "x"} & arrays.keys() else ""
        raise ValueError(f"{path} has {sorted(arrays)}; expected mean, covariance, count or mu, sigma{images}")
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(f"{path}: a mean of shape {mean.shape} does not go with a covariance of {covariance.shape}")
    return Moments(mean.astype(np.float64), covariance.astype(np.float64), count), read_provenance(arrays)
