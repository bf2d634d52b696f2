"""What the tests of networks share: inputs, parameters drawn anew, and what a program is made of.

Zero-initialised layers blind a test, so all parameters are drawn anew before anything is compared.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half of the time


def batch(model, height=8, width=8, size=2):
    rng = np.random.default_rng(1)
    arrays = {
        "x": rng.normal(size=(size, height, width, 3)),
        "condition": rng.normal(size=size),
        "second": rng.uniform(0, 3, size),
        "class_labels": np.eye(model.num_classes)[np.arange(size) % model.num_classes],
        "augment_labels": rng.normal(size=(size, model.augment_labels)),
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}


def randomised(model, inputs):
    """Parameters of the model's shapes, none zero: kernels of variance 1/fan-in, scales about 1, biases about 0."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape)
        kind = path[-1].key
        value *= {"kernel": np.prod(leaf.shape[:-1]) ** -0.5, "freqs": 2.0}.get(kind, 0.3)
        if path[-2].key.startswith("enc") and path[-2].key.endswith("_conv"):
            value *= 1e-3  # the variance is about GroupNorm's epsilon then, which would otherwise go unnoticed
        return jnp.asarray(value + (kind == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def equations(jaxpr):
    """Every equation, those of inner computations included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def products(jaxpr):
    """(name, operand dtypes, precision) of each convolution and matrix product."""
    for equation in equations(jaxpr):
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            yield name, {str(v.aval.dtype) for v in equation.invars}, equation.params["precision"]
