"""The k-th smallest and percentiles, exact on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csc_jax import losses
from csc_jax.parallel import sharding
from csc_jax.parallel.order_statistics import kth_smallest, percentile
from csc_jax.planning.hlo import Program

RNG = np.random.default_rng(0)
VALUES = {
    "probabilities": RNG.random((4, 9, 11)) ** 8,
    "both signs": RNG.normal(size=(4, 9, 11)) * 10.0 ** RNG.integers(-30, 30, (4, 9, 11)),
    "normal": RNG.normal(size=(4, 9, 11)),
    "ties": RNG.integers(-2, 3, (4, 9, 11)) / 4,
    "one value": np.full((4, 9, 11), 0.7),
    "extremes": RNG.choice([0.0, -0.0, 1e-45, 1.0, np.inf, -np.inf, 3.4e38, -3.4e38], (4, 9, 11)),
}

KTH, PERCENTILE = jax.jit(kth_smallest), jax.jit(percentile)
OHEM = jax.jit(losses.ohem_cross_entropy, static_argnames="min_kept")


@pytest.mark.parametrize("name", VALUES)
def test_kth_smallest_is_that_of_a_sort(name):
    x = VALUES[name].astype(np.float32)
    for k in (0, 1, 17, 197, 394, 395):
        np.testing.assert_array_equal(KTH(x, k), np.sort(x, axis=None)[k])


@pytest.mark.parametrize("name", ["probabilities", "normal", "ties"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 1.0])
def test_percentile_is_numpys(name, share):
    x = VALUES[name].astype(np.float32)
    counted = np.random.default_rng(1).random(x.shape) < share
    assert counted.any() == (share > 0)
    for p in (0.0, 20.0, 33.3, 80.0, 99.9, 100.0):
        expected = np.percentile(x[counted], p) if share else np.nan
        np.testing.assert_allclose(PERCENTILE(x, counted, p), expected, rtol=1e-5, atol=1e-6)


def slow_ohem(probability, labels, threshold, min_kept):
    """Decisions.md 21 as it is written, with a sort."""
    known = np.sort(probability[labels != 255])
    if len(known) == 0:
        return 0.0
    limit = known[-1] if len(known) < min_kept else max(threshold, known[min_kept - 1])
    return np.mean(-np.log(known[known <= limit]))


@pytest.mark.parametrize("case", ["as they come", "ties", "all easy"])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("min_kept", [1, 200, 10_000])
def test_ohem_is_that_with_a_sort(case, ignored, min_kept):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 9, 11, 3))
    labels = np.where(rng.random((4, 9, 11)) < ignored, 255, rng.integers(0, 3, (4, 9, 11)))
    if case == "ties":
        logits = np.round(logits)
    elif case == "all easy":
        logits += 9 * (np.arange(3) == labels[..., None])
    log_p = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))
    probability = np.exp(np.take_along_axis(log_p, labels[..., None] % 255, -1)[..., 0])
    value = OHEM(logits.astype(np.float32), labels, threshold=0.7, min_kept=min_kept)
    expected = slow_ohem(probability, labels, np.float32(0.7), min_kept)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_devices_exchange_counts_alone():
    mesh = sharding.make_mesh(8)
    x = np.random.default_rng(1).normal(size=(8, 50, 40)).astype(np.float32)
    split = sharding.batch_sharding(mesh)
    program = jax.jit(kth_smallest, in_shardings=(split, None)).lower(x, 777).compile()
    assert program(jax.device_put(x, split), jnp.int32(777)) == np.sort(x, axis=None)[777]
    found = Program(program.as_text()).collectives()
    assert {(each.kind, each.bytes, each.in_loop) for each in found} == {("all-reduce", 60, False)}
    assert len(found) == 8
