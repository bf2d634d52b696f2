"""The U-Net against published parameter counts, a second implementation in numpy (`reference_unet.py`), and scipy.

Zero-initialised layers blind a test, so all parameters are drawn anew before anything is compared.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_unet
import scipy.signal
from networks import batch, distance, jit, products, randomised

from warm_jax.models import geometry, layers, unet
from warm_jax.models.unet import UNet, check_geometry

SMALL = {"channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attention": (4,), "dropout": 0.5}
SMALL |= {"out_channels": 6, "num_classes": 3, "augment_labels": 4, "second_condition": True}


@pytest.fixture(scope="module")
def small():
    """Model, parameters, inputs, the jitted model, and its output."""
    model = UNet(**SMALL)
    inputs = batch(model)
    params = randomised(model, inputs)
    apply = jit(model.apply)
    return model, params, inputs, apply, apply(params, **inputs)


# What is published


@pytest.mark.parametrize(
    ("architecture", "channel_mult", "classes", "count"),
    [
        ("ddpmpp", (2, 2, 2), 0, 55_733_891),
        ("ddpmpp", (2, 2, 2), 10, 55_735_299),
        ("ncsnpp", (2, 2, 2), 0, 56_397_827),
        ("ncsnpp", (2, 2, 2), 10, 56_400_643),
        ("ddpmpp", (1, 2, 2, 2), 0, 61_805_571),
        ("ncsnpp", (1, 2, 2, 2), 0, 62_761_091),
    ],
)
def test_edm_parameter_counts(architecture, channel_mult, classes, count):
    """NVIDIA's networks for CIFAR-10 and FFHQ-64; NCSN++'s 128 frequencies are a buffer there, and not counted."""
    model = UNet(3, channel_mult=channel_mult, num_classes=classes, augment_labels=9, architecture=architecture)
    side = 8 << (len(channel_mult) - 1)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)), jnp.zeros(1))["params"]
    frequencies = params.pop("map_noise", {})
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert [leaf.shape for leaf in frequencies.values()] == ([(128,)] if architecture == "ncsnpp" else [])
    attending = {name for name, block in params.items() if "qkv" in block}
    assert attending == {f"enc_16x16_block{i}" for i in range(4)} | {"dec_16x16_block4", "dec_8x8_in0"}


@pytest.fixture(scope="module")
def initial():
    options = {"architecture": "ncsnpp", "second_condition": True, "num_classes": 5}
    model = UNet(3, channels=32, channel_mult=(1, 2), num_blocks=1, **options)
    x, t = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    params = jit(model.init)(jax.random.key(0, impl="rbg"), x, t, t)["params"]  # rbg: compiles faster
    return jax.tree.map(np.asarray, params)


def test_initial_values(initial):
    """Xavier-uniform bounds √(6 / (fan-in + fan-out)) with the recipe's factors; biases zero; frequencies of std 16."""
    params = initial
    down, bottom = params["enc_4x4_down"], params["dec_4x4_in0"]
    for leaf, fans, factor in [
        (down["conv0"], 9 * (32 + 32), 1),
        (down["skip"], 32 + 32, 1),
        (down["conv1"], 9 * (32 + 32), 1e-5),
        (down["affine"], 128 + 32, 1),
        (bottom["qkv"], 64 + 3 * 64, 0.2**0.5),
        (bottom["proj"], 64 + 64, 1e-5),
        (params["map_layer0"], 64 + 128, 1),
        (params["map_label"], 5 + 64, 1),
        (params["out_conv"], 9 * (32 + 3), 1e-5),
    ]:
        bound = factor * (6 / fans) ** 0.5
        assert 0.95 * bound < np.max(np.abs(leaf["kernel"])) <= 1.0001 * bound
        assert np.std(leaf["kernel"]) == pytest.approx(bound / 3**0.5, rel=0.1)  # a uniform law's
    assert not params["map_second"]["kernel"].any()
    assert 10 < np.std(params["map_noise"]["freqs"]) < 22
    named = jax.tree_util.tree_leaves_with_path(params)
    assert not any(leaf.any() for path, leaf in named if path[-1].key == "bias")


