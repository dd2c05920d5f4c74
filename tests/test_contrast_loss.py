"""The contrastive loss against recorded numbers and a slow version in NumPy."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contrast_cases import GOLDEN, assert_same_bank, golden_bank, random_bank, unit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csc_jax import contrast
from csc_jax.contrast import devices, streaming
from csc_jax.contrast.loss import key_places

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("platform")
LOSSES = {
    "mean_batch": (False, None),
    "mean_bank": (True, None),
    "topn1_batch": (False, 1),
    "topn1_bank": (True, 1),
}


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return dict(np.load(request.param))


@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_gradient_equal_the_recorded_ones(golden, case):
    with_bank, top_n = LOSSES[case]
    bank = golden_bank(golden) if with_bank else None
    labels = jnp.asarray(golden["labels"])

    def loss(queries):
        return contrast.contrastive_loss(
            queries,
            labels,
            jnp.ones(labels.shape, bool),
            bank,
            temperature=float(golden["temperature"]),
            top_n=top_n,
        )

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["features"]))
    np.testing.assert_allclose(value, golden[f"{case}_loss"], rtol=1e-4)
    expected = golden[f"{case}_grad"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def slow_loss(queries, labels, valid, bank_features, bank_counts, temperature, top_n, places=None):
    """Eq. 5 and 6 as they are written, one query at a time; `places` are the keys, None = all."""
    losses, places = [], range(len(queries)) if places is None else places
    for i in range(len(queries)):
        if not valid[i]:
            continue
        keys = [(queries[j], labels[j]) for j in places if valid[j] and j != i]
        for c, count in enumerate(bank_counts):
            keys += [(entry, c) for entry in bank_features[c, :count]]
        positives = sorted((queries[i] @ k / temperature for k, c in keys if c == labels[i]))[::-1]
        negatives = sum(np.exp(queries[i] @ k / temperature) for k, c in keys if c != labels[i])
        positives = positives[:top_n]
        if positives:
            terms = [-np.log(np.exp(s) / (np.exp(s) + negatives)) for s in positives]
            losses.append(np.mean(terms))
    return np.mean(losses) if losses else 0.0


def slow_gradient(queries, valid, loss, epsilon=1e-5):
    """Central differences of the equations in float64, by the queries as queries and as keys."""
    gradient = np.zeros(queries.shape)
    for i, d in np.argwhere(np.broadcast_to(valid[:, None], queries.shape)):
        step = np.zeros(queries.shape)
        step[i, d] = epsilon
        gradient[i, d] = (loss(queries + step) - loss(queries - step)) / (2 * epsilon)
    return gradient


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Both ways through the sweeps: everything at once, and in several blocks that overlap."""
    if request.param == "many blocks":
        monkeypatch.setattr(streaming, "_BLOCK_KEYS", 5)
        monkeypatch.setattr(streaming, "_TILE", 4)
    # Block sizes are constants to `jit`, so each way has to be compiled for itself.
    return jax.jit(
        lambda *arguments, **constants: jax.value_and_grad(contrast.contrastive_loss)(
            *arguments, **constants
        ),
        static_argnames=("temperature", "top_n", "max_keys"),
    )


@pytest.mark.parametrize("top_n", [1, 2, 3])
def test_of_equal_similarities_the_first_counts(top_n):
    values = jnp.array([[1.0, 3.0, 3.0, 2.0], [streaming.NONE] * 4])
    places = jnp.broadcast_to(jnp.arange(10, 14), values.shape)
    found = streaming.top(values, places, top_n)
    np.testing.assert_array_equal(found[0][0], [3, 3, 2][:top_n])
    np.testing.assert_array_equal(found[1][0], [11, 12, 13][:top_n])
    np.testing.assert_array_equal(found[0][1], values[1, :top_n])


@pytest.mark.parametrize("top_n", [None, 1])
@pytest.mark.parametrize("counts", [None, [0, 2]])
def test_a_query_without_positive_is_no_part_of_the_mean(blocks, top_n, counts):
    # Class 0 has two queries; those of classes 1 and 2 have a positive at most in the bank.
    queries = unit(np.random.default_rng(5).normal(size=(4, 3)))
    labels, valid = np.array([0, 0, 1, 2]), np.ones(4, bool)
    bank = None if counts is None else random_bank(0, [*counts, 0], 2, 3)
    features = np.zeros((0, 2, 3)) if bank is None else np.asarray(bank.features, np.float64)
    expected = slow_loss(queries, labels, valid, features, counts or [], 0.5, top_n)
    arguments = (jnp.asarray(queries, jnp.float32), jnp.asarray(labels), jnp.asarray(valid), bank)
    value, _ = blocks(*arguments, temperature=0.5, top_n=top_n)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


