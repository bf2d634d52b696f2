"""ADM against its published count of parameters and a second implementation in numpy (`reference_adm.py`).

Zero-initialised layers blind a test, so all parameters are drawn anew before anything is compared.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_adm
from networks import batch, distance, equations, jit, products, randomised

from warm_jax.models.adm import ADM
from warm_jax.models.geometry import check_geometry
from warm_jax.models.unet import UNet

SMALL = {"channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attention": (8,), "dropout": 0.5}
SMALL |= {"out_channels": 6, "num_classes": 3, "augment_labels": 4, "second_condition": True}


@pytest.fixture(scope="module")
def small():
    """Model, parameters, inputs, the jitted model, and its output."""
    model = ADM(**SMALL)
    inputs = batch(model)
    params = randomised(model, inputs)
    apply = jit(model.apply)
    return model, params, inputs, apply, apply(params, **inputs)


# What is published


@pytest.fixture(scope="module")
def imagenet():
    model = ADM(3, num_classes=1000)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.zeros(1))["params"]


def test_imagenet_parameter_count(imagenet):
    """NVIDIA's class-conditional network for ImageNet-64."""
    assert sum(leaf.size for leaf in jax.tree.leaves(imagenet)) == 295_899_267


def test_imagenet_layers(imagenet):
    """Attention after every block at 32, 16 and 8 and in the first at the bottom; other blocks have none.

    A shortcut has a layer where channels change: at the first block of a level, and after each concatenation.
    """
    sides = ("32x32", "16x16", "8x8")
    attending = {f"enc_{side}_block{i}" for side in sides for i in range(3)} | {"dec_8x8_in0"}
    attending |= {f"dec_{side}_block{i}" for side in sides for i in range(4)}
    assert {name for name, block in imagenet.items() if "qkv" in block} == attending
    wider = {f"enc_{side}_block0" for side in sides}
    joined = {f"dec_{side}_block{i}" for side in ("64x64", *sides) for i in range(4)}
    assert {name for name, block in imagenet.items() if "skip" in block} == wider | joined
    assert imagenet["map_label"]["kernel"].shape == (1000, 768) and "bias" not in imagenet["map_label"]


def test_fields_and_call_are_the_unets():
    ours, theirs = ([(field.name, field.type) for field in dataclasses.fields(kind)] for kind in (ADM, UNet))
    assert ours == theirs


@pytest.fixture(scope="module")
def initial():
    model = ADM(**SMALL | {"channels": 32, "num_classes": 5})
    inputs = batch(model)
    params = jit(model.init)(jax.random.key(0, impl="rbg"), **inputs)  # rbg: compiles faster
    return model, inputs, params


def test_initial_values(initial):
    """Kernels and biases uniform on ±1/√fan-in (torch's rule), classes of variance 1, and what starts at zero."""
    params = jax.tree.map(np.asarray, initial[2]["params"])
    bottom, joined = params["dec_4x4_in0"], params["dec_8x8_block0"]
    for layer, fan_in in [
        (bottom["conv0"], 9 * 64),
        (bottom["affine"], 128),
        (bottom["qkv"], 64),
        (joined["skip"], 64 + 32),
        (params["enc_8x8_conv"], 27),
        (params["map_layer0"], 32),
        (params["map_layer1"], 128),
    ]:
        for leaf, least in ((layer["kernel"], 0.95), (layer["bias"], 0.7)):
            assert least < np.max(np.abs(leaf)) * fan_in**0.5 <= 1.0001
            assert np.std(leaf) == pytest.approx((3 * fan_in) ** -0.5, rel=0.3 if leaf.ndim == 1 else 0.1)
    assert np.std(params["map_label"]["kernel"]) == pytest.approx(1.0, rel=0.1)
    blocks = [block for block in params.values() if "conv1" in block]
    zero = [block[name] for block in blocks for name in ("conv1", "proj") if name in block]
    zero += [params[name] for name in ("out_conv", "map_second", "map_augment")]
    assert len(zero) == 10 + 4 + 3  # ten blocks, of which four attend
    assert not any(leaf.any() for layer in zero for leaf in layer.values())


def test_output_starts_at_zero(initial):
    model, inputs, params = initial
    y = jit(model.apply)(params, **inputs)
    assert y.shape == (2, 8, 8, 6) and not y.any()


# A second implementation


