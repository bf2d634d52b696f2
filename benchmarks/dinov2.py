"""How fast DINOv2's features are, and with FILE how near they come to the authors' code. Prints tables.

    python benchmarks/dinov2.py [FILE] [--sizes=s,b,l] [--images=32] [--batch=8]

FILE is of `tests/fixtures/make_dinov2_reference.py --size=… --count=… --out=FILE`, which says what it
needs. Weights are random: neither speed nor agreement depends on them.
"""

import argparse
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
from fixtures.make_dinov2_reference import SHAPES, SIZES, random_images, random_state, sampled

from warm_jax.metrics import dinov2
from warm_jax.metrics.extract import Extractor, collect, extract
from warm_jax.metrics.frechet import frechet_distance
from warm_jax.metrics.moments import moments


def extractor(size: str) -> Extractor:
    params = dinov2.convert(random_state(*SIZES[size]), *SIZES[size])
    return Extractor(f"ViT-{size.upper()}/14", "", SIZES[size][0], jax.device_put(params), dinov2.apply)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def speed(size: str, count: int, batch: int) -> None:
    network = extractor(size)
    images = random_images(count, (32, 32, 3))
    apply = jax.jit(network.apply)
    start = time.perf_counter()
    jax.block_until_ready(apply(network.params, images[:batch]))
    first, times = time.perf_counter() - start, []
    used = time.process_time()
    for part in np.split(images, count // batch):
        start = time.perf_counter()
        jax.block_until_ready(apply(network.params, part))
        times.append(time.perf_counter() - start)
    used = (time.process_time() - used) / count
    rates = " to ".join(f"{batch / t:.2f}" for t in (max(times), min(times)))
    print(
        f"{network.name}: {rates} images a second, {used:.2f} s of processor time each; "
        f"first batch with compilation {first:.1f} s",
        flush=True,
    )


def blocks(network: Extractor, expected: dict[str, np.ndarray], size: str) -> None:
    @jax.jit
    def run(params, images):
        made = dinov2.VisionTransformer(*SIZES[size])
        return made.apply({"params": params}, dinov2.preprocess(images), mutable=["intermediates"])

    features, seen = run(network.params, random_images(1, SHAPES[0]))
    tokens = np.asarray(seen["intermediates"]["blocks"]["tokens"][0])
    found = [relative(sampled(block), expected[f"block_{i}"]) for i, block in enumerate(tokens)]
    embedded = relative(sampled(np.asarray(seen["intermediates"]["embedded"][0])), expected["embedded"])
    print(f"embedded tokens {embedded:.1e}; blocks 1 … {len(found)}: {' '.join(f'{x:.1e}' for x in found)}")
    print(f"class token after the last normalisation {relative(np.asarray(features), expected['features']):.1e}")


def distances(network: Extractor, expected: dict[str, np.ndarray], batch: int) -> None:
    count = len(expected["edm2_1"])
    ours = {s: collect(extract(network, [random_images(count, (32, 32, 3), s)], batch)).pool for s in (1, 2)}
    for seed in (1, 2):
        apart = [relative(ours[seed], expected[f"{name}_{seed}"]) for name in ("edm2", "dgm_eval")]
        print(f"features of set {seed}, {count} images: from EDM2's {apart[0]:.1e}, from dgm-eval's {apart[1]:.1e}")
    sets = {"ours": (ours[1], ours[2])}
    sets |= {name: tuple(expected[f"{name}_{seed}"] for seed in (1, 2)) for name in ("edm2", "dgm_eval")}
    for name, pair in sets.items():
        print(f"FD, {name}: {frechet_distance(*(moments(features) for features in pair)):.6f}")
    print(f"FD of ours to EDM2's features, set 1: {frechet_distance(moments(ours[1]), moments(sets['edm2'][0])):.2e}")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("file", nargs="?")
    flags.add_argument("--sizes", default="s,b,l")
    flags.add_argument("--images", type=int, default=32)
    flags.add_argument("--batch", type=int, default=8)
    args = flags.parse_args()
    print(f"{jax.device_count()} × {jax.devices()[0].device_kind}, batch {args.batch}")
    if args.file is None:
        for size in args.sizes.split(","):
            speed(size, args.images, args.batch)
        return
    with np.load(args.file) as file:
        expected = dict(file)
    size = str(expected["size"])
    network = extractor(size)
    print(f"{network.name}, largest difference over the largest value:")
    blocks(network, expected, size)
    if "edm2_1" in expected:
        distances(network, expected, args.batch)


if __name__ == "__main__":
    main()
