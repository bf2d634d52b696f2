"""DINOv2 against its authors' code with the same random weights (fixtures/make_dinov2_reference.py), ViT-S/14 whole."""

import dataclasses
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_dinov2_reference import SHAPES, random_images, random_state, sampled, state_shapes

from warm_jax.evaluation import reference as reference_room
from warm_jax.metrics import dinov2, frechet, published

SMALL = (384, 12)


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "fixtures" / "dinov2_reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def state_dict():
    return random_state(*SMALL)


@pytest.fixture(scope="module")
def params(state_dict):
    return dinov2.convert(state_dict, *SMALL)


def relative(actual, expected):
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def test_every_block_matches_the_authors_code(params, reference):
    def run(params, images):
        network = dinov2.VisionTransformer(*SMALL)
        features, seen = network.apply({"params": params}, dinov2.preprocess(images), mutable=["intermediates"])
        return features, seen["intermediates"]

    features, seen = jax.jit(run)(params, random_images(1, SHAPES[0]))
    assert relative(sampled(np.asarray(seen["embedded"][0])), reference["embedded"]) < 1e-5
    tokens = np.asarray(seen["blocks"]["tokens"][0])
    assert len(tokens) == SMALL[1]
    for i, block in enumerate(tokens):
        assert relative(sampled(block), reference[f"block_{i}"]) < 1e-5, i
    assert features.shape == (1, SMALL[0]) and relative(features, reference["features"]) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_resize_is_edm2s(shape, reference):
    x = np.asarray(dinov2.preprocess(jnp.asarray(random_images(1, shape))))
    assert x.shape == (1, 224, 224, 3)
    assert relative(x[:, ::13, ::13], reference[f"resized_{shape[0]}"]) < 2e-6


def test_positions_are_interpolated_as_the_authors_do(state_dict, reference):
    ours = np.asarray(dinov2.positions_at_224(jnp.asarray(state_dict["pos_embed"])))
    assert ours.shape == (1, 257, 384)
    assert relative(ours[:, :, ::48], reference["positions"]) < 1e-5  # theirs are at float32 places
    np.testing.assert_allclose(dinov2.position_matrix().sum(axis=1), 1, rtol=1e-14)


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


TINY = (64, 2)


@pytest.fixture(scope="module")
def tiny_state():
    return random_state(*TINY)


@pytest.fixture
def pth(tmp_path, monkeypatch):
    """A file of a tiny network, of which nothing is published yet."""
    monkeypatch.setitem(dinov2.NETWORKS, TINY, published.Published("dinov2_tiny", "none", "curl -L -O https://tiny"))
    path = tmp_path / "tiny.pth"
    path.write_bytes(b"stands for a file")
    return path


def as_file(monkeypatch, state_dict):
    """What `read` finds in a .pth, whose reader test_pth.py tests."""
    monkeypatch.setattr(dinov2, "read_torch", lambda path: state_dict)


def test_other_weights_have_another_name_and_only_when_asked_for(monkeypatch, tmp_path, pth, tiny_state):
    as_file(monkeypatch, tiny_state)
    with pytest.raises(ValueError, match=r"(?s)tiny\.pth: its sha256 is .*expected none….*--unverified.*curl"):
        dinov2.read(pth)
    assert reference_room.convert_weights("dinov2", str(pth), str(tmp_path / "t.safetensors"), True) == 0
    digest = hashlib.sha256(pth.read_bytes()).hexdigest()
    extractor = dinov2.load(tmp_path / "t.safetensors", "dinov2_tiny")
    assert (extractor.name, extractor.hash, extractor.dim) == ("dinov2_tiny-unverified", digest, 64)
    assert frechet.score_name("fid", extractor.name, 50_000) == "fd_dinov2_tiny-unverified_50k"
    jax.tree.map(np.testing.assert_array_equal, extractor.params, dinov2.convert(tiny_state, *TINY))
    with pytest.raises(
        ValueError, match=r"holds dinov2_tiny-unverified, of sha256 .*: not the converted dinov2 \(d538"
    ):
        dinov2.load(tmp_path / "t.safetensors", "dinov2")


