"""How fast metrics are: extraction beside the pure network, and the linear algebra of a FID. Prints one table.

    python benchmarks/metrics.py [--images=1000] [--batch=50] [--extractors=fashion,efficientnet,inception] [--dim=2048]

Inception runs with random weights, EfficientNet with its package's where installed: speed does not depend on them.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from warm_jax.metrics import efficientnet, fashion, inception
from warm_jax.metrics.extract import Extractor, accumulate, extract
from warm_jax.metrics.frechet import expected_bias, frechet_distance
from warm_jax.metrics.moments import Statistics
from warm_jax.metrics.neighbours import precision_recall
from warm_jax.metrics.scores import kid


def seconds(function, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def random_inception() -> Extractor:
    def draw(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(np.random.default_rng(0).standard_normal(leaf.shape, np.float32) * (2 / fan_in) ** 0.5)

    params = jax.tree.map(draw, inception.parameter_shapes())
    return Extractor("inception (random weights)", "", inception.POOL_DIM, params, inception.apply)


def extraction(extractor: Extractor, shape: tuple[int, ...], count: int, batch: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    list(extract(extractor, [images[:batch]], batch, sharding))  # compiles

    network = jax.jit(extractor.apply)
    on_device = jax.device_put(images[:batch], sharding)
    params = jax.device_put(extractor.params, NamedSharding(mesh, P()))
    jax.block_until_ready(network(params, on_device))
    repeats = max(1, count // batch)
    pure = batch / seconds(lambda: jax.block_until_ready(network(params, on_device)), repeats)
    whole = count / seconds(lambda: accumulate(extract(extractor, [images], batch, sharding), extractor.dim))
    print(f"{extractor.name:28s} {shape!s:14s} pure network {pure:8.1f} img/s   extraction {whole:8.1f} img/s")


def algebra(dim: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2 * dim, dim)), rng.standard_normal((2 * dim, dim)) * np.linspace(0.1, 2, dim)
    a, b = (Statistics.empty(dim).update(f).finalize() for f in (x, y))
    print(f"Fréchet distance, {dim} features     {seconds(lambda: frechet_distance(a, b)):8.2f} s")
    print(f"expected bias, {dim} features        {seconds(lambda: expected_bias(b, 50_000)):8.2f} s")
    features = x.astype(np.float32)
    print(
        f"1,000 features into statistics      {seconds(lambda: Statistics.empty(dim).update(features[:1000])):8.2f} s"
    )
    print(f"KID, 10 subsets of 1,000            {seconds(lambda: kid(x, y, subsets=10)):8.2f} s")
    print(f"precision and recall, 4,096 each    {seconds(lambda: precision_recall(x[:4096], y[:4096])):8.2f} s")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--images", type=int, default=1000)
    flags.add_argument("--batch", type=int, default=50)
    flags.add_argument("--extractors", default="fashion,efficientnet,inception")
    flags.add_argument("--dim", type=int, default=2048)
    args = flags.parse_args()
    print(f"{jax.device_count()} × {jax.devices()[0].device_kind}, batch {args.batch}")
    for name in filter(None, args.extractors.split(",")):
        if name == "fashion":
            extraction(fashion.load(), (28, 28, 1), 10 * args.images, args.batch)
        elif name == "efficientnet":
            try:
                extraction(efficientnet.load(), (32, 32, 3), args.images, args.batch)
            except FileNotFoundError as error:
                print(f"efficientnet: {error}")
        else:
            extraction(random_inception(), (32, 32, 3), max(2 * args.batch, args.images // 10), args.batch)
    if args.dim:
        algebra(args.dim)


if __name__ == "__main__":
    main()
