"""csc and its baseline: the loss over the two halves (10a), and what L_u divides by (13a)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contrast_cases import random_bank, unit
from tiny import CLASSES
from toy_network import cross_entropy, toy_batch, toy_method

from csc_jax import contrast, losses

DIM, VIEWS, LABELED = 6, 3, 2


def samples(seed, images):
    rng = np.random.default_rng(seed)
    features = 3.0 * rng.normal(size=(images, CLASSES, VIEWS, DIM)).astype(np.float32)
    valid = rng.random((images, CLASSES, VIEWS)) < 0.7
    return contrast.Samples(jnp.asarray(features), jnp.zeros(valid.shape, int), jnp.asarray(valid))


def dense_loss(drawn, bank, top_n):
    """Eq. 5 or 6 over these queries alone, one query and one key after the other."""
    features, valid = np.asarray(drawn.features, np.float64), np.asarray(drawn.valid)
    keys = [(unit(features[p]), p[1], p) for p in np.ndindex(valid.shape) if valid[p]]
    stored = []
    if bank is not None:
        entries, occupied = np.asarray(bank.features, np.float64), np.asarray(bank.occupied)
        stored = [(entries[p], p[0], p) for p in np.ndindex(occupied.shape) if occupied[p]]
    terms = []
    for query, c, place in keys:
        similar = [(query @ k / 0.1, d) for k, d, p in keys + stored if p != place]
        positive = sorted((s for s, d in similar if d == c), reverse=True)[: top_n or None]
        negative = sum(np.exp(s) for s, d in similar if d != c)
        if positive:
            terms.append(np.mean([-np.log(np.exp(s) / (np.exp(s) + negative)) for s in positive]))
    return np.mean(terms) if terms else 0.0


def loss_c(drawn, bank, **fields):
    method, state = toy_method(method__name="csc", **fields)
    return method._contrastive_loss(state.replace(bank=bank), drawn, LABELED)


def half(drawn, part):
    return jax.tree.map(lambda x: x[part], drawn)


@pytest.mark.parametrize("filled", [True, False], ids=["L_c", "L_p"])
def test_the_loss_is_the_sum_of_one_for_each_half(filled):
    drawn = samples(0, images=5)
    bank = random_bank(1, [4, 2, 5, 3] if filled else [0] * CLASSES, 5, DIM)
    keys, top_n = (bank, 1) if filled else (None, None)
    first, second = (
        dense_loss(half(drawn, part), keys, top_n)
        for part in (slice(None, LABELED), slice(LABELED, None))
    )
    np.testing.assert_allclose(loss_c(drawn, bank), first + second, rtol=1e-5)
    together = loss_c(drawn, bank, contrast__halves="together")
    np.testing.assert_allclose(together, dense_loss(drawn, keys, top_n), rtol=1e-5)
    assert abs(together - first - second) > 0.1


def test_a_half_without_queries_adds_nothing():
    drawn = samples(0, images=5)
    none = drawn._replace(valid=drawn.valid.at[LABELED:].set(False))
    bank = random_bank(1, [4, 2, 5, 3], 5, DIM)
    expected = dense_loss(half(drawn, slice(None, LABELED)), bank, 1)
    np.testing.assert_allclose(loss_c(none, bank), expected, rtol=1e-5)
    # A base that sees labelled images alone, such as supervised.
    np.testing.assert_allclose(loss_c(half(drawn, slice(None, LABELED)), bank), expected, rtol=1e-5)


def test_the_gradient_leaves_the_other_half_alone():
    drawn = samples(0, images=5)
    bank = random_bank(1, [4, 2, 5, 3], 5, DIM)
    only_labeled = drawn._replace(valid=drawn.valid.at[LABELED:].set(False))
    both, one = (
        jax.grad(lambda f, d=d: loss_c(d._replace(features=f), bank))(d.features)[:LABELED]
        for d in (drawn, only_labeled)
    )
    np.testing.assert_allclose(both, one, rtol=1e-5, atol=1e-7)
    assert np.abs(one).max() > 1e-3


@pytest.mark.parametrize("mode", ["confidence", "entropy"])
@pytest.mark.parametrize("mean", ["kept", "all"])
def test_l_u_divides_by_the_pixels_that_the_config_names(mean, mode):
    method, _ = toy_method(
        method__name="cutmix_mean_teacher",
        method__unsupervised_mean=mean,
        method__pseudo_label__mode=mode,
    )
    rng = np.random.default_rng(0)
    shape = (2, 8, 8)
    logits = rng.normal(size=(*shape, CLASSES)).astype(np.float32)
    inside = np.ones(shape, bool)
    inside[0, :, 6:] = False
    kept = (rng.random(shape) < 0.4) & inside
    pseudo = np.where(kept, rng.integers(0, CLASSES, shape), losses.IGNORE)
    expected = cross_entropy(logits, pseudo, kept)  # the mean over the kept ones
    if mean == "all":
        expected *= kept.sum() / inside.sum()
    elif mode == "entropy":  # U2PL's weight (tests/golden/losses.npz)
        expected *= kept.size / kept.sum()
    value = method._unsupervised_loss(*map(jnp.asarray, (logits, pseudo, inside)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_without_a_kept_pixel_l_u_is_zero():
    method, state = toy_method(
        method__name="cutmix_mean_teacher", method__pseudo_label__threshold=1.0
    )
    _, outputs = method.loss(state.trained, state, toy_batch(), jax.random.key(0))
    assert outputs.metrics["loss_u"] == 0.0
