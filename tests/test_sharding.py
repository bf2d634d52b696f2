"""Parameters divided over devices: the same training, smaller pieces; and checkpoints that open on other devices."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from warm_jax.experiments import experiment
from warm_jax.runtime import checkpoint, mesh
from warm_jax.training import step, train

pytestmark = pytest.mark.usefixtures("quick_compile")


def divided(exp, fsdp, devices=8):
    return dataclasses.replace(exp, mesh=mesh.make_mesh(devices, fsdp=fsdp))


def run_steps(exp, count):
    """Everything after `count` steps on noise images, the losses, and the compiled step."""
    compiled, state = step.compile_step(exp), step.init_state(exp)
    totals = jax.device_put(step.zero_totals(), mesh.replicated(exp.mesh))
    rng, losses, size = np.random.RandomState(0), [], exp.config.train.batch_size
    for _ in range(count):
        images = rng.randint(0, 256, (size, *exp.process.image_shape)).astype(np.uint8)
        state, totals, value = compiled(state, totals, images, rng.randint(0, 10, size).astype(np.int32))
        losses.append(float(value))
    return state, losses, compiled


def assert_close(found, expected, rtol):
    """Within `rtol` of the largest number of each array."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1e-6, np.abs(b).max()))


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((3, 3, 64, 128), 4, PartitionSpec(None, None, None, "fsdp")),
        ((3, 3, 128, 128), 8, PartitionSpec(None, None, None, "fsdp")),
        ((256, 6), 4, PartitionSpec("fsdp", None)),
        ((512, 7), 8, PartitionSpec("fsdp", None)),
        ((128,), 4, PartitionSpec()),  # small
        ((3, 3, 129, 3), 4, PartitionSpec()),  # nothing that 4 divides
        ((3, 3, 64, 128), 1, PartitionSpec()),
        ((), 4, PartitionSpec()),
    ],
)
def test_which_axis_is_divided(shape, fsdp, spec):
    assert mesh.divided(mesh.make_mesh(8, fsdp=fsdp), shape).spec == spec


def test_divided_parameters_train_as_whole_ones(fsdp=4):
    """float32, after ten steps, within 1e-5 of each array's largest number; the pieces are really smaller."""
    exp = tiny.build(train__warmup_images=0, train__posthoc_ema=(0.05, 0.1))
    whole, losses, dp = run_steps(divided(exp, 1), 10)
    parts, other, compiled = run_steps(divided(exp, fsdp), 10)
    np.testing.assert_allclose(other, losses, rtol=1e-5)
    assert_close(jax.device_get(parts), jax.device_get(whole), 1e-5)
    trees = (parts.params, parts.ema, parts.optimizer[0].mu, parts.optimizer[0].nu, *parts.averages)
    for leaf in (tree["gain"] for tree in trees):
        assert {piece.data.size for piece in leaf.addressable_shards} == {28 * 28 * 2 // fsdp}
    moved = np.abs(jax.device_get(whole.params["gain"]) - jax.device_get(step.init_state(exp).params["gain"])).max()
    assert moved > 1e-3
    # Six arrays of 28·28·2 floats: what is left of them on a device.
    saved = dp.memory_analysis().argument_size_in_bytes - compiled.memory_analysis().argument_size_in_bytes
    assert saved == 6 * 28 * 28 * 2 * 4 * (fsdp - 1) / fsdp


@pytest.mark.slow
def test_a_divided_unet_trains_as_a_whole_one():
    """With dropout. Adam's first steps are the signs of gradients, so ε keeps rounding of zeros from growing."""
    changes = {"model__channels": 32, "model__dropout": 0.1, "train__eps": 1.0}
    exp = experiment.build(tiny.config(train__warmup_images=0, **changes))
    whole, losses, dp = run_steps(divided(exp, 1), 4)
    for fsdp in (2, 8):
        parts, other, compiled = run_steps(divided(exp, fsdp), 4)
        np.testing.assert_allclose(other, losses, rtol=1e-5)
        assert_close(jax.device_get(parts.params), jax.device_get(whole.params), 1e-5)
        assert_close(jax.device_get(parts.ema), jax.device_get(whole.ema), 1e-5)
        sizes = [made.memory_analysis().argument_size_in_bytes for made in (dp, compiled)]
        assert sizes[1] < sizes[0] * (1 / fsdp + 0.15), sizes


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match=r"mesh.fsdp is 3, which does not divide 8 device\(s\); use one of 1, 2, 4, 8"):
        experiment.for_training(tiny.build(mesh__fsdp=3))
    message = r"mesh.fsdp 8 divides none of the 4 parameters: the largest is 28 × 28 × 2, .* multiple of 8 .* 1024"
    with pytest.raises(ValueError, match=message):
        experiment.for_training(tiny.build(mesh__fsdp=8))
    with pytest.raises(ValueError, match=r"mesh.fsdp is 0, which does not divide 8"):
        experiment.for_training(tiny.build(mesh__fsdp=0))
    assert experiment.for_training(tiny.build(mesh__fsdp=4)).mesh.shape == {"data": 2, "fsdp": 4}


def test_a_run_goes_on_with_other_devices(tmp_path):
    """8 devices with parameters over 4, then one, then two: as one run on one device, but for rounding."""

    def go_on(folder, steps, devices, fsdp=1):
        config = tiny.config(train__decay="none", train__sample_every=0, train__steps=steps, mesh__fsdp=fsdp)
        made = tiny.with_network(train.prepare(config, folder), tiny.Linear())
        made = dataclasses.replace(made, experiment=divided(made.experiment, fsdp, devices))
        assert train.train(made, final_grid=fsdp > 1) == 0
        abstract = step.abstract_state(divided(made.experiment, 2, 4))
        reader = checkpoint.Checkpoints(folder / "checkpoints", writable=False)
        return reader.restore(steps, **step.to_store(abstract))

    for steps, devices, fsdp in ((10, 8, 4), (20, 1, 1), (30, 2, 1)):
        found = go_on(tmp_path / "moved", steps, devices, fsdp)
    expected = go_on(tmp_path / "stayed", 30, 1)
    assert len(found["ema"]["gain"].sharding.device_set) == 4
    assert_close(jax.device_get(found), jax.device_get(expected), 1e-5)