# A second implementation


@pytest.mark.parametrize(
    ("options", "height", "width"),
    [
        ({"attention": (8,)}, 8, 8),
        ({"architecture": "ncsnpp", "attention": (4,), "num_blocks": 2}, 8, 8),
        ({"architecture": "ncsnpp", "channel_mult": (1, 2, 2), "attention": (6,), "patch_size": 2}, 16, 24),
        ({"channel_mult": (2, 1), "attention": (), "patch_size": 2}, 12, 8),
    ],
)
def test_equals_a_second_implementation(options, height, width):
    model = UNet(**SMALL | options)
    inputs = batch(model, height, width)
    params = randomised(model, inputs)
    ours = jit(model.apply)(params, **inputs)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params["params"], inputs))
    theirs = reference_unet.unet(
        exact[0],
        **exact[1],
        architecture=model.architecture,
        levels=len(model.channel_mult),
        num_blocks=model.num_blocks,
        patch_size=model.patch_size,
    )
    assert ours.shape == (2, height, width, 6) and ours.dtype == jnp.float32
    assert np.max(np.abs(ours - theirs)) < 1e-4 * np.max(np.abs(theirs))
    side = max(height, width) // model.patch_size
    attending = {side >> level for level in range(len(model.channel_mult))} & set(model.attention)
    blocks = [name for name, block in params["params"].items() if "qkv" in block]
    assert len(blocks) == 1 + len(attending) * (model.num_blocks + 1)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])
def test_resampling_is_scipys_convolution(name):
    taps = {"ddpmpp": [1, 1], "ncsnpp": [1, 3, 3, 1]}[name]
    f = np.outer(taps, taps) / np.sum(taps) ** 2
    n, p = len(taps), (len(taps) - 1) // 2
    x = np.random.default_rng(0).normal(size=(6, 10))
    image = jnp.asarray(x, jnp.float32)[None, :, :, None]
    down = scipy.signal.convolve2d(x, f)[n - 1 - p :: 2, n - 1 - p :: 2][:3, :5]
    stuffed = np.zeros((12, 20))
    stuffed[::2, ::2] = x
    up = scipy.signal.convolve2d(stuffed, 4 * f)[p : p + 12, p : p + 20]
    ours = unet.STYLES[name].taps
    np.testing.assert_allclose(unet.downsample(image, ours)[0, :, :, 0], down, atol=1e-6)
    np.testing.assert_allclose(unet.upsample(image, ours)[0, :, :, 0], up, atol=1e-6)


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


def test_heads_differ_and_corners_see_each_other(small):
    _, params, inputs, apply, output = small
    assert distance(output[..., :3], output[..., 3:]) > 0.1
    other = apply(params, **inputs | {"x": inputs["x"].at[0, 0, 0].add(1.0)})
    assert distance(other[0, 7, 7], output[0, 7, 7]) > 1e-3


def test_second_condition_starts_without_effect(small, initial):
    """`map_second` as it starts, among parameters drawn anew: the initial network's own output says nothing."""
    _, params, inputs, apply, output = small
    blank = jnp.full_like(params["params"]["map_second"]["kernel"], initial["map_second"]["kernel"].max())
    params = {"params": params["params"] | {"map_second": {"kernel": blank}}}
    first, second = (apply(params, **inputs | {"second": value}) for value in (inputs["second"], jnp.full(2, 7.0)))
    np.testing.assert_array_equal(first, second)
    assert distance(first, output) > 1e-3


@pytest.fixture(scope="module")
def training(small):
    """The output with dropout, as a function of the key."""
    model, params, inputs, *_ = small
    return jit(lambda key: model.apply(params, **inputs, train=True, rngs={"dropout": key}))


def test_dropout_only_in_training(small, training):
    _, params, inputs, _, output = small
    one, two = training(jax.random.key(1)), training(jax.random.key(2))
    assert distance(one, output) > 1e-2 and distance(one, two) > 1e-2
    np.testing.assert_array_equal(training(jax.random.key(1)), one)
    off = UNet(**SMALL | {"dropout": 0.0})  # asks for no key then
    jax.eval_shape(lambda: off.apply(params, **inputs, train=True))


