"""What must hold on any device, against numpy in float64: `JAX_PLATFORMS=cuda,cpu pytest -n 0 -m accelerator`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.signal
import tiny

from warm_jax.diffusion import dct
from warm_jax.models import layers
from warm_jax.runtime import mesh
from warm_jax.sampling import batches
from warm_jax.training import step

pytestmark = [pytest.mark.accelerator, pytest.mark.usefixtures("quick_compile")]


def test_blur_is_float32():
    """Products of the DCT would be off by 1e-3 in TF32, and by 1e-2 in bfloat16."""
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    frequencies = np.pi**2 * (np.arange(64)[:, None] ** 2 + np.arange(64)[None] ** 2) / 64**2
    kept = np.exp(-frequencies * 2.0**2 / 2)[None, :, :, None]
    expected = scipy.fft.idctn(kept * scipy.fft.dctn(x, axes=(1, 2), norm="ortho"), axes=(1, 2), norm="ortho")
    found = jax.jit(dct.blur)(jnp.asarray(x, jnp.float32), jnp.full(2, 2.0))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_float32_convolution_is_float32():
    """Forward and both gradients, of a layer as networks have it: TF32 would be off by 1e-3."""
    rng = np.random.default_rng(1)
    x, kernel, out = rng.normal(size=(1, 6, 6, 8)), rng.normal(size=(3, 3, 8, 4)), rng.normal(size=(1, 6, 6, 4))
    layer = layers.Convolution(4, 3, jnp.float32, jax.nn.initializers.zeros)

    def product(x, kernel):
        return layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(4)}}, x)[0]

    given = (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    found, back = jax.vjp(jax.jit(product), *given)
    found = (found, *back(jnp.asarray(out, jnp.float32)))

    def correlated(a, b):
        return scipy.signal.correlate2d(a, b, "same")

    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))[0]
    forward = np.stack([sum(correlated(x[0, ..., i], kernel[..., i, o]) for i in range(8)) for o in range(4)], -1)
    of_x = [sum(scipy.signal.convolve2d(out[0, ..., o], kernel[..., i, o], "same") for o in range(4)) for i in range(8)]
    of_kernel = [
        [[np.sum(padded[r : r + 6, c : c + 6, :, None] * out[0, :, :, None], axis=(0, 1))] for c in range(3)]
        for r in range(3)
    ]
    wanted = (forward[None], np.stack(of_x, -1)[None], np.array(of_kernel)[:, :, 0])
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


@pytest.mark.parametrize("seed", [0])
def test_the_same_state_and_batch_make_the_same_step(seed):
    """Bitwise: what resuming stands on."""
    exp = tiny.build(train__batch_size=16, seed=seed)
    compiled = step.compile_step(exp)
    images = np.random.default_rng(seed).integers(0, 256, (16, 28, 28, 1)).astype(np.uint8)
    placed = jax.device_put((images, np.zeros(16, np.int32)), mesh.split(exp.mesh))
    ends = []
    for _ in range(2):
        state, totals = step.init_state(exp), jax.device_put(step.zero_totals(), mesh.replicated(exp.mesh))
        for _ in range(2):
            state, totals, _ = compiled(state, totals, *placed)
        ends.append(jax.device_get((state.params, state.ema, state.optimizer)))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ends[0]))


def test_an_image_is_a_function_of_its_seed():
    """Bitwise, in one program: whatever is drawn with it."""
    exp = tiny.build()
    draw = batches.Sampler(exp, batch_size=8)
    shapes = jax.eval_shape(exp.model.init, jax.random.key(0))
    weights = tiny.randomised(jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), shapes), np.random.default_rng(0))
    weights = jax.device_put(weights, mesh.replicated(exp.mesh))
    whole, other = draw(weights, np.arange(8)), draw(weights, np.array([6, 1, 3]))
    np.testing.assert_array_equal(other.images, whole.images[[6, 1, 3]])
    assert len({image.tobytes() for image in whole.images}) == 8
