"""Losses, pseudo-labels and augmentation against recorded numbers and hand-made cases."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csc_jax import augment, losses
from csc_jax.config import default_config
from csc_jax.parallel import sharding
from csc_jax.pseudo_labels import keep_rate, pseudo_labels, update_class_confidence


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / "golden" / "losses.npz"))


@pytest.mark.parametrize("case", ["ohem", "ohem_all_hard"])
def test_ohem_equals_the_recorded_one(golden, case):
    def loss(logits):
        kept = int(golden[f"{case}_min_kept"])
        return losses.ohem_cross_entropy(
            logits, jnp.asarray(golden["labels"]), threshold=0.7, min_kept=kept
        )

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["logits"]))
    np.testing.assert_allclose(value, golden[f"{case}_loss"], rtol=1e-4)
    expected = golden[f"{case}_grad"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("percentile", [80, 100])
def test_entropy_mask_equals_the_recorded_one(golden, percentile):
    labels, logits = jnp.asarray(golden["labels"]), jnp.asarray(golden["logits"])
    probabilities = jax.nn.softmax(jnp.asarray(golden["teacher_logits"]))
    config = default_config().method.pseudo_label
    config.mode, config.percentile = "entropy", (float(percentile), 100.0)
    valid = losses.valid_pixels(labels, logits.shape[-1])
    kept = pseudo_labels(jax.random.key(0), probabilities, valid, jnp.zeros(19), 0.0, config) != 255

    # The recorded loss weighs the mean over the kept pixels by all pixels / kept pixels.
    def loss(logits):
        mean = losses.cross_entropy(logits, jnp.where(kept, labels, 255))
        return mean * labels.size / jnp.sum(kept)

    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, golden[f"entropy_drop{percentile}_loss"], rtol=1e-4)
    expected = golden[f"entropy_drop{percentile}_grad"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]))
    labels = jnp.array([0, 0, 255])
    expected = -(np.log(0.5) + np.log(0.9)) / 2
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-6)
    # L_u divides by the pixels that could have had a label: here all three, or the first two.
    counted = jnp.array([True, True, True])
    unsupervised = losses.unsupervised_cross_entropy(logits, labels, counted)
    np.testing.assert_allclose(unsupervised, expected * 2 / 3, rtol=1e-6)
    unsupervised = losses.unsupervised_cross_entropy(logits, labels, jnp.array([True, False, True]))
    np.testing.assert_allclose(unsupervised, -np.log(0.5) / 2, rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.ohem_cross_entropy])
def test_nothing_labelled_gives_zero_loss_and_gradient(loss):
    logits, labels = jnp.ones((1, 4, 4, 3)), jnp.full((1, 4, 4), 255)
    value, gradient = jax.value_and_grad(loss)(logits, labels)
    assert value == 0
    assert np.all(gradient == 0)


def test_one_labelled_pixel_is_a_mean_of_one():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 3)), jnp.float32)
    labels = jnp.array([[[255, 255], [1, 255]]])
    expected = -jax.nn.log_softmax(logits)[0, 1, 0, 1]
    for loss in (losses.cross_entropy, losses.ohem_cross_entropy):
        np.testing.assert_allclose(loss(logits, labels), expected, rtol=1e-6)


def probabilities_of(top: list[float], classes: list[int]) -> jnp.ndarray:
    """(1, 1, W, 3) with the given top probability at the given class."""
    rows = np.array([[(1 - p) / 2] * 3 for p in top])
    rows[np.arange(len(top)), classes] = top
    return jnp.asarray(rows, jnp.float32)[None, None]


def test_confidence_mask():
    config = default_config().method.pseudo_label
    config.mode, config.threshold = "confidence", 0.7
    probabilities = probabilities_of([0.6, 0.7001, 0.9, 0.99], [0, 1, 2, 1])
    counted = jnp.array([[[True, True, True, False]]])
    labels = pseudo_labels(jax.random.key(0), probabilities, counted, jnp.zeros(3), 0.0, config)
    assert labels.tolist() == [[[255, 1, 2, 255]]]
    config.threshold = 0.9
    on_it = jnp.array([[[[0.9, 0.05, 0.05]]]], jnp.float32)
    labels = pseudo_labels(jax.random.key(0), on_it, counted[..., :1], jnp.zeros(3), 0.0, config)
    assert labels.tolist() == [[[0]]]  # a pixel at the threshold is kept


def test_adaptive_mask_keeps_confident_classes_less_often():
    config = default_config().method.pseudo_label
    config.mode, config.threshold, config.floor = "adaptive", 0.0, 0.1
    confidence = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(keep_rate(confidence, 1.0), [1.0, 0.5, 0.0])
    np.testing.assert_allclose(keep_rate(jnp.ones(3), 1.0), [0.0, 0.0, 0.0])  # no division by 0
    n = 5000
    for c, expected in ((0, 1.0), (1, 0.5), (2, 0.1)):  # the floor holds for class 2
        probabilities = probabilities_of([0.9] * n, [c] * n)
        counted = jnp.ones((1, 1, n), bool)
        labels = pseudo_labels(jax.random.key(c), probabilities, counted, confidence, 0.0, config)
        assert set(np.unique(labels)) <= {c, 255}
        np.testing.assert_allclose(np.mean(labels == c), expected, atol=0.02)


def test_class_confidence_moves_only_for_classes_in_the_batch():
    logits = jnp.log(jnp.array([[[[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]]]]))
    labels = jnp.array([[[0, 0, 255]]])
    before = jnp.array([0.5, 0.5, 0.5])
    after = update_class_confidence(before, logits, labels, 0.9)
    np.testing.assert_allclose(after, [0.9 * 0.5 + 0.1 * 0.7, 0.5, 0.5], rtol=1e-6)


def test_cutmix_pastes_half_of_the_next_image():
    height, width, batch = 40, 60, 64
    mask = augment.cutmix_mask(jax.random.key(0), batch, (height, width), 1.0)
    area = np.asarray(mask).reshape(batch, -1).mean(axis=1)
    np.testing.assert_allclose(area, 0.5, atol=0.03)  # whole pixels at the rectangle's border
    for one in np.asarray(mask):  # one filled rectangle
        rows, columns = np.where(one.any(1))[0], np.where(one.any(0))[0]
        assert one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    ids = jnp.broadcast_to(jnp.arange(batch)[:, None, None], mask.shape)
    mixed = augment.mix(mask, ids)
    np.testing.assert_array_equal(mixed, np.where(mask, (ids + 1) % batch, ids))
    # Features of several channels are cut alike.
    stacked = augment.mix(mask, jnp.stack([ids, -ids], axis=-1))
    np.testing.assert_array_equal(stacked[..., 1], -mixed)
    assert not np.any(augment.cutmix_mask(jax.random.key(0), batch, (height, width), 0.0))


def test_photometric_changes_images_only_where_asked():
    images = jax.random.uniform(jax.random.key(0), (16, 12, 12, 3)) * 255
    config = default_config().method
    np.testing.assert_array_equal(augment.photometric(jax.random.key(1), images, config), images)
    config.color_jitter = config.grayscale = config.blur = 0.5
    changed = augment.photometric(jax.random.key(1), images, config)
    assert changed.shape == images.shape
    assert np.all((changed >= 0) & (changed <= 255))
    same = np.isclose(changed, images, atol=1e-3).all(axis=(1, 2, 3))
    assert 0 < same.sum() < len(images)


@pytest.mark.parametrize("devices", [1, 4])
def test_photometric_is_the_same_compiled(devices):
    """A channel compared with another rounding of itself gave a tenth of the pixels another hue."""
    config = default_config().method
    config.update({"color_jitter": 1.0, "grayscale": 0.0, "blur": 0.0})
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    one_by_one = augment.photometric(jax.random.key(1), images, config)
    sharded = sharding.shard_batch(images, sharding.make_mesh(devices))
    compiled = jax.jit(lambda x: augment.photometric(jax.random.key(1), x, config))(sharded)
    np.testing.assert_allclose(compiled, one_by_one, atol=0.01)


def test_nearest_takes_every_fourth_pixel():
    x = jnp.arange(2 * 8 * 8).reshape(2, 8, 8)
    np.testing.assert_array_equal(augment.nearest(x, (2, 2)), x[:, ::4, ::4])


def test_normalize_images():
    c = default_config().data
    images = jnp.broadcast_to(jnp.asarray(c.mean), (1, 2, 2, 3))
    np.testing.assert_allclose(augment.normalize_images(images, c.mean, c.std), 0.0, atol=1e-6)
    bright = augment.normalize_images(jnp.full((1, 1, 1, 3), 255, jnp.uint8), c.mean, c.std)
    np.testing.assert_allclose(
        bright[0, 0, 0], (255 - np.array(c.mean)) / np.array(c.std), rtol=1e-6
    )
