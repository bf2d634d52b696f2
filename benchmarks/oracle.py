"""What BNR and NFE do to exact networks, with no training: the tables, the manifold figure, and how long they take.

    python benchmarks/oracle.py --what=sweep                     # bundled images
    python benchmarks/oracle.py --what=manifold --images=zip:cifar10-32x32.zip --count=1000 --out=figures

`sweep`: W2 of the Gaussian oracle on the spectrum of docs/method.md §15, 5 BNRs × 6 NFEs, and the empirical oracle's
imbalance.
`manifold`: how far reverse states of the empirical oracle lie off the forward process, in nats per dimension and in
distances. Each writes NAME.npz and NAME.png to --out. `count` images are taken evenly from the source.
"""

import argparse
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from warm_jax.analysis import manifold, sampling_plots, sweep
from warm_jax.data import sources
from warm_jax.runtime import rounding

BNRS = (0.0, 0.5, 1.0, 2.0, 10.0)


def spectrum(side: int = 32) -> np.ndarray:
    """P ∝ 1 / (λ + ½ (π / side)²), of mean 0.25: like photographs', flat below the lowest frequency."""
    lam = np.pi**2 * ((np.arange(side) / side)[:, None] ** 2 + (np.arange(side) / side) ** 2)
    power = 1 / (lam + 0.5 * (np.pi / side) ** 2)
    return power * 0.25 / power.mean()


def read(spec: str, count: int) -> np.ndarray:
    """`count` images of a source, spread evenly over it, in [-1, 1]."""
    source = sources.open_source(spec)
    if count > len(source):
        raise ValueError(f"{spec} has {len(source)} images, not {count}; give a smaller --count")
    pixels, _ = source.read(np.linspace(0, len(source) - 1, count).round().astype(int))
    return pixels.astype(np.float32) / 127.5 - 1


def save(out: pathlib.Path, name: str, result, figure) -> None:
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / f"{name}.npz", **result._asdict())
    figure.savefig(out / f"{name}.png", dpi=120)


def table(head: list[str], rows: list[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def show(values: np.ndarray, halves: np.ndarray, bnrs: np.ndarray, nfe: np.ndarray) -> None:
    rows = zip(bnrs, values, halves, strict=True)
    table(
        ["BNR", *(f"NFE {n}" for n in nfe)],
        [[f"{b:g}", *(rounding.with_error(m, h) for m, h in zip(mean, half, strict=True))] for b, mean, half in rows],
    )


def run_sweep(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    gaussian = sweep.gaussian_w2(spectrum(), BNRS, (5, 9, 18, 40, 80, 256))
    print(f"\nGaussian oracle, W2 / ‖√P‖: {time.perf_counter() - started:.1f} s, limit 300 s")
    show(gaussian.mean, gaussian.half, gaussian.bnrs, gaussian.nfe)
    save(args.out, "sweep_gaussian", gaussian, sampling_plots.sweep(gaussian))
    images, started = read(args.images, args.count), time.perf_counter()
    found = sweep.empirical_sweep(
        images, BNRS, args.steps or (5, 9, 18), range(args.seeds), count=args.states, path=args.resume
    )
    print(f"\nempirical oracle, {args.count} of {args.images}, {args.seeds} × {args.states} samples: ", end="")
    print(f"{time.perf_counter() - started:.1f} s")
    for name, result in found.items():
        print(f"\n{name}")
        show(result.mean, result.half, result.bnrs, result.nfe)
        save(args.out, f"sweep_empirical_{name}", result, sampling_plots.sweep(result))


def run_manifold(args: argparse.Namespace) -> None:
    images, started = read(args.images, args.count), time.perf_counter()
    result = manifold.manifold(
        manifold.empirical,
        images,
        BNRS,
        args.steps or (9, 18, 40),
        params_of=lambda bnr, seed: images,
        seeds=range(args.seeds),
        count=args.states,
        traced=True,
        say=lambda line: print(f"{time.perf_counter() - started:6.1f} s  {line}", flush=True),
    )
    print(
        f"\n{args.count} of {args.images}, {args.seeds} × {args.states} states: {time.perf_counter() - started:.1f} s"
    )
    for i, name in enumerate(result.measures):
        print(f"\n{name}, averaged over ln β")
        show(result.average[i], result.average_half[i], result.bnrs, result.nfe)
    save(args.out, "manifold", result, sampling_plots.manifold(result))


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--what", choices=("sweep", "manifold"), required=True)
    flags.add_argument("--images", default="bundled", help="a source, as data.source")
    flags.add_argument("--count", type=int, default=1000, help="images of the empirical oracle")
    flags.add_argument("--states", type=int, default=128, help="states or samples a seed")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--steps", type=int, nargs="*", help="Heun steps of the empirical oracle")
    flags.add_argument("--resume", type=pathlib.Path, help="a file of rows for the empirical sweep to go on from")
    flags.add_argument("--out", type=pathlib.Path, default=pathlib.Path("figures"))
    args = flags.parse_args()
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load {load}")
    (run_sweep if args.what == "sweep" else run_manifold)(args)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