# Ragged fills, an empty class, a single class, none but one valid query, N above the positives.
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    # Few shapes, many values: each shape is a compilation.
    counts=st.sampled_from([[3], [0, 6, 2], [6, 1, 0], [5, 6, 4], None]),
    top_n=st.sampled_from([None, 1, 3, 50]),
    valid_queries=st.sampled_from([0, 1, 2, 8, 13]),
    duplicates=st.booleans(),
)
def test_loss_and_gradient_equal_the_slow_ones(
    blocks, seed, counts, top_n, valid_queries, duplicates
):
    rng = np.random.default_rng([seed, 1])  # not the numbers that fill the bank
    n, dim, temperature = 13, 5, 0.2  # 13 and 18 keys are no multiples of their blocks
    classes = 3 if counts is None else len(counts)
    bank = None if counts is None else random_bank(seed, counts, size=6, dim=dim)
    queries = unit(rng.normal(size=(n, dim))).astype(np.float32)
    labels = rng.integers(0, classes, n).astype(np.int32)
    if duplicates and bank is not None:
        # Twice the same entry: the value does not depend on which of them counts as the nearest.
        bank = bank._replace(features=bank.features.at[:, 1].set(bank.features[:, 0]))
        queries[1], labels[1] = queries[0], labels[0]
    valid = rng.permutation(np.arange(n) < valid_queries)
    entries = np.zeros((0, 1, dim)) if bank is None else np.asarray(bank.features, np.float64)

    def expected(queries):
        return slow_loss(queries, labels, valid, entries, counts or [], temperature, top_n)

    loss, gradient = blocks(
        jnp.asarray(queries), labels, valid, bank, temperature=temperature, top_n=top_n
    )
    np.testing.assert_allclose(loss, expected(queries.astype(np.float64)), rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(gradient)[~valid] == 0)
    if not duplicates:  # where two keys tie, the loss has no derivative
        numeric = slow_gradient(queries.astype(np.float64), valid, expected)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("top_n", "counts"),
    [(None, [5, 6, 4]), (1, [6, 1, 0]), (3, [5, 6, 4]), (None, None), (1, None)],
)
def test_with_bounded_keys_it_is_the_loss_over_these_keys(blocks, top_n, counts):
    rng = np.random.default_rng([3, 1])  # not the numbers that fill the bank
    queries, labels = unit(rng.normal(size=(13, 5))), rng.integers(0, 3, 13)
    valid = rng.permutation(np.arange(13) < 11)
    bank = None if counts is None else random_bank(3, counts, size=6, dim=5)
    entries = np.zeros((0, 1, 5)) if bank is None else np.asarray(bank.features, np.float64)
    places = key_places(13, 7)

    def expected(queries, places=places):
        return slow_loss(queries, labels, valid, entries, counts or [], 0.2, top_n, places)

    loss, gradient = blocks(
        jnp.asarray(queries, jnp.float32),
        labels,
        valid,
        bank,
        temperature=0.2,
        top_n=top_n,
        max_keys=7,
    )
    np.testing.assert_allclose(loss, expected(queries), rtol=1e-5)
    assert abs(loss - expected(queries, None)) > 1e-3
    numeric = slow_gradient(queries, valid, expected)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_keys", [16, 17])
def test_a_bound_that_no_batch_reaches_changes_nothing(max_keys):
    queries, labels, valid = jnp.ones((16, 4)), jnp.arange(16) % 3, jnp.ones(16, bool)

    def program(**bound):
        loss = jax.value_and_grad(functools.partial(contrast.contrastive_loss, top_n=1, **bound))
        return jax.jit(loss).lower(queries, labels, valid, random_bank(0, [2, 3], 3, 4)).as_text()

    assert program(max_keys=max_keys) == program(max_keys=0) == program()
    assert program(max_keys=15) != program()


@pytest.mark.parametrize("keys", [152, 760, 800, 1900, 3000, 3800])
def test_keys_come_from_all_images_classes_and_slots_alike(keys):
    """Also where the slots of a class are a multiple of the stretch that has one key."""
    shape = images, classes, _ = 4, 19, 50
    places = key_places(math.prod(shape), keys)
    assert len(places) == keys
    assert np.all(np.diff(places) > 0)
    image, c, slot = np.unravel_index(places, shape)
    # Of each image and class, and of the hard and the easy half of the slots.
    for x, number in ((image, images), (c, classes), (slot // 25, 2), (slot // 10, 5)):
        share = np.bincount(x, minlength=number) / keys * number
        assert 0.9 < share.min() <= share.max() < 1.1, share
    np.testing.assert_array_equal(key_places(9, 9), np.arange(9))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), top_n=st.sampled_from([None, 1, 3]))
