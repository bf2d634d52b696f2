"""What `--mode=sample` adds to the sampling loop: images a second of both, in turn, and the ratio.

    python benchmarks/sampling.py          # a tiny network, where writing weighs most, and a small one
    python benchmarks/sampling.py --config=cifar10 --images=2048

The loop alone has two batches in flight, and nothing is fetched. The command draws, fetches, encodes, and writes a PNG
file an image; its rate is what it prints, from the first batch to the last file. Weights are drawn anew.
"""

import argparse
import collections
import contextlib
import io
import pathlib
import re
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import gradients
import jax
import numpy as np

from warm_jax.experiments import config_files, experiment
from warm_jax.runtime import checkpoint, host, mesh, workdirs
from warm_jax.sampling import generate, runs
from warm_jax.training import step


def make_run(config, workdir):
    """A workdir with one checkpoint, of weights drawn anew."""
    exp = experiment.build(config)
    params = gradients.redrawn(exp)
    state = step.State(np.int32(1), params, params, step.optimizer(config).init(params), np.int32(0), averages=())
    workdir.mkdir(parents=True, exist_ok=True)
    workdirs.save_config(config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    checkpoints.save(1, **step.to_store(jax.device_put(state, mesh.replicated(exp.mesh))))
    checkpoints.wait()
    checkpoints.close()


def bare(draw, weights, count):
    """Images a second of the loop alone."""
    begun, started = collections.deque(), time.perf_counter()
    for first in range(0, count, draw.batch_size):
        begun.append(draw.begin(weights, np.arange(first, min(count, first + draw.batch_size))))
        if len(begun) > 2:
            jax.block_until_ready(begun.popleft().drawn)
    jax.block_until_ready([one.drawn for one in begun])
    return count / (time.perf_counter() - started)


def whole(config, workdir, count):
    """Images a second that `--mode=sample` says."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()) as said:
        status = generate.sample(generate.prepare(config, workdir, f"0-{count - 1}", out, -1))
        written = len(list(pathlib.Path(out).glob("[0-9]*.png")))
    if status or written != count:
        raise RuntimeError(f"status {status}, {written} of {count} images: {said.getvalue()}")
    return float(re.search(r"([\d.]+) images/s", said.getvalue())[1])


def measure(config, images, rounds=5):
    """[(images/s of the loop alone, of the command)], a pair a round, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        make_run(config, workdir)
        run = runs.open_run(config, workdir, -1)
        _, weights = runs.load_weights(run)
        draw = run.sampler()
        bare(draw, weights, draw.batch_size)
        return [(bare(draw, weights, images), whole(config, workdir, images)) for _ in range(rounds)]


def summary(pairs):
    """(median of the loop's rates, of the command's, of the ratios)."""
    return (
        *(statistics.median(column) for column in zip(*pairs, strict=True)),
        statistics.median(b / a for a, b in pairs),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="a name; none: smoke and fashion_mnist")
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    host.keep_programs()
    chosen = [(asked.config, asked.images or 1024)] if asked.config else [("smoke", 2048), ("fashion_mnist", 256)]
    host.share_cores(min(config_files.load(name).train.batch_size for name, _ in chosen))
    print(f"on {mesh.describe(mesh.make_mesh())}")
    print(
        "| config | loop alone, images/s | `--mode=sample` | ratio | of each round |\n|---|---:|---:|---:|---|",
        flush=True,
    )
    for name, images in chosen:
        pairs = measure(config_files.load(name), images, asked.rounds)
        loop, command, ratio = summary(pairs)
        each = ", ".join(f"{b / a:.3f}" for a, b in pairs)
        print(f"| `{name}` | {loop:.1f} | {command:.1f} | {ratio:.3f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