def test_published_weights_keep_the_name(monkeypatch, tmp_path, pth, tiny_state):
    as_file(monkeypatch, tiny_state)
    digest = hashlib.sha256(pth.read_bytes()).hexdigest()
    monkeypatch.setitem(dinov2.NETWORKS, TINY, dataclasses.replace(dinov2.NETWORKS[TINY], sha256=digest))
    for unverified in (False, True):
        assert reference_room.convert_weights("dinov2", str(pth), str(tmp_path / "t.safetensors"), unverified) == 0
        assert dinov2.load(tmp_path / "t.safetensors", "dinov2_tiny").name == "dinov2_tiny"
    assert dinov2.load(pth, "dinov2_tiny").hash == digest
    with pytest.raises(ValueError, match=r"tiny\.pth holds dinov2_tiny, not dinov2_b14\. .*dinov2_vitb14_pretrain"):
        dinov2.load(pth, "dinov2_b14")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"register_tokens": (1, 4, 64)}, r"registers \(reg4\)"),
        ({"patch_embed.proj.weight": (1536, 3, 14, 14)}, "1536 features, 2 blocks, .*dinov2_s14 of 384 and 12"),
        ({"patch_embed.proj.weight": (64, 3, 16, 16)}, "patches of 16×16; supported are patches of 14×14"),
        ({"blocks.2.norm1.weight": (64,)}, "64 features, 3 blocks"),
        ({"pos_embed": (1, 257, 64)}, r"pos_embed has shape \(1, 257, 64\)"),
        ({"blocks.1.attn.qkv.weight": (64, 64)}, r"blocks\.1\.attn\.qkv\.weight has shape"),
        ({"blocks.1.ls1.gamma": None}, r"no blocks\.1\.ls1\.gamma"),
        ({"patch_embed.proj.weight": None}, "no DINOv2 of the published layout; its first tensors: cls_token"),
        ({"head.weight": (10, 64)}, r"have head\.weight, which DINOv2 has not"),
    ],
)
def test_weights_of_something_else_are_named(monkeypatch, pth, tiny_state, change, message):
    changed = tiny_state | {name: np.zeros(shape, np.float32) for name, shape in change.items() if shape is not None}
    as_file(monkeypatch, {name: value for name, value in changed.items() if change.get(name, 0) is not None})
    with pytest.raises(ValueError, match=rf"tiny\.pth: .*{message}"):
        dinov2.read(pth)


def test_weights_that_are_not_finite_are_named(monkeypatch, pth, tiny_state):
    as_file(monkeypatch, tiny_state | {"norm.bias": np.full(64, np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"norm\.bias has values that are not finite"):
        dinov2.read(pth, unverified=True)


def test_a_missing_or_damaged_file(tmp_path, pth):
    with pytest.raises(FileNotFoundError, match=r"dinov2_vitb14_pretrain\.pth"):
        dinov2.load(tmp_path / "none.pth", "dinov2_b14")
    with pytest.raises(ValueError, match=r"tiny\.pth"):
        dinov2.load(pth, "dinov2_s14")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        dinov2.load(pth.rename(tmp_path / "cut.safetensors"), "dinov2_s14")


@pytest.mark.parametrize(
    ("size", "length"), [((384, 12), 88_283_115), ((768, 12), 346_378_731), ((1024, 24), 1_217_586_395)]
)
def test_the_published_files_have_room_for_these_parameters(size, length):
    """The lengths in bytes are those of the published files, whose zip takes some 300 bytes a tensor."""
    held = 4 * (sum(leaf.size for leaf in jax.tree.leaves(dinov2.parameter_shapes(*size))) + size[0])  # mask_token
    tensors = len(state_shapes(*size))
    assert 0 < length - held < 400 * tensors


@pytest.mark.parametrize(
    ("shape", "message"),
    [((13, 40, 3), "at least one patch, 14×14 pixels, not 13×40"), ((32, 32, 4), "1 or 3 channels, not 4")],
)
def test_images_it_cannot_take(shape, message):
    params = dinov2.parameter_shapes(*SMALL)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(dinov2.apply, params, jax.ShapeDtypeStruct((1, *shape), np.uint8))
