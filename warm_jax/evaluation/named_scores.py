"""The named scores of images against a reference: which there are, and what each needs."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from warm_jax.evaluation import reference
from warm_jax.evaluation.shards import Judged, Run
from warm_jax.metrics import extract, frechet, moments, neighbours, scores

METRICS = ("fd", "fd_infinity", "kid", "is", "pr", "dc", "authenticity", "swd", "lsd")
LEAST = {"pr": 4, "is": 10, "fd_infinity": 20}  # images that a metric cannot do without
LEAST_OF_REFERENCE = {"kid": 2, "pr": 4, "dc": 6, "authenticity": 2}  # one more than the neighbours that are asked for
_OF_FEATURES = ("kid", "pr", "dc", "authenticity")  # of the reference
_PAIR = {"pr": ("precision", "recall"), "dc": ("density", "coverage")}


def check_reference(config: ConfigDict, count: int, name: str) -> None:
    """Raises ValueError where a reference of `count` images has fewer neighbours than a metric asks for."""
    for metric in config.eval.metrics:
        if count < LEAST_OF_REFERENCE.get(metric, 1):
            raise ValueError(
                f"the reference {name} has {count} images, and {metric} needs {LEAST_OF_REFERENCE[metric]}; leave it "
                "out of eval.metrics, or name a larger one with eval.reference"
            )


def shuffles(config: ConfigDict) -> bool:
    """`eval.shuffle_splits`; an older config has no such key."""
    return bool(config.eval.get("shuffle_splits", False))


def of(run: Run, against: reference.Reference, judged: Judged) -> tuple[dict[str, float], list[str]]:
    """The named scores that the config asks for, and sentences to stand beside them."""
    name, found = run.extractor.name, judged.statistics.finalize()
    count, result = found.count, {}
    said = [*frechet.cautions(found, against.moments), *against.notes]
    for metric in run.config.eval.metrics:
        if (metric in _OF_FEATURES and against.features is None) or (
            metric in ("swd", "lsd") and against.pixels is None
        ):
            said.append(f"{metric} needs the reference's images: make it with --mode=stats, or name a source")
        elif metric == "fd":
            result[frechet.score_name("fid", name, count)] = frechet.frechet_distance(found, against.moments)
        elif metric == "fd_infinity":
            key = "fid_infinity" if name == frechet.INCEPTION else "fd_infinity"
            extrapolated = frechet.frechet_infinity(judged.pool, against.moments)
            result[frechet.score_name(key, name, len(judged.pool))] = extrapolated.value
        elif metric == "kid":
            size = min(1000, len(judged.pool), len(against.features))
            estimate = scores.kid(judged.pool, against.features, subset_size=size)
            key = frechet.score_name("kid", name, len(judged.pool))
            result |= {key: estimate.value, f"{key}_std": estimate.std}
        elif metric == "is":
            shuffle = 0 if shuffles(run.config) else None
            estimate = scores.inception_score(judged.logits, shuffle=shuffle)
            key = frechet.score_name("is" if shuffle is None else "is_shuffled", name, count)
            result |= {key: estimate.value, f"{key}_std": estimate.std}
            if shuffle is None and run.images is not None:
                said.append("is: splits of ten are in the images' order; of a sorted set use eval.shuffle_splits")
        elif metric in _PAIR:
            measure = neighbours.precision_recall if metric == "pr" else neighbours.density_coverage
            for key, value in zip(_PAIR[metric], measure(judged.pool, against.features), strict=True):
                result[frechet.score_name(key, name, len(judged.pool))] = value
        elif metric == "authenticity":
            share = neighbours.authenticity(judged.pool, against.features)
            result[frechet.score_name(metric, name, len(judged.pool))] = share
            if against.moments.count is None or against.moments.count > len(against.features):
                said.append(f"authenticity sees {len(against.features):,} reference images; copies of others it cannot")
        elif metric == "swd":
            pair = (x.astype(np.float32) for x in (judged.pixels, against.pixels))
            result[frechet.score_name("swd", "pixels", len(judged.pixels))] = scores.sliced_wasserstein(*pair)
        elif metric == "lsd":
            power = scores.radial_power(judged.pixels)
            key = frechet.score_name("lsd_db", "pixels", len(judged.pixels))
            result[key] = scores.log_spectral_distance(power, against.power)
    return result, said


def score_images(
    run: Run, against: reference.Reference, chunks: Iterator[UInt8[np.ndarray, "_ h w c"]]
) -> dict[str, float]:
    """The scores, by name, of images that come in `chunks`; nothing of them is kept or written."""
    pixels: list[np.ndarray] = []

    def watched() -> Iterator[np.ndarray]:
        for chunk in chunks:
            pixels.append(chunk[: max(0, reference.PIXEL_IMAGES - sum(map(len, pixels)))])
            yield chunk

    features = extract.collect(reference.features_of(run.extractor, watched(), run.config.eval.batch_size))
    statistics = moments.Statistics.empty(run.extractor.dim).update(features.pool)
    return of(run, against, Judged(statistics, features.pool, features.logits, np.concatenate(pixels)))[0]
