"""Cross-consistency training: decoders, perturbations and losses against slow NumPy versions."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_network import (
    assert_statistics,
    cross_entropy,
    running_statistics,
    softmax,
    toy_batch,
    toy_method,
)

from csc_jax.config import default_config
from csc_jax.methods import cct
from csc_jax.models import resize_aligned

KEY = jax.random.key(7)
CONFIG = default_config().method.cct
# One decoder of each kind, for programs that compile quickly.
FEW = {
    f"method__cct__{name}": 1
    for name in ("con_msk", "dropout", "f_drop", "f_noise", "g_cutout", "i_vat", "obj_msk")
}


def decode_slowly(params, features):
    """The logits of one decoder, pixel by pixel: (h, w, D) -> (H, W, C)."""
    x = features @ params["project"]["kernel"]
    for i in range(len(params) - 1):
        kernel, bias = params[f"shuffle{i}"]["kernel"], params[f"shuffle{i}"]["bias"]
        height, width, classes = x.shape
        out = np.zeros((2 * height, 2 * width, classes))
        for row, column, y, z in np.ndindex(height, width, 2, 2):
            value = sum(x[row, column, c] * kernel[c, y, z] for c in range(classes)) + bias[y, z]
            out[2 * row + y, 2 * column + z] = np.maximum(value, 0)
        x = out
    return x


@pytest.fixture(scope="module")
def decoders():
    """Two decoders of 5 channels to 3 classes and twice two times the size, with biases."""
    params = cct.init_decoders(jax.random.key(1), 2, 5, 3, 4)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), params)


@pytest.fixture(scope="module")
def features():
    return jax.random.normal(jax.random.key(2), (2, 3, 4, 5))


def test_decoders_are_sub_pixel_convolutions(decoders, features):
    logits = cct.decode(decoders, jnp.stack([features, 2 * features]))
    assert logits.shape == (2, 2, 12, 16, 3)
    for k, scale in ((0, 1), (1, 2)):
        params = jax.tree.map(lambda x, k=k: np.asarray(x[k], np.float64), decoders)
        for image in range(2):
            expected = decode_slowly(params, scale * np.asarray(features[image], np.float64))
            np.testing.assert_allclose(logits[k, image], expected, rtol=1e-4, atol=1e-5)


def test_decoders_start_as_nearest_neighbour_upsampling(features):
    params = cct.init_decoders(jax.random.key(1), 1, 5, 3, 2)
    logits = cct.decode(params, features[None])
    np.testing.assert_allclose(logits, logits[:, :, ::2, ::2].repeat(2, 2).repeat(2, 3), rtol=1e-6)


def test_masks_and_noises(features):
    objects = jnp.asarray(np.random.default_rng(0).random((2, 3, 4)) < 0.5)
    outside = np.asarray(features) * ~np.asarray(objects)[..., None]
    masked = [cct._PERTURBATIONS[n](KEY, features, objects, CONFIG) for n in ("con_msk", "obj_msk")]
    np.testing.assert_array_equal(masked[1], outside)
    np.testing.assert_array_equal(masked[0], features - outside)

    ratio = cct._PERTURBATIONS["f_noise"](KEY, features, objects, CONFIG) / features - 1
    assert 0.25 < np.abs(ratio).max() <= 0.3
    np.testing.assert_allclose(np.mean(ratio), 0, atol=0.06)

    wide = jnp.ones((2, 3, 4, 400))
    dropped = np.asarray(cct._PERTURBATIONS["dropout"](KEY, wide, objects, CONFIG))
    assert set(np.unique(dropped)) == {0.0, 2.0}
    np.testing.assert_array_equal(dropped, dropped[:, :1, :1].repeat(3, 1).repeat(4, 2))
    np.testing.assert_allclose(np.mean(dropped), 1, atol=0.1)
    assert not np.array_equal(dropped[0], dropped[1])


def test_feature_drop_removes_the_most_active_pixels():
    activity = jnp.linspace(0.05, 1.0, 20).reshape(1, 4, 5, 1) * jnp.ones((8, 1, 1, 3))
    thresholds = []
    for image in np.asarray(cct._PERTURBATIONS["f_drop"](KEY, activity, None, CONFIG)):
        kept = image[..., 0].ravel() > 0
        number = kept.sum()
        assert kept[:number].all()  # the least active ones
        thresholds.append(number / 20)
    assert 0.55 <= min(thresholds) < max(thresholds) <= 0.9  # gamma in [0.6, 0.9], one an image


def test_components_are_opencvs():
    rng = np.random.default_rng(4)
    mask = rng.random((6, 13, 17)) < 0.35
    mask[0], mask[1] = True, False
    mask[2, ::2], mask[2, 1::4, 0], mask[2, 3::4, -1] = True, True, True  # a snake: many rounds
    mask[2, 1::4, 1:], mask[2, 3::4, :-1] = False, False
    ids = np.asarray(jax.jit(cct.components)(jnp.asarray(mask)))
    for image, found in zip(mask, ids, strict=True):
        number, expected = cv2.connectedComponents(image.astype(np.uint8), connectivity=8)
        assert np.all(found[~image] == image.size)
        pairs = set(zip(expected[image].tolist(), found[image].tolist(), strict=True))
        assert len(pairs) == number - 1 == len(np.unique(found[image]))
        for _, first in pairs:
            assert found.ravel()[first] == first == np.flatnonzero(found == first)[0]


def test_guided_cutout_cuts_inside_every_object():
    objects = np.zeros((1, 30, 40), bool)
    objects[0, 2:12, 3:18] = True
    objects[0, 20:29, 25:39] = objects[0, 25, 39] = True  # 9 x 15 with its outlier
    objects[0, 15, 3] = True  # too small for a hole
    ids = cct.components(jnp.asarray(objects))[0]
    starts = set()
    keys = jax.random.split(KEY, 40)
    for hole in np.asarray(jax.vmap(lambda key: cct.cut_objects(key, ids, erase=0.4))(keys)):
        rows, columns = np.where(hole[:18].any(1))[0], np.where(hole[:18].any(0))[0]
        assert (len(rows), len(columns)) == (4, 6)  # 0.4 of 10 and of 15
        assert hole[:18].sum() == 24
        assert rows[0] >= 2
        assert rows[-1] <= 11
        assert columns[0] >= 3
        assert columns[-1] <= 17
        assert hole[20:29, 25:40].sum() == hole[18:].sum() == 3 * 6
        starts.add((rows[0], columns[0]))
    assert {row for row, _ in starts} == set(range(2, 9))
    features = jnp.ones((1, 30, 40, 2))
    cut = cct._PERTURBATIONS["g_cutout"](KEY, features, jnp.asarray(objects), CONFIG)
    assert np.sum(cut == 0) == 2 * (24 + 18)


def test_the_adversarial_direction_is_that_of_the_papers_finite_difference(decoders, features):
    features = features[:, :2, :2]
    moved = np.asarray(jax.jit(cct.adversarial)(KEY, decoders, features, 0.5), np.float64)
    offset = moved - np.asarray(features)
    np.testing.assert_allclose(np.sqrt((offset**2).sum((2, 3, 4))), 0.5, rtol=1e-4)
    direction = np.asarray(jax.random.uniform(KEY, (2, *features.shape)) - 0.5, np.float64)
    for k in range(2):
        params = jax.tree.map(lambda x, k=k: np.asarray(x[k], np.float64), decoders)
        for image in range(2):
            z = np.asarray(features[image], np.float64)
            target = softmax(decode_slowly(params, z))

            def divergence(offset, z=z, target=target, params=params):
                p = softmax(decode_slowly(params, z + offset))
                return np.sum(target * (np.log(target) - np.log(p)))

            d = direction[k, image] / np.linalg.norm(direction[k, image])
            gradient = np.zeros_like(z)
            for place in np.ndindex(z.shape):  # of the divergence at xi d, xi = 1e-3
                step = np.zeros_like(z)
                step[place] = 1e-5
                above, below = divergence(1e-3 * d + step), divergence(1e-3 * d - step)
                gradient[place] = (above - below) / 2e-5
            expected = 0.5 * gradient / np.linalg.norm(gradient)
            np.testing.assert_allclose(offset[k, image], expected, atol=2e-3)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.4, 1.0])
def test_annealed_bootstrapped_cross_entropy(progress):
    rng = np.random.default_rng(5)
    logits, labels = 2 * rng.normal(size=(2, 6, 7, 4)), rng.integers(0, 4, (2, 6, 7))
    labels[0, 0] = 255
    threshold = 0.25 + 0.65 * (1 - np.exp(-5 * min(progress / 0.4, 1)))
    truth = np.take_along_axis(softmax(logits), np.minimum(labels, 3)[..., None], -1)[..., 0]
    expected = cross_entropy(logits, labels, truth <= threshold)
    value = cct.annealed_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), progress)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_loss_is_the_papers():
    method, state = toy_method(method__name="cct", method__cct__ramp_up=0.4, train__steps=10, **FEW)
    state = state.replace(step=jnp.int32(2))  # half of the ramp's four steps are over
    batch = toy_batch()
    images, label = [batch[half]["image"] for half in batch], batch["labeled"]["label"]

    @jax.jit
    def run(state):
        losses = jax.value_and_grad(method.loss, has_aux=True)(state.trained, state, batch, KEY)
        student, decoders = state.student, state.companions["decoders"].params
        of_labeled, of_unlabeled = (  # each normalised by itself
            method.task.train_forward(
                student.params, student.batch_stats, half, KEY, projection=False
            )[0]
            for half in images
        )
        decoded = cct.decode_perturbed(
            jax.random.split(KEY)[1],
            decoders,
            of_unlabeled.encoded,
            of_unlabeled.logits.argmax(-1) != 0,
            method.task.config.method.cct,
        )
        method.task.config.method.cct.annealed = True
        annealed = method._supervised_loss(jnp.int32(1), of_labeled, label)
        return losses, of_labeled.logits, of_unlabeled.logits, decoded, annealed

    ((loss, outputs), gradients), logits_l, logits_u, decoded, annealed = run(state)
    assert decoded.shape == (7, 2, 8, 8, 4)
    inside = np.asarray(batch["unlabeled"]["inside"])[:, ::4, ::4]
    target = softmax(logits_u)
    loss_u = np.mean([((softmax(one) - target) ** 2)[inside].mean() for one in decoded])
    full = resize_aligned(logits_l, (32, 32))
    loss_s = cross_entropy(full, np.asarray(label), np.ones(label.shape, bool))
    np.testing.assert_allclose(outputs.metrics["loss_u"], loss_u, rtol=1e-4)
    np.testing.assert_allclose(outputs.metrics["loss_s"], loss_s, rtol=1e-4)
    np.testing.assert_allclose(loss, loss_s + np.exp(-5 * 0.25) * 30.0 * loss_u, rtol=1e-4)
    expected = cct.annealed_cross_entropy(full, label, 0.1)
    np.testing.assert_allclose(annealed, expected, rtol=1e-5)
    statistics = running_statistics(method, state.student, *images)
    assert_statistics(outputs.batch_stats["student"], statistics)
    # Every decoder learns, and so does the encoder.
    for kernel in gradients["decoders"]["project"]["kernel"]:
        assert np.any(kernel)
    assert np.any(gradients["student"]["body"]["kernel"])