# Gradients, memory, precision


def test_gradients_are_the_second_implementations():
    """Every parameter but the frequencies learns, and the slope along a random direction is the reference's.

    With rematerialised blocks, so that this holds for remat too.
    """
    model = UNet(**SMALL | {"architecture": "ncsnpp", "remat": (8, 4)})
    inputs = batch(model)
    params = randomised(model, inputs)

    def loss(params):
        return jnp.mean(jnp.square(model.apply(params, **inputs) - 1.0))

    gradient = jit(jax.grad(loss))(params)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all()
        assert leaf.any() == (path[-1].key != "freqs"), path

    params, inputs = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params["params"], inputs))
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    direction["map_noise"]["freqs"][:] = 0

    def reference(step):
        moved = jax.tree.map(lambda leaf, way: leaf + step * way, params, direction)
        y = reference_unet.unet(moved, **inputs, architecture="ncsnpp", levels=2, num_blocks=1)
        return np.mean(np.square(y - 1.0))

    slope = (reference(1e-7) - reference(-1e-7)) / 2e-7
    ours = sum(jax.tree.leaves(jax.tree.map(lambda g, way: np.sum(g * way), gradient, direction)))
    assert ours == pytest.approx(slope, rel=1e-3)


def test_rematerialisation_changes_no_output(small, training):
    """With the same dropout; and only blocks at the asked resolution are computed again."""
    _, params, inputs, _, _ = small
    key = jax.random.key(1)
    # At 8: block0, up, and two blocks with skips. At 4: down, block0, in0, in1, and two with skips.
    for remat, blocks in (((), 0), ((8,), 4), ((8, 4), 10)):
        model = UNet(**SMALL | {"remat": remat})
        run = jit(lambda key, model=model: model.apply(params, **inputs, train=True, rngs={"dropout": key}))
        assert str(run.trace(key).jaxpr).count("remat2[") == blocks
    np.testing.assert_allclose(run(key), training(key), atol=1e-5)


