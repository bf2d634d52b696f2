"""The gradients of each precision against float32's, layer by layer.

    python benchmarks/gradients.py                 # ten minutes on two CPU cores
    python benchmarks/gradients.py --networks=fashion_mnist
    python benchmarks/gradients.py --workdir=runs/fashion_mnist     # a trained one's, instead

A precision is a dtype and a platform, as `layers.policy` combines them; all are computed here, on a CPU, where XLA may
keep no more digits than the program says. The reference is float32 with autodiff's norms. All see the same batch, noise
and dropout. The networks have the published depth, with fewer channels where the whole would take hours:

    cifar10         32×32, four blocks a level, 32 channels; weights drawn anew, so that no layer is silent
    ffhq64          64×64, four blocks a level, 16 channels; the same
    fashion_mnist   the bundled set's, whole; weights drawn anew

Of each: the cosine of the whole gradient, its relative error, and the layer whose cosine is the least. Layers with less
than 1e-5 of the gradient's norm are left out: of some the exact gradient is zero.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import curves
import jax
import jax.numpy as jnp
import numpy as np

from configs import cifar10, ffhq64
from warm_jax.data import sources
from warm_jax.experiments import experiment
from warm_jax.runtime import host, workdirs
from warm_jax.sampling import runs

PRECISIONS = {
    "float32 of GPUs": ("float32", "gpu"),
    "float32 of CPUs": ("float32", "cpu"),
    "bfloat16 of GPUs": ("bfloat16", "gpu"),
    "bfloat16 of TPUs": ("bfloat16", "tpu"),
    "bfloat16 of CPUs": ("bfloat16", "cpu"),
}
NETWORKS = ("cifar10", "ffhq64", "fashion_mnist")
NEGLIGIBLE = 1e-5  # of the gradient's norm


def build(name):
    """The experiment of a network, and how many images a batch of it has."""
    if name == "fashion_mnist":
        return experiment.build(curves.config(channels=32)), 64
    made = {"cifar10": cifar10, "ffhq64": ffhq64}[name].get_config()
    made.model.channels = 32 if name == "cifar10" else 16
    return experiment.build(made), 8


def trained(workdir):
    """The experiment of a run and its averaged weights."""
    found = runs.open_run(workdirs.load_config(workdir), workdir, -1)
    return found.experiment, runs.load_ema(found)[1]


def redrawn(exp, seed=0):
    """Weights of the network's shapes, none zero: kernels of variance 1 / fan-in, scales about 1, biases about 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kind, value = path[-1].key, rng.normal(size=leaf.shape)
        value = value * np.prod(leaf.shape[:-1]) ** -0.5 if kind == "kernel" else 0.3 * value + (kind == "scale")
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(exp.model.init, jax.random.key(0)))


def batch(exp, size):
    """Bytes and labels: of the bundled images where the network takes those, else smooth random ones."""
    shape = exp.process.image_shape
    if shape == (28, 28, 1):
        images, labels = sources.open_source("bundled").read(np.arange(size))
        return images, labels.astype(np.int32)
    rng = np.random.default_rng(0)
    noise = np.fft.rfft2(rng.normal(size=(size, *shape)), axes=(1, 2))
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None])
    smooth = np.fft.irfft2(noise / np.maximum(frequency, 1 / shape[0])[None, :, :, None], shape[:2], axes=(1, 2))
    smooth = smooth / smooth.std(axis=(1, 2, 3), keepdims=True)
    return np.clip(127.5 + 64 * smooth, 0, 255).astype(np.uint8), np.zeros(size, np.int32)


def gradients(exp, precision, params, images, labels):
    """The gradient of the training loss, computed as `precision` says on the device where `params` are."""
    on_cpu = all(device.platform == "cpu" for device in jax.tree.leaves(params)[0].devices())
    options = {"xla_allow_excess_precision": False}
    options |= {"xla_backend_optimization_level": 0} if on_cpu else {}  # compiles in a third of the time
    made, key = curves.computed(exp, precision), jax.random.key(5)
    differentiate = jax.grad(lambda p: curves.objective(made, p, images, labels, key, train=True))
    return jax.jit(differentiate, compiler_options=options)(params)


def compare(exact, found):
    """(cosine, relative error, least cosine of a layer, that layer's name and relative error, layers left out)."""
    pairs = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), *(np.asarray(x, np.float64).ravel() for x in (a, b)))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(found), strict=True)
    ]
    norm = np.sqrt(sum(a @ a for _, a, _ in pairs))
    error = np.sqrt(sum((a - b) @ (a - b) for _, a, b in pairs)) / norm
    cosine = sum(a @ b for _, a, b in pairs) / norm / np.sqrt(sum(b @ b for _, _, b in pairs))
    told = [(name, a, b) for name, a, b in pairs if np.linalg.norm(a) > NEGLIGIBLE * norm]
    each = [
        (a @ b / (np.linalg.norm(a) * max(np.linalg.norm(b), 1e-300)), name, np.linalg.norm(a - b) / np.linalg.norm(a))
        for name, a, b in told
    ]
    return cosine, error, *min(each), len(pairs) - len(told)


def row(network, precision, found):
    """A line of the table."""
    cosine, error, least, name, worst, left_out = found
    return (
        f"| {network} | {precision} | {1 - cosine:.1e} | {error:.1e} | {1 - least:.1e} | {worst:.1e} | "
        f"`{name.removeprefix('params/')}` | {left_out} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--workdir", type=pathlib.Path, help="a run of images that are bundled")
    asked = parser.parse_args()
    networks = curves.chosen(parser, asked.networks, NETWORKS)
    precisions = curves.chosen(parser, asked.precisions, PRECISIONS)
    host.keep_programs()
    print("| network | precision | 1 - cosine | relative error | worst layer: 1 - cosine | error | which | left out |")
    print("|---|---|---:|---:|---:|---:|---|---:|", flush=True)
    for network in [asked.workdir.name] if asked.workdir else networks:
        if asked.workdir:
            (exp, params), size = trained(asked.workdir), 64
        else:
            exp, size = build(network)
            params = redrawn(exp)
        images, labels = batch(exp, size)
        started, exact = time.perf_counter(), gradients(exp, curves.REFERENCE, params, images, labels)
        print(f"{network}: {time.perf_counter() - started:.0f} s a gradient, compiled", file=sys.stderr, flush=True)
        for name in precisions:
            found = gradients(exp, PRECISIONS[name], params, images, labels)
            print(row(network, name, compare(exact, found)), flush=True)


if __name__ == "__main__":
    main()
