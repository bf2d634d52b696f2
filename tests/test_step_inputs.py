"""What the train step makes of a batch: bytes, augmentation, classes; and which images a run accepts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import jit
from tiny import born, build, config

from warm_jax.experiments import experiment
from warm_jax.runtime import workdirs
from warm_jax.training import step, train


def batch(n=4000, shape=(4, 4, 1)):
    rng = np.random.RandomState(0)
    images = jnp.asarray(rng.randint(0, 256, (n, *shape)).astype(np.uint8))
    return images, jnp.asarray(rng.randint(0, 10, n).astype(np.int32))


def test_bytes_become_model_units(key):
    images, labels = batch(8)
    x0, given = step.clean_batch(config(), key, images, labels)
    np.testing.assert_allclose(x0, np.asarray(images, np.float64) / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(given.class_labels, np.eye(10)[np.asarray(labels)])
    assert given.augment_labels is None
    assert step.clean_batch(config(data__num_classes=0), key, images, labels)[1].class_labels is None


def test_a_hidden_or_missing_class_is_the_zero_vector(key):
    images, labels = batch()
    _, given = step.clean_batch(config(data__label_dropout=0.3), key, images, labels)
    seen = np.asarray(given.class_labels).sum(1)
    assert set(seen) == {0.0, 1.0} and abs(np.mean(seen == 0) - 0.3) < 5 * np.sqrt(0.21 / 4000)
    np.testing.assert_array_equal(np.argmax(given.class_labels, 1)[seen == 1], np.asarray(labels)[seen == 1])
    _, given = step.clean_batch(config(), key, images[:2], jnp.asarray([-1, 3], jnp.int32))
    np.testing.assert_array_equal(given.class_labels, np.stack([np.zeros(10), np.eye(10)[3]]))


def test_flips_mirror_half_of_the_images(key):
    images, labels = batch()
    x0, given = step.clean_batch(config(data__augment="flip"), key, images, labels)
    plain = np.asarray(images, np.float64) / 127.5 - 1
    same = np.isclose(x0, plain, atol=1e-6).all((1, 2, 3))
    mirrored = np.isclose(x0, plain[:, :, ::-1], atol=1e-6).all((1, 2, 3))
    assert np.all(same | mirrored) and abs(np.mean(mirrored) - 0.5) < 5 * 0.5 / np.sqrt(4000)
    assert given.augment_labels is None


def test_edm_augmentation_without_any_chance_is_the_flip_that_its_label_says(key):
    images, labels = batch(64, (6, 6, 1))
    made = config(data__augment="edm", data__augment_probability=0.0)
    x0, given = step.clean_batch(made, key, images, labels)
    flipped = np.asarray(given.augment_labels)[:, 0]
    assert set(flipped) == {0.0, 1.0} and not np.any(np.asarray(given.augment_labels)[:, 1:])
    plain = np.asarray(images, np.float64) / 127.5 - 1
    expected = np.where(flipped[:, None, None, None] == 1, plain[:, :, ::-1], plain)
    np.testing.assert_allclose(x0, expected, atol=1e-4)
    moved, _ = step.clean_batch(config(data__augment="edm", data__augment_probability=1.0), key, images, labels)
    assert np.max(np.abs(moved - expected)) > 0.1


@pytest.mark.parametrize("shape", [(14, 14), (14, 28)])
def test_every_label_and_augmentation_reaches_the_network(key, shape):
    """The loss has a gradient in every row of the embeddings that hear classes and augmentations; H ≠ W too."""
    made = config(data__augment="edm", data__augment_probability=1.0, data__image_size=14, train__batch_size=48)
    if shape != (14, 14):
        with made.ignore_type():
            made.data.image_size = shape
    exp = experiment.build(made)
    params = born(exp.model, key)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), params)
    images, _ = batch(48, (*shape, 1))
    labels = jnp.arange(48, dtype=jnp.int32) % 10
    x0, given = step.clean_batch(made, key, images, labels)
    assert given.augment_labels.shape == (48, 9)

    def loss(params):
        return jnp.sum(jnp.square(exp.model.predict(params, x0, jnp.ones(48), *given).blurred))

    gradient = jit(jax.grad(loss))(params)
    for name, rows in (("map_label", 10), ("map_augment", 9)):
        kernel = np.asarray(gradient[name]["kernel"])
        assert kernel.shape[0] == rows and np.all(np.abs(kernel).sum(1) > 0)


def test_sampling_tells_the_network_of_no_augmentation(key):
    """Zeros and silence are the same to the network."""
    exp = experiment.build(config(data__augment="edm"))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), born(exp.model, key))
    x, t = jax.random.normal(key, (2, 28, 28, 1)), jnp.ones(2)
    classes = jnp.eye(10)[:2]
    predict = jit(exp.model.predict)
    silent, told = (predict(params, x, t, classes, labels) for labels in (None, jnp.zeros((2, 9))))
    np.testing.assert_allclose(silent.blurred, told.blurred, atol=1e-5)
    moved = predict(params, x, t, classes, jnp.ones((2, 9)))
    assert np.max(np.abs(moved.blurred - silent.blurred)) > 1e-3


def test_images_that_changed_since_the_run_began_are_refused(tmp_path):
    images, labels = (np.array(a) for a in batch(20, (28, 28, 1)))
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    made, workdir = config(data__source=f"npz:{tmp_path / 'a.npz'}", data__num_classes=0), tmp_path / "run"
    run = train.prepare(made, workdir)
    workdirs.save_config(made, workdir)
    workdirs.save_data(run.source, workdir)
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    train.prepare(made, workdir)
    (tmp_path / "a.npz").rename(tmp_path / "moved.npz")
    moved = config(data__source=f"npz:{tmp_path / 'moved.npz'}", data__num_classes=0)
    train.prepare(moved, workdir)
    images[3, 5, 5, 0] ^= 1
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=f"changed since.*{run.source.fingerprint}.*allow_changed=True"):
        train.prepare(made, workdir)
    with made.unlocked():
        made.data.allow_changed = True
    train.prepare(made, workdir)


def test_a_finite_step_ends_a_row_of_lost_ones():
    exp = build(devices=1)
    compiled, state = step.compile_step(exp), step.init_state(exp)
    state = state._replace(nonfinite=jnp.full((), 3, jnp.int32))
    state, *_ = compiled(state, step.zero_totals(), np.zeros((16, 28, 28, 1), np.uint8), np.zeros(16, np.int32))
    assert int(state.nonfinite) == 0
