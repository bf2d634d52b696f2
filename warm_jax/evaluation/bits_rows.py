"""Rows of `results.jsonl` about bits a dimension: scores with their errors, parts, and differences between two runs."""

import json
import math
import time

import numpy as np
from jaxtyping import Float64

from warm_jax.diffusion import likelihood
from warm_jax.evaluation import bits
from warm_jax.experiments import family
from warm_jax.runtime import rounding
from warm_jax.sampling import runs


def standard_error(values: Float64[np.ndarray, " n"]) -> float:
    """Of the mean over the images."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def above(measured: bits.Measured, level: float) -> tuple[float, Float64[np.ndarray, " n"]]:
    """The edge nearest to a noise level (noise over signal), and each image's bits above it, the prior's with them."""
    if level <= 0:
        return float(measured.edges[0]), measured.by_level.sum(1) + measured.prior
    at = int(np.argmin(np.abs(np.log(measured.edges / level))))
    return float(measured.edges[at]), measured.by_level[:, at:].sum(1) + measured.prior


def _scores(request: bits.Request, metric: str, found: bits.Measured) -> dict[str, float]:
    """The score, its standard error over the images, and of the bound its parts."""
    scores = {metric: float(found.bits.mean()), f"{metric}_std": standard_error(found.bits)}
    if metric == "bpd":
        _, high = above(found, request.settings.above)
        scores |= {"bpd_above": float(high.mean()), "bpd_above_std": standard_error(high)}
    return scores


def _difference(request: bits.Request, metric: str, found: bits.Measured, other: bits.Measured) -> dict[str, float]:
    """This run less the other, image by image: the mean and its standard error."""
    parts = {metric: found.bits - other.bits}
    if metric == "bpd":
        parts["bpd_above"] = above(found, request.settings.above)[1] - above(other, request.settings.above)[1]
    return {
        f"{name}_{what}": value
        for name, values in parts.items()
        for what, value in (("difference", float(values.mean())), ("difference_std", standard_error(values)))
    }


def score(request: bits.Request, opened: runs.Run) -> dict[str, object] | None:
    """A row of `results.jsonl` with every metric that is asked for; None where a signal came first."""
    config, heldout = opened.experiment.config, request.heldout
    result, facts, against = {}, {}, {}
    step, weights = runs.load_ema(opened)
    beside = request.against and runs.load_ema(request.against)
    for metric in request.metrics:
        found = bits.measure(request, metric, opened, step, weights)
        if found is None:
            return None
        result |= _scores(request, metric, found)
        facts |= {f"{metric}_count": len(found.bits), f"{metric}_evaluations": found.evaluations}
        if metric == "bpd":
            facts["bpd_above_level"] = above(found, request.settings.above)[0]
            facts["bpd_prior"], facts["bpd_last"] = float(found.prior.mean()), float(found.last.mean())
            spread = likelihood.sampling_variance(found.by_level).mean() / len(found.bits)
            facts["bpd_std_of_draws"] = float(np.sqrt(spread))
            facts["bpd_by_level"] = [round(float(value), 6) for value in found.by_level.mean(0)]
            facts["bpd_edges"] = [float(f"{edge:.5g}") for edge in found.edges]
        if request.against is not None:
            other = bits.measure(request, metric, request.against, *beside)
            if other is None:
                return None
            against |= _difference(request, metric, found, other)
    return {
        **result,
        **against,
        "scores": list(result),
        "images": heldout.source.spec,
        "split": heldout.split,
        "data_hash": heldout.source.fingerprint,
        "checkpoint_step": step,
        "system": config.process.system,
        "bnr": family.sampled_bnr(config),
        "preconditioning": config.model.preconditioning,
        "likelihood": json.loads(json.dumps(request.settings.to_dict(), default=list)),
        **facts,
        **({"against": str(request.against.workdir), "against_step": beside[0]} if against else {}),
        **({"ema": opened.ema} if opened.ema is not None else {}),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def line(row: dict[str, object]) -> str:
    """A row in words."""
    names = [name for name in row["scores"] if not name.endswith("_std")]
    parts = [f"{name} {rounding.with_error(row[name], row[f'{name}_std'])}" for name in names]
    where = f"{row['images']} ({row['split']}), " + ", ".join(
        f"{row[f'{metric}_count']} images" for metric in bits.METRICS if f"{metric}_count" in row
    )
    text = f"{'  '.join(parts)}  bits a dimension  | {where}  step {row['checkpoint_step']}"
    if "bpd_above" in names:
        text += f"  | above: from noise {row['bpd_above_level']:.3g}"
    if "against" in row:
        less = [
            f"{name} {rounding.with_error(row[f'{name}_difference'], row[f'{name}_difference_std'])}"
            for name in names
            if f"{name}_difference" in row
        ]
        text += f"\n    less {row['against']} (step {row['against_step']}), image by image: {', '.join(less)}"
    if row["split"] == "training images":
        text += "\n    note: these images were trained on; name held-out ones with likelihood.images"
    return text
