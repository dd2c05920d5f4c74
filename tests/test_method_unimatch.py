"""FixMatch, UniMatch and its second version against their papers, written slowly in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_network import assert_statistics, running_statistics, softmax, toy_batch, toy_method

from csc_jax import losses
from csc_jax.methods import shared, unimatch, unimatch_v2
from csc_jax.models import Features, resize_aligned


@pytest.fixture
def seen(monkeypatch):
    """The arguments of every unsupervised cross entropy, in order."""
    calls = []
    cross_entropy = losses.unsupervised_cross_entropy

    def record(logits, labels, counted):
        calls.append(tuple(np.asarray(x) for x in (logits, labels, counted)))
        return cross_entropy(logits, labels, counted)

    monkeypatch.setattr(losses, "unsupervised_cross_entropy", record)
    return calls


def slow_loss(logits, labels, counted):
    """Mean over the counted pixels of -log p(label), those without a label as 0."""
    total = 0.0
    p = softmax(logits)
    for b, y, x in np.ndindex(*labels.shape):
        if counted[b, y, x] and labels[b, y, x] != 255:
            total -= np.log(p[b, y, x, labels[b, y, x]])
    return total / counted.sum()


def run(name, **overrides):
    fields = {f"method__{name}__threshold": 0.3, "method__unimatch_view__cutmix": 1.0, **overrides}
    method, state = toy_method(method__name=name, **fields)
    batch = toy_batch()
    loss, outputs = method.loss(state.trained, state, batch, jax.random.key(3))
    return method, state, batch, float(loss), jax.device_get(outputs.metrics)


def test_fixmatch(seen):
    *_, batch, loss, metrics = run("fixmatch")
    (call,) = seen
    np.testing.assert_allclose(metrics["loss_u"], slow_loss(*call), rtol=1e-5)
    np.testing.assert_allclose(loss, (metrics["loss_s"] + metrics["loss_u"]) / 2, rtol=1e-6)
    # Padding counts nowhere, wherever CutMix has taken it.
    assert call[2].sum() < batch["unlabeled"]["inside"].size
    assert np.all(call[1][~call[2]] == 255)
    assert 0 < np.mean(call[1] != 255) < 1


def test_unimatch(seen):
    *_, loss, metrics = run("unimatch")
    first, second, features = (slow_loss(*call) for call in seen)
    np.testing.assert_allclose(metrics["loss_u"], (first + second) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_f"], features, rtol=1e-5)
    expected = (metrics["loss_s"] + 0.25 * (first + second) + 0.5 * features) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert np.any(seen[0][1] != seen[1][1])  # boxes of their own
    assert np.all(seen[2][2] == toy_batch()["unlabeled"]["inside"])  # no box at all


def test_unimatch_v2(seen):
    method, state, batch, loss, metrics = run("unimatch_v2")
    first, second = (slow_loss(*call) for call in seen)
    np.testing.assert_allclose(metrics["loss_u"], (first + second) / 2, rtol=1e-5)
    np.testing.assert_allclose(loss, (metrics["loss_s"] + (first + second) / 2) / 2, rtol=1e-5)
    # The teacher's labels of the weak view, not the student's.
    images = batch["unlabeled"]["image"]
    p = softmax(resize_aligned(method.task.eval_forward(state.teacher, images).logits, (32, 32)))
    expected = np.where(p.max(-1) >= 0.3, p.argmax(-1), 255)
    np.testing.assert_array_equal(method.pseudo_labels(None, state, images), expected)


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "unimatch_v2"])
def test_the_strong_view_is_unimatchs_whatever_other_methods_have(name):
    *_, loss, _ = run(name)
    others = {"method__color_jitter": 1.0, "method__grayscale": 1.0, "method__cutmix": 0.0}
    assert run(name, **others)[-2] == loss
    for operation in ("color_jitter", "grayscale", "blur", "cutmix"):
        field = f"method__unimatch_view__{operation}"
        always, never = (run(name, **{field: p})[-2] for p in (1.0, 0.0))
        assert np.isfinite(always), operation
        assert always != never, operation
    assert run(name, method__unimatch_view__cutmix_area=(0.4, 0.4))[-2] != loss


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "unimatch_v2"])
def test_before_its_start_only_labels_teach(name):
    *_, loss, metrics = run(name, method__supervised_only=1)
    np.testing.assert_allclose(loss, metrics["loss_s"] / 2, rtol=1e-6)


def test_channels_are_dropped_whole_and_the_rest_scaled_up():
    x = np.random.default_rng(0).random((4, 3, 5, 64)).astype(np.float32) + 1
    ratio = np.asarray(unimatch.drop_channels(jax.random.key(0), jnp.asarray(x), 0.25)) / x
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], x.shape), rtol=1e-5)
    np.testing.assert_allclose(np.unique(ratio.round(3)), [0, 1.333], rtol=1e-5)
    assert 0.1 < np.mean(ratio == 0) < 0.4


def test_complementary_channels_add_up_to_two():
    x = np.ones((6, 2, 2, 32), np.float32)
    dropped = np.array([True, False, True, True, False, True])[:, None, None, None]
    first, second = unimatch_v2.drop_complementary(jax.random.key(1), x, x, jnp.asarray(dropped))
    np.testing.assert_array_equal(first + second, 2 * x)
    np.testing.assert_array_equal(np.unique(first[0]), [0, 2])
    np.testing.assert_array_equal(first[1], x[1])
    assert not np.array_equal(first[0], first[2])


def test_perturbed_features_are_decoded_beside_the_others(monkeypatch):
    """What UniMatch asks of the network: the weak images' features again, with fewer channels."""
    method, state = toy_method(method__name="unimatch")
    asked = {}

    def forward(self, params, batch_stats, images, key, *, projection, dropout=True, perturb=None):
        if perturb is not None:
            x = jnp.arange(1.0, len(images) + 1)[:, None, None, None] * jnp.ones((1, 2, 2, 16))
            asked["features"] = perturb(Features((x, 10 * x), x[..., :1]))
            images = images[jnp.array([0, 1, 1, 2, 3, 3])]
        return real(self, params, batch_stats, images, key, projection=projection, dropout=dropout)

    real = type(method.task).train_forward
    monkeypatch.setattr(type(method.task), "train_forward", forward)
    method.loss(state.trained, state, toy_batch(), jax.random.key(0))
    (low, deep), middle = asked["features"]
    assert (len(low), len(middle), len(deep)) == (6, 4, 6)
    kept = low[jnp.array([0, 1, 3, 4]), 0, 0, 0]
    np.testing.assert_array_equal(kept, np.arange(1, 5))  # a labelled and a weak one in turn
    for row, image in ((2, 2.0), (5, 4.0)):  # behind each weak image the same, perturbed
        np.testing.assert_array_equal(np.unique(low[row]), [0, 2 * image])
        np.testing.assert_array_equal(np.unique(deep[row]), [0, 20 * image])
    assert not np.array_equal(low[2] == 0, deep[2] == 0)


