"""The norm with a derivative of its own against autodiff of its definition, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from warm_jax.models import adm, unet
from warm_jax.models.normalization import norm_act
from warm_jax.runtime import mesh

SHAPES = {
    "square": (2, 4, 4, 8, 4),
    "odd": (3, 5, 3, 6, 2),
    "one_pixel": (2, 1, 1, 8, 2),
    "groups_of_one": (1, 3, 2, 4, 4),
}


def defined(x, shift, gain, offset, mask, groups, epsilon, silu, kept):
    """By the definition: mean and variance of each image and group, and what follows."""
    b, h, w, c = x.shape
    u = (x + shift[:, None, None]).reshape(b, h, w, groups, c // groups)
    mean = u.mean(axis=(1, 2, 4), keepdims=True)
    variance = ((u - mean) ** 2).mean(axis=(1, 2, 4), keepdims=True)
    z = ((u - mean) / jnp.sqrt(variance + epsilon)).reshape(x.shape) * gain[:, None, None] + offset[:, None, None]
    y = z / (1 + jnp.exp(-z)) if silu else z
    return y if mask is None else y * mask / kept


def arguments(shape, dtype=np.float64, seed=0):
    b, h, w, c = shape[:4]
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(b, h, w, c)) * 2 + 0.5, dtype)
    shift, gain, offset = (jnp.asarray(rng.normal(size=(b, c)) + m, dtype) for m in (0.3, 1, 0))
    return (
        (x, shift, gain, offset),
        jnp.asarray(rng.random((b, h, w, c)) < 0.8),
        jnp.asarray(rng.normal(size=x.shape), dtype),
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("one_pass", [False, True])
def test_values_and_derivatives_in_float64(shape, dropped, silu, one_pass):
    with jax.enable_x64(True):
        given, mask, weights = arguments(shape)
        mask, groups = mask if dropped else None, shape[-1]

        def ours(*args):
            return jnp.sum(weights * norm_act(*args, mask, groups, 1e-5, one_pass, silu, 0.8, jnp.float64))

        def theirs(*args):
            return jnp.sum(weights * defined(*args, mask, groups, 1e-5, silu, 0.8))

        found, wanted = (jax.value_and_grad(f, argnums=(0, 1, 2, 3))(*given) for f in (ours, theirs))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, wanted)


@pytest.mark.parametrize("wrap", ["jit", "vmap", "remat", "vmap of remat"])
@pytest.mark.parametrize("one_pass", [False, True])
def test_it_is_transformed_as_any_function(wrap, one_pass):
    with jax.enable_x64(True):
        given, mask, weights = arguments(SHAPES["square"])

        def loss(of, *args):
            return jnp.sum(weights * of(*args))

        ours = functools.partial(loss, lambda *a: norm_act(*a, mask, 4, 1e-5, one_pass, True, 0.8, jnp.float64))
        theirs = functools.partial(loss, lambda *a: defined(*a, mask, 4, 1e-5, True, 0.8))
        if "remat" in wrap:
            ours = jax.checkpoint(ours)
        gradients = [jax.grad(f, argnums=(0, 1, 2, 3)) for f in (ours, theirs)]
        if "vmap" in wrap:
            given = tuple(jnp.stack([a, 2 * a]) for a in given)
            gradients = [jax.vmap(g) for g in gradients]
        gradients[0] = jax.jit(gradients[0])
        found, wanted = (g(*given) for g in gradients)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, wanted)


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_images_and_parameters_over_eight_devices(fsdp, one_pass, remat):
    """As a train step has them: an image a device, scales divided over groups; gradients come out divided so."""
    over = mesh.make_mesh(8, fsdp=fsdp)
    divided = NamedSharding(over, PartitionSpec(mesh.PARAMETER_AXIS))
    with jax.enable_x64(True):
        (x, shift, gain, offset), mask, weights = arguments((8, 3, 4, 8))
        scale, bias = gain[0], offset[0]

        def loss(of, x, shift, scale, bias, mask):
            gain, offset = (jnp.broadcast_to(p, (8, 8)) for p in (scale, bias))
            return jnp.sum(weights * of(x, shift, gain, offset, mask))

        ours = functools.partial(loss, lambda *a: norm_act(*a, 4, 1e-5, one_pass, True, 0.8, jnp.float64))
        theirs = functools.partial(loss, lambda *a: defined(*a, 4, 1e-5, True, 0.8))
        wanted = jax.value_and_grad(theirs, argnums=(0, 1, 2, 3))(x, shift, scale, bias, mask)
        spread = (mesh.split(over), mesh.split(over), divided, divided)
        jitted = jax.jit(
            jax.value_and_grad(jax.checkpoint(ours) if remat else ours, argnums=(0, 1, 2, 3)),
            in_shardings=(*spread, mesh.split(over)),
            out_shardings=(mesh.replicated(over), spread),
        )
        found = jitted(x, shift, scale, bias, mask)
        assert {piece.data.shape for piece in found[1][2].addressable_shards} == {(8 // fsdp,)}
        assert {piece.data.shape[0] for piece in found[1][0].addressable_shards} == {1}
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, wanted)


def test_bfloat16_in_and_out_computes_in_float32():
    """Of numbers that bfloat16 holds exactly the result is the float64 one, rounded once."""
    given, mask, weights = arguments(SHAPES["square"], np.float32)
    x = given[0].astype(jnp.bfloat16)
    y = norm_act(x, *given[1:], mask, 4, 1e-5, True, True, 0.8, jnp.bfloat16)
    with jax.enable_x64(True):
        exact = defined(*(jnp.asarray(np.asarray(a), jnp.float64) for a in (x, *given[1:])), mask, 4, 1e-5, True, 0.8)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), np.asarray(exact), rtol=2**-8, atol=1e-6)
    grads = jax.grad(
        lambda *a: jnp.sum(weights * norm_act(*a, mask, 4, 1e-5, True, True, 0.8, jnp.bfloat16).astype(jnp.float32)),
        argnums=(0, 1),
    )(x, *given[1:])
    assert (grads[0].dtype, grads[1].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("kind", [unet.UNet, adm.ADM])
def test_gradients_of_the_policy_of_gpus_are_those_of_float32(kind):
    """Layer by layer, of re-randomised weights, in a program that may not keep more digits than it says."""
    rng = np.random.default_rng(0)
    network = kind(3, channels=16, channel_mult=(1, 2), num_blocks=1, attention=(4,), dropout=0.1)
    x, weights = (jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32) for _ in range(2))
    t, key = jnp.asarray([-1.0, -0.3, 0.1, 0.5]), jax.random.key(3)
    shapes = jax.eval_shape(network.init, key, x, t)

    def drawn(shape):
        return jnp.asarray(rng.normal(size=shape) / max(1, np.prod(shape[:-1])) ** 0.5, jnp.float32)

    params = jax.tree.map(lambda p: drawn(p.shape), shapes)
    # The level makes it compile in a third of the time.
    options = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}

    def gradients(dtype, platform):
        made = network.clone(dtype=dtype, platform=platform)
        loss = lambda p: jnp.sum(weights * made.apply(p, x, t, train=True, rngs={"dropout": key}))  # noqa: E731
        return jax.jit(jax.grad(loss), compiler_options=options)(params)

    exact, found = gradients(jnp.float32, "cpu"), gradients(jnp.bfloat16, "gpu")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(found), strict=True):
        assert b.dtype == jnp.float32
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
        cosine = a @ b / max(1e-30, np.linalg.norm(a) * np.linalg.norm(b))
        assert cosine > 0.99 or np.linalg.norm(a) < 1e-6, (jax.tree_util.keystr(path), cosine)
