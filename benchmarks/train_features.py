"""Trains the feature network `fashion_cnn` on the bundled Fashion-MNIST and writes its weights into the package.

    python benchmarks/train_features.py [--epochs=30] [--out=warm_jax/metrics/fashion_cnn.safetensors]

Images 0–7999 are trained on, shifted by up to two pixels; 8000–9999 give the accuracy, which is printed and stored with
the weights.
"""

import argparse
import gzip
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from warm_jax.metrics import fashion
from warm_jax.weights import tensors

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "warm_jax" / "data" / "bundled"
TRAINED, BATCH = 8000, 128


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, 8, the number of dimensions, each as a big-endian int32, the data."""
    data = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def standardized(raw):
    """Kernels of mean 0 and variance gain²/fan-in (Brock et al. 2021): trains as fast as with batch normalisation."""
    params = {name: value for name, value in raw.items() if not name.endswith("gain")}
    for name in [name for name in raw if name.startswith("conv") and name.endswith("kernel")]:
        kernel, gain = raw[name], raw[name.replace("kernel", "gain")]
        fan_in = kernel[..., 0].size
        centred = kernel - kernel.mean(axis=(0, 1, 2))
        params[name] = centred * gain * jax.lax.rsqrt(jnp.var(kernel, axis=(0, 1, 2)) * fan_in + 1e-8)
    return params


def cross_entropy(raw, images, labels):
    logits = fashion.apply(standardized(raw), images).logits
    targets = optax.smooth_labels(jax.nn.one_hot(labels, fashion.CLASSES), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each 28×28 image at a random place of a black 32×32 one."""
    out = np.zeros((len(images), 32, 32, 1), np.uint8)
    for image, (row, column), into in zip(images, rng.integers(0, 5, (len(images), 2)), out, strict=True):
        into[row : row + 28, column : column + 28, 0] = image
    return out


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--epochs", type=int, default=30)
    flags.add_argument("--out", type=Path, default=fashion.WEIGHTS)
    args = flags.parse_args()

    images = read_idx(BUNDLED / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(BUNDLED / "t10k-labels-idx1-ubyte.gz").astype(np.int32)
    steps = args.epochs * (TRAINED // BATCH)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3), weight_decay=0.05)
    raw = fashion.init(jax.random.key(0))
    relu_gain = (2 / (1 - 1 / np.pi)) ** 0.5
    raw |= {
        n.replace("bias", "gain"): jnp.full_like(b, relu_gain)
        for n, b in raw.items()
        if n.startswith("conv") and n.endswith("bias")
    }
    state = optimizer.init(raw)

    @jax.jit
    def step(raw, state, images, labels):
        loss, gradient = jax.value_and_grad(cross_entropy)(raw, images, labels)
        updates, state = optimizer.update(gradient, state, raw)
        return optax.apply_updates(raw, updates), state, loss

    rng, start = np.random.default_rng(0), time.perf_counter()
    for epoch in range(args.epochs):
        losses = []
        for indices in np.split(rng.permutation(TRAINED)[: TRAINED // BATCH * BATCH], TRAINED // BATCH):
            raw, state, loss = step(raw, state, shifted(images[indices], rng), labels[indices])
            losses.append(loss)
        params = standardized(raw)
        logits = jax.jit(fashion.apply)(params, images[TRAINED:, :, :, None]).logits
        accuracy = float((jnp.argmax(logits, axis=1) == labels[TRAINED:]).mean())
        elapsed = time.perf_counter() - start
        print(f"epoch {epoch + 1:3d}  loss {np.mean(losses):.4f}  accuracy {accuracy:.4f}  {elapsed:.0f} s", flush=True)

    about = {
        "data": "Fashion-MNIST t10k, images 0-7999 (MIT, Zalando SE)",
        "accuracy": f"{accuracy:.4f} on images 8000-9999",
        "command": shlex.join(["python", "benchmarks/train_features.py", *sys.argv[1:]]),
    }
    tensors.write_safetensors(args.out, {name: np.asarray(value) for name, value in params.items()}, about)
    print(f"{args.out}: {args.out.stat().st_size} bytes, {about}")


if __name__ == "__main__":
    main()