@pytest.mark.parametrize(("name", "views"), [("fixmatch", 1), ("unimatch", 2)])
def test_strong_views_are_a_batch_of_their_own(name, views, monkeypatch):
    """In their code: labelled and weak images first, then the strong views."""
    strong_view, seen = shared.strong_view, []

    def record(*arguments):
        seen.append(strong_view(*arguments))
        return seen[-1]

    monkeypatch.setattr(shared, "strong_view", record)
    method, state = toy_method(method__name=name)
    batch = toy_batch()
    _, outputs = method.loss(state.trained, state, batch, jax.random.key(0))
    first = np.concatenate([batch["labeled"]["image"], batch["unlabeled"]["image"]])
    assert len(seen) == views
    second = np.concatenate([images for images, _ in seen])
    expected = running_statistics(method, state.student, first, second)
    assert_statistics(outputs.batch_stats["student"], expected)


def test_exactly_half_of_the_images_keep_all_channels(monkeypatch):
    for images, share, kept in ((1, 0.5, 0), (4, 0.5, 2), (5, 0.5, 2), (4, 0.0, 4), (4, 1.0, 0)):
        keys = jax.random.split(jax.random.key(0), 20)
        draws = [unimatch_v2.draw_dropped(key, images, share).ravel().tolist() for key in keys]
        assert {draw.count(False) for draw in draws} == {kept}
        assert len(set(map(tuple, draws))) > 1 or kept in (0, images)  # drawn anew

    method, state = toy_method(method__name="unimatch_v2")
    real, seen = type(method.task).train_forward, []

    def forward(self, *arguments, projection, perturb):
        x = jnp.ones((15, 2, 2, 16))  # labelled images and two strong views
        seen.extend(perturb(Features((x, x), None)).levels)
        return real(self, *arguments, projection=projection)

    monkeypatch.setattr(type(method.task), "train_forward", forward)
    method.loss(state.trained, state, toy_batch(size=(5, 32, 32)), jax.random.key(0))
    for features in seen:
        labeled, first, second = np.all(features == 1, axis=(1, 2, 3)).reshape(5, 3).T
        assert labeled.all()
        assert first.sum() == 2
        np.testing.assert_array_equal(first, second)
