"""What a run says of its losses: means by head and by noise level, as numbers and for people."""

import math

import jax
import numpy as np

from warm_jax.training.step import BIN_EDGES, Totals


def scalars(totals: Totals) -> dict[str, float]:
    """Means since the last report, by head, and by head and noise level; per pixel, weighted by λ."""
    totals = jax.tree.map(np.asarray, totals)
    images = totals.images.sum() or math.nan  # nan where no loss was finite
    row = {
        "loss/blurred": float(totals.blurred.sum() / images),
        "loss/residual": float(totals.residual.sum() / images),
        "gradient_norm": float(totals.gradient_norm / np.maximum(totals.steps - totals.nonfinite, 1)),
        "nonfinite_steps": float(totals.nonfinite),
    }
    edges = [0.0, *BIN_EDGES, math.inf]
    for i, count in enumerate(totals.images):
        if count:
            name = f"noise_{edges[i]:g}-{edges[i + 1]:g}"
            row[f"loss_blurred/{name}"] = float(totals.blurred[i] / count)
            row[f"loss_residual/{name}"] = float(totals.residual[i] / count)
    return row


def text(step: int, row: dict[str, float], two_targets: bool) -> str:
    """A report for people: a line of totals, and a small table of losses by noise level, a line a head."""
    bins = [name.removeprefix("loss_blurred/noise_") for name in row if name.startswith("loss_blurred/")]
    heads = {"blurred": [row[f"loss_blurred/noise_{name}"] for name in bins]}
    if two_targets:
        heads["residual"] = [row[f"loss_residual/noise_{name}"] for name in bins]
    total = " + ".join(f"{row[f'loss/{head}']:.4f} {head}" for head in heads)
    utilisation = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
    lines = [
        f"step {step:>7}  loss {total}  |gradient| {row['gradient_norm']:.2f}  "
        f"{row['images_per_second']:.0f} images/s{utilisation}  lr {row['learning_rate']:.2e}",
        "    noise     " + " ".join(f"{name:>8}" for name in bins),
        *(f"    {head:<10}" + " ".join(f"{value:8.4f}" for value in values) for head, values in heads.items()),
    ]
    if row["nonfinite_steps"]:
        lines.append(f"    {row['nonfinite_steps']:.0f} steps whose loss was not finite: they count for nothing above")
    return "\n".join(lines)