def test_bfloat16_is_close_and_stays_inside(small):
    _, params, inputs, _, output = small
    half = UNet(**SMALL | {"dtype": jnp.bfloat16})
    y = jit(half.apply)(params, **inputs)
    assert y.dtype == jnp.float32
    assert 1e-4 < distance(y, output) < 5e-2
    shapes = jax.eval_shape(half.init, jax.random.key(0), **inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_of_every_product(small, dtype):
    """In float32, all at HIGHEST, backward too; in bfloat16, the convolutions, while embeddings stay exact."""
    _, params, inputs, *_ = small
    model = UNet(**SMALL | {"dtype": jnp.dtype(dtype)})
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


# What does not fit


@pytest.mark.parametrize(
    ("height", "width", "options", "message"),
    [
        (30, 32, {}, "height 30 .* halved 2 times.* multiple of 4: use a height of 28 or 32, or at most 2 levels"),
        (32, 31, {}, "width 31 .* use a width of 28 or 32, or at most 1 levels"),
        (2, 2, {}, "height 2 .* use a height of 4, or at most 2 levels"),
        (32, 36, {"patch_size": 4}, "width 36 .* patches of 4 .* multiple of 16: use a width of 32 or 48"),
        (30, 30, {"patch_size": 4}, "height 30 .* or a patch_size that divides 30"),
        # 96 channels of the lower level beside a skip of 48 make 144, which 32 does not divide.
        (32, 32, {"channels": 48, "channel_mult": (1, 2)}, "48: a layer of 144 .* 32 groups .*; use 40 or 64"),
        (32, 32, {"channels": 3}, "channels is 3: .* use 4"),
        (32, 32, {"channels": 0}, "channels is 0: it must be at least 1"),
        (32, 32, {"channel_mult": ()}, r"channel_mult is \(\): give each level a factor"),
        (32, 32, {"channel_mult": (1, 0)}, r"channel_mult is \(1, 0\)"),
        (32, 32, {"num_blocks": 0}, "num_blocks is 0: it must be at least 1"),
        (32, 32, {"patch_size": 0}, "patch_size is 0"),
        (32, 32, {"num_classes": -1}, "num_classes is -1: it must be at least 0"),
        (32, 32, {"dropout": 1.0}, r"dropout is 1.0: it must lie in \[0, 1\)"),
        (32, 32, {"architecture": "dit"}, "unknown architecture 'dit': choose one of ddpmpp, ncsnpp, adm"),
        (28, 28, {"attention": (16, 7)}, "attention at resolution 16, .* the larger side is 28, 14, 7 from"),
        (32, 24, {"remat": (24,)}, "remat at resolution 24, .* 32, 16, 8"),
    ],
)
def test_check_geometry_says_what_to_change(height, width, options, message):
    with pytest.raises(ValueError, match=message):
        check_geometry(height, width, **options)


@pytest.mark.parametrize(
    ("height", "width", "options"),
    [
        (32, 32, {}),
        (28, 28, {}),  # the default attention may miss
        (48, 64, {"channel_mult": (1, 2, 2, 2), "attention": (16, 8), "remat": (64,), "patch_size": 1}),
        (64, 64, {"patch_size": 2, "channels": 32, "attention": (32,)}),
        (8, 8, {"channels": 4, "channel_mult": (1,), "attention": ()}),
    ],
)
def test_check_geometry_lets_pass(height, width, options):
    check_geometry(height, width, **options)


@pytest.mark.parametrize("channels", [6, 8, 20, 40, 44, 48, 64])
def test_check_geometry_agrees_with_group_norm(channels, monkeypatch):
    """Groups cannot be made of exactly the widths that check_geometry refuses."""
    options = {"channels": channels, "channel_mult": (1, 2), "num_blocks": 1}

    def refuses(function):
        try:
            function()
        except (ValueError, TypeError):  # the latter of a shape that cannot be had
            return True
        return False

    early = refuses(lambda: check_geometry(8, 8, **options))
    monkeypatch.setattr(unet, "check_geometry", lambda *_, **__: None)
    shape = jnp.zeros((1, 8, 8, 3))
    assert refuses(lambda: jax.eval_shape(UNet(3, **options).init, jax.random.key(0), shape, jnp.zeros(1))) == early


def test_wrong_calls_are_refused():
    x, t = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    small = {"channels": 16, "channel_mult": (1, 2), "num_blocks": 1}

    def build(options, x, *conditions):
        return jax.eval_shape(UNet(3, **small | options).init, jax.random.key(0), x, t, *conditions)

    with pytest.raises(ValueError, match="height 9"):
        build({}, jnp.zeros((1, 9, 8, 3)))
    with pytest.raises(ValueError, match="second condition is missing"):
        build({"second_condition": True}, x)
    with pytest.raises(ValueError, match="second condition is given"):
        build({}, x, t)
    with pytest.raises(ValueError, match="length 10 for map_label: this network was built for 0"):
        build({}, x, None, jnp.zeros((1, 10)))
    with pytest.raises(ValueError, match="length 9 for map_augment: this network was built for 4"):
        build({"augment_labels": 4}, x, None, None, jnp.zeros((1, 9)))


@pytest.mark.parametrize(
    ("mean", "one_pass", "tolerance"),
    [(0, False, 1e-5), (0, True, 1e-5), (50, False, 1e-4), (10, True, 5e-4), (50, True, 1e-2)],
)
def test_a_norm_keeps_its_digits_beside_a_large_mean(mean, one_pass, tolerance):
    """Against float64: in one pass the variance is a difference of means of squares, here up to 2500 times as large."""
    x = np.random.default_rng(0).normal(mean, 1, (2, 16, 16, 64)).astype(np.float32)

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            how = layers.Policy(jnp.float32, jnp.float32, one_pass)
            return layers.Norm(1e-6, how, silu=False)(x)

    got, _ = jax.jit(lambda x: Norm().init_with_output(jax.random.key(0), x))(x)
    grouped = x.astype(np.float64).reshape(2, 256, geometry.groups(64), -1)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    want = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(got, want.reshape(x.shape), atol=tolerance)
