"""Sampling of queries and of new entries; unit length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_jax import contrast

KEY = jax.random.key(0)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    views=st.sampled_from([1, 4, 9]),
    hard_share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_semi_hard_sampling(seed, views, hard_share):
    rng = np.random.default_rng(seed)
    n, classes = 40, 3
    labels = rng.choice([0, 1, 1, 255, -1, 9], n)  # class 2 never occurs
    hard = rng.random(n) < hard_share
    predictions = np.where(hard, labels + 1, labels)
    features = np.arange(n * 2, dtype=np.float32).reshape(n, 2)
    samples = jax.jit(contrast.semi_hard_sample, static_argnames=("num_classes", "views"))(
        jax.random.key(seed), features, labels, predictions, num_classes=classes, views=views
    )
    for c in range(classes):
        drawn = np.asarray(samples.indices)[c][np.asarray(samples.valid)[c]]
        assert len(set(drawn)) == len(drawn)
        assert np.all(labels[drawn] == c)
        np.testing.assert_array_equal(samples.features[c, : len(drawn)], features[drawn])
        available_hard = int(np.sum((labels == c) & hard))
        available_easy = int(np.sum((labels == c) & ~hard))
        assert len(drawn) == min(views, available_hard + available_easy)
        drawn_hard = int(np.sum(hard[drawn]))
        half = (views + 1) // 2
        if available_hard >= half and available_easy >= views - half:
            assert drawn_hard == half
        else:
            assert drawn_hard in (available_hard, views - available_easy)


@pytest.mark.parametrize("views", [3, 7, 12])
def test_random_sampling_is_uniform_and_takes_no_pixel_twice(views):
    labels = jnp.array([0] * 10 + [1] * 3 + [2] * 5 + [255] * 4)
    # Some pixels of each class are hard: that must not change a pixel's chance.
    predictions = labels.at[jnp.array([0, 1, 2, 3, 4, 11, 13, 14, 15])].set(3)

    def draw(key):
        order_key, take_key = jax.random.split(key)
        order = contrast.order_by_class(order_key, labels, predictions, 3)
        return contrast.take_random(take_key, order, views)

    indices, valid = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000))
    assert np.all(np.asarray(valid).sum(axis=2) == [min(views, k) for k in (10, 3, 5)])
    for c, pixels in enumerate([range(10), range(10, 13), range(13, 18)]):
        drawn = [np.asarray(i)[v] for i, v in zip(indices[:, c], valid[:, c], strict=True)]
        assert all(len(set(d)) == len(d) and set(d) <= set(pixels) for d in drawn[:100])
        share = np.bincount(np.concatenate(drawn), minlength=22)[list(pixels)] / 2000
        np.testing.assert_allclose(share, min(views, len(pixels)) / len(pixels), atol=0.05)


def test_order_differs_by_key():
    labels = jnp.zeros(50, int)
    a, b = (contrast.order_by_class(jax.random.key(k), labels, labels, 1).pixels for k in (0, 1))
    assert sorted(a.tolist()) == sorted(b.tolist()) == list(range(50))
    assert a.tolist() != b.tolist()


def test_normalize_keeps_zero_without_a_gradient():
    x = jnp.asarray([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]])
    np.testing.assert_allclose(contrast.normalize(x), [[0, 0, 0], [0, 0.6, 0.8]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(contrast.normalize(x)))(x)
    assert np.all(gradient[0] == 0)
    np.testing.assert_allclose(gradient[1], [0.2, 0.032, -0.024], rtol=1e-5)