@pytest.mark.parametrize(
    ("options", "height", "width", "attending"),
    [
        # One head of 64 channels at the larger side 12, two at 6; then one of 48, and at the bottom always one.
        ({"channels": 64, "attention": (12, 6)}, 8, 12, 2 * (1 + 2) + 1),
        ({"channel_mult": (1, 3, 2), "num_blocks": 2, "attention": (4,), "patch_size": 2}, 16, 8, (2 + 3) + 1),
        ({"channels": 32, "channel_mult": (2, 1), "attention": ()}, 4, 8, 1),
    ],
)
def test_equals_a_second_implementation(options, height, width, attending):
    model = ADM(**SMALL | options)
    inputs = batch(model, height, width)
    params = randomised(model, inputs)
    ours = jit(model.apply)(params, **inputs)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params["params"], inputs))
    shape = {"levels": len(model.channel_mult), "num_blocks": model.num_blocks, "patch_size": model.patch_size}
    theirs = reference_adm.adm(exact[0], **exact[1], **shape)
    assert ours.shape == (2, height, width, 6) and ours.dtype == jnp.float32
    assert np.max(np.abs(ours - theirs)) < 1e-4 * np.max(np.abs(theirs))
    assert sum("qkv" in block for block in params["params"].values()) == attending


# What the output depends on


@pytest.mark.parametrize("name", ["condition", "second", "class_labels", "augment_labels"])
def test_depends_on(small, name):
    """Each image's own conditions matter to it, and to no other image."""
    _, params, inputs, apply, output = small
    changed = inputs[name].at[1].set(jnp.flip(inputs[name][0]) + 0.5)
    other = apply(params, **inputs | {name: changed})
    assert distance(other[1], output[1]) > 1e-3
    np.testing.assert_allclose(other[0], output[0], atol=1e-5)


def test_no_label_is_the_zero_vector(small):
    _, params, inputs, apply, output = small
    labels = ("class_labels", "augment_labels")
    zeros = apply(params, **inputs | {name: jnp.zeros_like(inputs[name]) for name in labels})
    none = apply(params, **inputs | dict.fromkeys(labels))
    np.testing.assert_allclose(none, zeros, atol=1e-5)
    assert distance(zeros, output) > 1e-3


# Dropout, memory, precision


def learning(model, params, inputs):
    """The output with dropout, and gradients of a loss that hears all of it, as a function of the key."""

    def loss(params, key):
        y = model.apply(params, **inputs, train=True, rngs={"dropout": key})
        return jnp.mean(jnp.square(y - 1.0)), y

    gradient = jax.grad(loss, has_aux=True)
    return jit(lambda key: gradient(params, key)[::-1])


@pytest.fixture(scope="module")
def training(small):
    model, params, inputs, *_ = small
    return learning(model, params, inputs)


def test_dropout_only_in_training(small, training):
    _, params, inputs, _, output = small
    one, two = (training(jax.random.key(seed))[0] for seed in (1, 2))
    assert distance(one, output) > 1e-2 and distance(one, two) > 1e-2
    off = ADM(**SMALL | {"dropout": 0.0})  # asks for no key then
    jax.eval_shape(lambda: off.apply(params, **inputs, train=True))


def test_rematerialisation_changes_nothing(small, training):
    """Output and gradients are those without, with the same dropout; only blocks at the asked resolution are redone."""
    _, params, inputs, *_ = small
    key = jax.random.key(1)
    # At 8: block0, up, and two blocks with skips. At 4: down, block0, in0, in1, and two with skips.
    for remat, blocks in (((), 0), ((8,), 4), ((8, 4), 10)):
        model = ADM(**SMALL | {"remat": remat})
        program = jax.make_jaxpr(lambda model=model: model.apply(params, **inputs))()
        assert sum(equation.primitive.name == "remat2" for equation in equations(program.jaxpr)) == blocks
    y, gradient = learning(model, params, inputs)(key)
    expected, without = training(key)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(without), strict=True):
        assert other.any(), path  # every parameter learns
        assert distance(leaf, other) < 1e-4, path


