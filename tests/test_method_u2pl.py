"""U2PL against its paper, written slowly in NumPy, and the recorded loss of the lineage."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_network import softmax, toy_batch, toy_method

from csc_jax import losses
from csc_jax.methods import u2pl

SIZES = [5, 3, 3]


@pytest.mark.parametrize("percentile", [80, 100])
def test_unsupervised_loss_equals_the_recorded_one(percentile):
    golden = np.load(Path(__file__).parent / "golden" / "losses.npz")
    labels, teacher = jnp.asarray(golden["labels"]), jnp.asarray(golden["teacher_logits"])

    def loss(logits):
        reliable = u2pl.reliable_labels(teacher, labels, jnp.asarray(float(percentile)))
        return losses.reweighted_cross_entropy(logits, reliable)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["logits"]))
    name = f"entropy_drop{percentile}"
    np.testing.assert_allclose(value, golden[f"{name}_loss"], rtol=1e-4)
    expected = golden[f"{name}_grad"]
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())


def test_entropy_splits_the_labelled_pixels():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 6, 7, 4)) * 3
    labels = rng.integers(0, 4, (2, 6, 7))
    labels[0, :2] = 255
    low, high = u2pl.by_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(20.0))
    p = softmax(logits)
    entropy = -(p * np.log(p + 1e-10)).sum(-1)
    known = labels != 255
    np.testing.assert_array_equal(low, known & (entropy <= np.percentile(entropy[known], 20)))
    np.testing.assert_array_equal(high, known & (entropy >= np.percentile(entropy[known], 80)))
    none = jnp.full_like(jnp.asarray(labels), 255)
    assert not np.any(u2pl.by_entropy(jnp.asarray(logits), none, jnp.asarray(20.0)))


def slow_candidates(p, labels_l, labels_u, low, high, ranks, limit):
    """Their Sec. 3.3, pixel by pixel."""
    classes, images_l = p.shape[-1], len(labels_l)
    anchors, negatives = (np.zeros((classes, *p.shape[:3]), bool) for _ in range(2))
    for b, y, x in np.ndindex(*p.shape[:3]):
        order = list(np.argsort(-p[b, y, x], kind="stable"))
        for c in range(classes):
            rank, sure = order.index(c), p[b, y, x, c] > limit
            if b < images_l:
                label = labels_l[b, y, x]
                anchors[c, b, y, x] = label == c and sure
                negatives[c, b, y, x] = label not in (c, 255) and rank < ranks[0]
            else:
                label, i = labels_u[b - images_l, y, x], b - images_l
                anchors[c, b, y, x] = label == c and sure and low[i, y, x]
                negatives[c, b, y, x] = high[i, y, x] and ranks[0] <= rank < ranks[1]
    return anchors.reshape(classes, -1), negatives.reshape(classes, -1)


def test_candidates_equal_the_slow_ones():
    rng = np.random.default_rng(1)
    method, _ = toy_method(method__name="u2pl", method__u2pl__ranks=(1, 3))
    p = softmax(2 * rng.standard_normal((4, 3, 5, 4))).astype(np.float32)
    labels_l, labels_u = rng.integers(0, 4, (2, 3, 5)), rng.integers(0, 4, (2, 3, 5))
    labels_l[0, 0], labels_u[1, 1] = 255, 255
    low = rng.random((2, 3, 5)) < 0.5
    low &= labels_u != 255
    high = ~low & (labels_u != 255)
    in_turn = p[[0, 2, 1, 3]]  # the halves dealt out
    found = method._candidates(*map(jnp.asarray, (in_turn, labels_l, labels_u, low, high)))
    expected = slow_candidates(p, labels_l, labels_u, low, high, (1, 3), 0.3)
    for actual, slow in zip((found.anchors, found.negatives), expected, strict=True):
        assert slow.any()
        np.testing.assert_array_equal(
            np.asarray(actual).reshape(4, 4, -1), slow.reshape(4, 4, -1)[:, [0, 2, 1, 3]]
        )


def test_queues_are_first_in_first_out():
    rng = np.random.default_rng(2)
    queues = u2pl.Queues(jnp.zeros((sum(SIZES), 1)), jnp.zeros(3, int), jnp.zeros(3, int))
    expected = [[], [], []]
    for step in range(6):
        features = 100.0 * step + np.arange(1.0, 9.0)[:, None]
        chosen = rng.random((3, 8)) < np.array([0.3, 0.9, 0.0])[:, None]  # class 1: over its size
        for c in range(3):
            expected[c] = (expected[c] + features[chosen[c], 0].tolist())[-SIZES[c] :]
        queues = u2pl.enqueue(queues, jnp.asarray(features), jnp.asarray(chosen), SIZES)
        start = 0
        for c, size in enumerate(SIZES):
            assert queues.count[c] == len(expected[c])
            ring = np.asarray(queues.features)[start : start + size, 0]
            assert sorted(ring[ring != 0]) == sorted(expected[c])
            start += size
    assert queues.count.tolist()[:2] == SIZES[:2]


def test_the_contrastive_loss_is_that_of_its_only_choice(monkeypatch):
    """One anchor and one negative a class leave nothing to chance."""
    method, state = toy_method(
        method__name="u2pl",
        method__u2pl__queue_size=1,
        method__u2pl__queue_size_first=1,
        method__u2pl__anchors=3,
        method__u2pl__negatives=2,
        model__projection_dim=4,
    )
    rng = np.random.default_rng(3)
    student, teacher = rng.standard_normal((2, 8, 4)).astype(np.float32)
    anchors, negatives = np.zeros((2, 4, 8), bool)
    anchors[0, 1], anchors[1, 4], anchors[2, 6] = True, True, True  # class 3 is not there
    negatives[0, 5], negatives[1, 2] = True, True  # class 2 has no negative
    candidates = u2pl.Candidates(jnp.asarray(anchors), jnp.asarray(negatives))

    def loss(student):
        return method._contrast(
            jax.random.key(0), student, jnp.asarray(teacher), candidates, state.method_state
        )[0]

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    expected = 0.0
    for anchor, negative in ((1, 5), (4, 2)):
        positive, other = (
            cosine(student[anchor], teacher[anchor]),
            cosine(student[anchor], teacher[negative]),
        )
        scores = np.array([positive, other, other]) / 0.5
        expected += -scores[0] + np.log(np.exp(scores).sum())
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(student))
    np.testing.assert_allclose(value, expected / 3, rtol=1e-5)  # three classes have anchors
    assert np.all(np.any(gradient != 0, axis=1) == np.isin(np.arange(8), (1, 4)))


def test_before_its_start_only_labels_teach():
    method, state = toy_method(
        method__name="u2pl", method__supervised_only=5, model__projection_dim=4
    )
    loss, outputs = method.loss(state.trained, state, toy_batch(), jax.random.key(0))
    np.testing.assert_allclose(loss, outputs.metrics["loss_s"], rtol=1e-6)
    assert not np.any(outputs.carry.count)
    later = state.replace(step=jnp.asarray(5))
    loss, outputs = method.loss(later.trained, later, toy_batch(), jax.random.key(0))
    parts = outputs.metrics
    total = parts["loss_s"] + parts["loss_u"] + parts["loss_u2pl"]
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    assert np.any(outputs.carry.count)
    assert parts["loss_u2pl"] > 0
