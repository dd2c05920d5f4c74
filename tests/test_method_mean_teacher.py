"""Mean Teacher: its loss against Sec. 2 and Appendix B.1 of Tarvainen and Valpola, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES
from toy_network import cross_entropy, softmax, toy_batch, toy_method

from csc_jax.methods import shared
from csc_jax.models import resize_aligned

KEY = jax.random.key(3)


def test_ramp_up_by_hand():
    steps = [0, 9, 10, 15, 20, 50]
    expected = [0, 0, np.exp(-5), np.exp(-5 * 0.25), 1, 1]
    values = [shared.ramp_up(jnp.int32(step), 10, 10.0) for step in steps]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert [shared.ramp_up(jnp.int32(step), 10, 0.0) for step in (9, 10)] == [0, 1]  # no ramp


def test_consistency_is_the_mean_squared_difference_inside():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(2, 3, 4, 5)), softmax(rng.normal(size=(2, 3, 4, 5)))
    counted = rng.random((2, 3, 4)) < 0.5
    total = 0.0
    for place in np.argwhere(counted):
        total += np.sum((softmax(logits[tuple(place)]) - target[tuple(place)]) ** 2) / 5
    value = shared.consistency(jnp.asarray(logits), jnp.asarray(target), jnp.asarray(counted))
    np.testing.assert_allclose(value, total / counted.sum(), rtol=1e-5)
    nothing = jnp.zeros((2, 3, 4), bool)
    assert shared.consistency(jnp.asarray(logits), jnp.asarray(target), nothing) == 0.0
    gradient = jax.grad(shared.consistency, argnums=1)(
        jnp.asarray(logits), jnp.asarray(target), jnp.asarray(counted)
    )
    assert not np.any(gradient)  # the teacher learns from no gradient


def test_likeliest_drops_what_is_outside_or_below_the_threshold():
    probabilities = jnp.array([[[[0.6, 0.4], [0.2, 0.8], [0.1, 0.9]]]])
    inside = jnp.array([[[True, True, False]]])
    assert shared.likeliest(probabilities, inside).tolist() == [[[0, 1, 255]]]
    assert shared.likeliest(probabilities, inside, 0.7).tolist() == [[[255, 1, 255]]]


@pytest.mark.parametrize(("step", "ramp"), [(0, 0.0), (5, np.exp(-5 * 0.25)), (9, 1.0)])
def test_the_loss_is_the_papers(step, ramp):
    method, state = toy_method(
        method__name="mean_teacher",
        method__mean_teacher__noise=0.0,
        method__mean_teacher__ramp_up=0.4,
        method__supervised_only=3,
        train__steps=10,
    )
    other = method.task.init_network(jax.random.key(9), projection=False)
    state = state.replace(step=jnp.int32(step), teacher=other)
    batch = toy_batch()
    loss, outputs = jax.jit(method.loss)(state.trained, state, batch, KEY)

    images = jnp.concatenate([batch["labeled"]["image"], batch["unlabeled"]["image"]])
    logits = {}
    for name in ("student", "teacher"):
        network = getattr(state, name)
        out, _ = method.task.train_forward(
            network.params, network.batch_stats, images, KEY, projection=False
        )
        logits[name] = out.logits
    label = np.asarray(batch["labeled"]["label"])
    full = resize_aligned(logits["student"][:2], (32, 32))
    loss_s = cross_entropy(full, label, np.ones(label.shape, bool))
    inside = np.concatenate([np.ones((2, 32, 32), bool), batch["unlabeled"]["inside"]])
    squares = (softmax(logits["student"]) - softmax(logits["teacher"])) ** 2  # (4, 8, 8, C)
    loss_u = squares[inside[:, ::4, ::4]].sum() / CLASSES / inside[:, ::4, ::4].sum()
    np.testing.assert_allclose(outputs.metrics["loss_s"], loss_s, rtol=1e-5)
    np.testing.assert_allclose(outputs.metrics["loss_u"], loss_u, rtol=1e-4)
    np.testing.assert_allclose(loss, loss_s + 100.0 * ramp * loss_u, rtol=1e-4)


def test_views_carry_the_noise_they_should():
    method, _ = toy_method(method__name="mean_teacher", method__mean_teacher__noise=0.15)
    images = jnp.full((2, 64, 64, 3), 128, jnp.uint8)
    view = method._view(KEY, images)
    deviation = np.std(view - images, axis=(0, 1, 2)) / np.array(method.task.config.data.std)
    np.testing.assert_allclose(deviation, 0.15, rtol=0.03)
    assert np.abs(np.corrcoef(view[0].ravel(), view[1].ravel())[0, 1]) < 0.05


def test_a_module_on_top_gets_confident_labels_only():
    method, state = toy_method(
        method__name="mean_teacher", method__contrast="csc", method__pseudo_label__threshold=0.4
    )
    batch = toy_batch()
    _, outputs = jax.jit(method.base.loss)(state.trained, state, batch, KEY)
    labels = np.asarray(outputs.pixels.labels)  # (4, 8, 8), the halves dealt out in turn
    np.testing.assert_array_equal(labels[::2], batch["labeled"]["label"][:, ::4, ::4])
    unlabeled = labels[1::2]
    assert np.all(unlabeled[0, :, -2:] == 255)  # padding
    assert 0 < np.sum(unlabeled == 255) - 16 < unlabeled.size - 16
    assert outputs.metrics["kept_fraction"] == 1.0  # while the loss itself knows no mask