def test_bfloat16_is_close_and_stays_inside(small):
    _, params, inputs, _, output = small
    half = ADM(**SMALL | {"dtype": jnp.bfloat16})
    y = jit(half.apply)(params, **inputs)
    assert y.dtype == jnp.float32
    assert 1e-4 < distance(y, output) < 5e-2
    shapes = jax.eval_shape(half.init, jax.random.key(0), **inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_of_every_product(small, dtype):
    """In float32, all at HIGHEST, backward too; in bfloat16, the convolutions, while embeddings stay exact."""
    _, params, inputs, *_ = small
    model = ADM(**SMALL | {"dtype": jnp.dtype(dtype)})
    with jax.numpy_dtype_promotion("strict"):
        jaxpr = jax.make_jaxpr(jax.grad(lambda params: model.apply(params, **inputs).sum()))(params).jaxpr
    found = list(products(jaxpr))
    assert {name for name, *_ in found} == {"dot_general", "conv_general_dilated"}
    highest = jax.lax.Precision.HIGHEST
    for name, dtypes, precision in found:
        if dtypes == {"float32"}:
            assert precision in (highest, (highest, highest))
        if name == "conv_general_dilated":
            assert dtypes == {dtype}
    halves = [name for name, dtypes, _ in found if "bfloat16" in dtypes]
    assert ("dot_general" in halves) == (dtype == "bfloat16")


def test_norms_softmax_and_activations_stay_float32(small):
    """Norms alone take a square root, softmax alone an exponential and a maximum, activations alone a sigmoid."""
    _, params, inputs, *_ = small
    model = ADM(**SMALL | {"dtype": jnp.bfloat16})
    jaxpr = jax.make_jaxpr(lambda: model.apply(params, **inputs))().jaxpr
    used = {}
    for equation in equations(jaxpr):
        used.setdefault(equation.primitive.name, set()).update(str(v.aval.dtype) for v in equation.invars)
    for name in ("rsqrt", "exp", "reduce_max", "logistic", "reduce_sum"):
        assert used[name] == {"float32"}, name


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # A single level is the bottom, which has attention in any case.
        ({"channels": 96, "channel_mult": (1,)}, "channels is 96: attention over 96 .* heads of 64.*; use 64 or 128"),
        ({"channels": 32, "channel_mult": (1, 3)}, "channels is 32: attention over 96 channels .*; use 20 or 64"),
        ({"channels": 96, "channel_mult": (1, 2), "attention": (32,)}, "96: attention over 96 .*; use 64 or 128"),
        # What GroupNorm wants comes first, but the remedy heeds both: GroupNorm alone would let 40 pass.
        ({"channels": 48, "channel_mult": (1, 2)}, "48: a layer of 144 .* 32 groups .*; use 32 or 64"),
        ({"channels": 33, "channel_mult": (1,)}, "channels is 33: sines and cosines need an even number; use 32 or 36"),
        ({"channels": 70, "channel_mult": (1,)}, "channels is 70: a layer of 70 .*; use 64 or 128"),
        ({"attention": (12,)}, "attention at resolution 12, which never occurs"),
    ],
)
def test_check_geometry_says_what_to_change(options, message):
    with pytest.raises(ValueError, match=message):
        check_geometry(32, 32, architecture="adm", **{"attention": ()} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attention": (32, 16, 8), "num_classes": 1000},
        {"channels": 32, "channel_mult": (1, 2), "attention": (64, 32)},  # one head of 32, and one of 64
        {"channels": 96, "channel_mult": (1, 2), "attention": (32,)},  # 96 channels, but no attention there
        {"channels": 4, "channel_mult": (1, 1), "attention": ()},
    ],
)
def test_check_geometry_lets_pass(options):
    check_geometry(64, 64, architecture="adm", **options)


def test_wrong_calls_are_refused():
    x, t = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    options = {"channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attention": ()}

    def build(x, *conditions, kind=ADM, **more):
        return jax.eval_shape(kind(3, **options | more).init, jax.random.key(0), x, t, *conditions)

    build(x)
    with pytest.raises(ValueError, match="height 9"):
        build(jnp.zeros((1, 9, 8, 3)))
    with pytest.raises(ValueError, match="second condition is missing"):
        build(x, second_condition=True)
    with pytest.raises(ValueError, match="second condition is given"):
        build(x, t)
    with pytest.raises(ValueError, match="length 10 for map_label: this network was built for 0"):
        build(x, None, jnp.zeros((1, 10)))
    with pytest.raises(ValueError, match=r"'ddpmpp' is built by models\.unet\.UNet, not by adm\.ADM: use that, or adm"):
        build(x, architecture="ddpmpp")
    with pytest.raises(ValueError, match=r"'adm' is built by models\.adm\.ADM, not by unet\.UNet: use that"):
        build(x, architecture="adm", kind=UNet)