def test_order_of_the_queries_does_not_change_the_loss(seed, top_n):
    rng = np.random.default_rng(seed)
    queries = jnp.asarray(unit(rng.normal(size=(16, 4))), jnp.float32)
    labels, valid = rng.integers(0, 3, 16), rng.random(16) < 0.8
    bank = random_bank(seed, [2, 5, 0], size=5, dim=4)
    order = rng.permutation(16)
    loss = jax.jit(contrast.contrastive_loss, static_argnames="top_n")
    np.testing.assert_allclose(
        loss(queries[order], labels[order], valid[order], bank, top_n=top_n),
        loss(queries, labels, valid, bank, top_n=top_n),
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("top_n", [None, 1])
def test_half_precision_does_not_overflow(dtype, top_n):
    # All similarities are 20 at temperature 0.05, and e^20 is beyond float16.
    queries = jnp.ones((40, 4), dtype) / 2
    labels, valid = jnp.arange(40) % 2, jnp.ones(40, bool)
    bank = contrast.enqueue(
        contrast.init_memory_bank(2, 30, 4), jnp.ones((1, 2, 30, 4)), jnp.ones((1, 2, 30), bool)
    )
    loss, gradient = jax.value_and_grad(contrast.contrastive_loss)(
        queries, labels, valid, bank, temperature=0.05, top_n=top_n
    )
    # One positive against 50 negatives just as similar.
    np.testing.assert_allclose(loss, np.log(51), rtol=1e-5)
    assert gradient.dtype == dtype
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("top_n", [None, 1])
def test_a_batch_without_labels_changes_nothing(top_n):
    bank = random_bank(0, [3, 2], size=4, dim=3)
    queries = jnp.full((2, 5, 3), jnp.nan)  # whatever stands in the slots
    labels, nothing = jnp.full((2, 5), 255), jnp.zeros((2, 5), bool)
    for valid in (nothing, ~nothing):
        loss, gradient = jax.value_and_grad(contrast.contrastive_loss)(
            queries.reshape(10, 3), labels.reshape(10), valid.reshape(10), bank, top_n=top_n
        )
        assert loss == 0.0
        assert np.all(np.asarray(gradient) == 0.0)
    new = jnp.full((2, 2, 4, 3), jnp.nan)
    after, metrics = contrast.update_memory_bank(
        bank, queries, labels, nothing, new, jnp.zeros((2, 2, 4), bool)
    )
    assert_same_bank(after, bank)
    assert np.isnan(metrics["enqueue_accepted"])
    assert np.isnan(metrics["consistency_accepted"])


@pytest.mark.parametrize("top_n", [None, 1])
def test_ignored_labels_take_no_part(top_n):
    rng = np.random.default_rng(0)
    queries = jnp.asarray(unit(rng.normal(size=(8, 4))), jnp.float32)
    labels = jnp.array([0, 0, 1, 1, 255, -1, 7, 0])
    bank = random_bank(0, [3, 3], size=3, dim=4)
    inside = jnp.array([1, 1, 1, 1, 0, 0, 0, 1], bool)
    everything = contrast.contrastive_loss(queries, labels, jnp.ones(8, bool), bank, top_n=top_n)
    masked = contrast.contrastive_loss(queries, labels, inside, bank, top_n=top_n)
    np.testing.assert_array_equal(everything, masked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_n": 0}, "top_n"),
        ({"max_keys": -1}, "max_keys"),
        ({"bank": contrast.init_memory_bank(2, 3, 5)}, "width 5"),
    ],
)
def test_bad_arguments_fail_at_trace_time(arguments, message):
    with pytest.raises(ValueError, match=message):
        contrast.contrastive_loss(
            jnp.ones((2, 4)), jnp.zeros(2, int), jnp.ones(2, bool), **arguments
        )


@pytest.mark.parametrize("top_n", [None, 1, 2])
def test_only_a_cpu_gets_loops(platform, monkeypatch, top_n):
    """A GPU would ask the host after each turn, and before each `cond` around a loop."""
    monkeypatch.setattr(streaming, "_BLOCK_KEYS", 8)
    queries, labels = jnp.ones((16, 4)), jnp.arange(16) % 3

    def loss(queries):
        return contrast.contrastive_loss(
            queries, labels, labels < 2, random_bank(0, [6, 8, 7], 8, 4), top_n=top_n
        )

    program = jax.jit(jax.value_and_grad(loss)).lower(queries).as_text()
    assert ("stablehlo.while" in program) == (platform == "cpu")


def test_products_on_tensor_cores(monkeypatch):
    a, b = (jax.random.normal(jax.random.key(i), (8, 8)) for i in range(2))
    expected = np.float64(a) @ np.float64(b)
    for tensor_cores in (False, True):
        monkeypatch.setattr(devices, "has_tf32", lambda on=tensor_cores: on)
        traced = jax.jit(lambda a, b: streaming.matmul(a, b)).trace(a, b)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert ("tf32" in program) == tensor_cores
        # Other platforms know no such products.
        np.testing.assert_allclose(traced.lower().compile()(a, b), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "expected"), [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False)]
)
def test_which_gpus_have_tensor_cores_for_float32(platform, monkeypatch, capability, expected):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert devices.has_tf32() == (expected and platform == "gpu")
