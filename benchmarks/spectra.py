"""Seconds for the spectra of a whole set: reading, DCT power, radial spectrum with its errors, BNR. A Markdown table.

    python benchmarks/spectra.py [--images=zip:FILE] [--count=50000]

Without `--images`: random bytes of CIFAR-10's shape, made here, which need no decoding. Compilation is in the times.
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from warm_jax.analysis import spectra
from warm_jax.data import arrays, sources
from warm_jax.runtime import rounding

_BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="", help="a source, as zip:FILE; by default random bytes")
    parser.add_argument("--count", type=int, default=50_000, help="images at most")
    flags = parser.parse_args()
    if flags.images:
        source = sources.open_source(flags.images)
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (flags.count, 32, 32, 3), np.uint8)
        source = arrays.from_arrays("random bytes", pixels)
    count = min(flags.count, len(source))
    parts = [np.arange(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH)]

    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor() as pool:  # what follows decodes ahead while it measures
        measured = spectra.measure(pool.map(lambda part: source.read(part)[0], parts))
    passed = time.perf_counter() - start
    found = spectra.spectra(measured.power, (0.5, 1, 2, 10), (0.1, 0.3, 1.0), covariance=measured.covariance)
    total, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {jax.devices()[0].platform}\n")
    print("| images | count | size | one pass, s | all, s | processor time, s | slope | BNR for 5 % |")
    print("|---|---|---|---|---|---|---|---|")
    size = "×".join(map(str, source.image_shape))
    print(
        f"| {source.spec.rpartition('/')[-1]} | {count:,} | {size} | {passed:.1f} | {total:.1f} | {cpu:.1f} "
        f"| {rounding.with_error(found.slope, found.slope_error)} | {found.recommended:.2f} |"
    )


if __name__ == "__main__":
    main()
