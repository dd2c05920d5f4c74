"""The paper's module against recorded numbers, hand-made cases and a slow version in NumPy."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csc_jax import contrast
from csc_jax.contrast import streaming

KEY = jax.random.key(0)
GOLDEN = sorted((Path(__file__).parent / "golden" / "contrast").glob("*.npz"))
LOSSES = {
    "mean_batch": (False, None),
    "mean_bank": (True, None),
    "topn1_batch": (False, 1),
    "topn1_bank": (True, 1),
}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_bank(seed: int, counts: list[int], size: int, dim: int) -> contrast.MemoryBank:
    features = unit(np.random.default_rng(seed).normal(size=(len(counts), size, dim)))
    features *= (np.arange(size) < np.array(counts)[:, None])[..., None]
    count = jnp.asarray(counts, jnp.int32)
    return contrast.MemoryBank(
        jnp.asarray(features, jnp.float32), count, count % size, jnp.float32(jnp.inf)
    )


def assert_same_bank(a: contrast.MemoryBank, b: contrast.MemoryBank) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return dict(np.load(request.param))


def golden_bank(golden: dict[str, np.ndarray]) -> contrast.MemoryBank:
    count = jnp.asarray(golden["count"], jnp.int32)
    return contrast.MemoryBank(
        jnp.asarray(golden["bank"]), count, jnp.zeros_like(count), jnp.float32(jnp.inf)
    )


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


def test_bank_measures_equal_the_recorded_ones(golden):
    bank = golden_bank(golden)
    queries, labels = jnp.asarray(golden["features"])[None], jnp.asarray(golden["labels"])[None]
    np.testing.assert_allclose(contrast.separation(bank), golden["separation"], rtol=1e-5)
    candidate = contrast.consistency_step(
        bank, queries, labels, jnp.ones(labels.shape, bool), class_mean="pooled"
    )
    np.testing.assert_allclose(candidate.features, golden["consistency_candidate"], atol=1e-5)
    np.testing.assert_allclose(
        contrast.separation(candidate), golden["consistency_candidate_separation"], rtol=1e-5
    )
    _, accepted = contrast.gate(bank, candidate, "strict")
    assert bool(accepted) == bool(golden["consistency_accepted"])


def slow_loss(queries, labels, valid, bank_features, bank_counts, temperature, top_n):
    """Eq. 5 and 6 as they are written, one query at a time."""
    losses = []
    for i in range(len(queries)):
        if not valid[i]:
            continue
        keys = [(queries[j], labels[j]) for j in range(len(queries)) if valid[j] and j != i]
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
        static_argnames=("temperature", "top_n"),
    )


# Ragged fills, an empty class, a single class, none but one valid query, N above the positives.
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    # Few shapes, many values: each shape is a compilation.
    counts=st.sampled_from([[3], [0, 6, 2], [6, 1, 0], [5, 6, 4], None]),
    top_n=st.sampled_from([None, 1, 3, 50]),
    valid_queries=st.sampled_from([0, 1, 2, 8, 12]),
    duplicates=st.booleans(),
)
def test_loss_and_gradient_equal_the_slow_ones(
    blocks, seed, counts, top_n, valid_queries, duplicates
):
    rng = np.random.default_rng([seed, 1])  # not the numbers that fill the bank
    n, dim, temperature = 12, 5, 0.2
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


def test_a_full_bank_stays_of_unit_length():
    bank, rng = random_bank(0, [4, 4, 4], size=4, dim=6), np.random.default_rng(0)
    step = jax.jit(contrast.update_memory_bank, static_argnames=("consistency_gate",))
    for _ in range(30):
        queries = jnp.asarray(unit(rng.normal(size=(2, 6, 6))), jnp.float32)
        labels = jnp.asarray(rng.integers(0, 3, (2, 6)))
        new = jnp.asarray(10 * rng.normal(size=(2, 3, 2, 6)), jnp.float32)
        bank, _ = step(
            bank,
            queries,
            labels,
            jnp.ones((2, 6), bool),
            new,
            jnp.asarray(rng.random((2, 3, 2)) < 0.5),
            consistency_gate="off",
        )
        np.testing.assert_allclose(jnp.linalg.norm(bank.features, axis=-1), 1.0, rtol=1e-5)


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
        ({"bank": contrast.init_memory_bank(2, 3, 5)}, "width 5"),
    ],
)
def test_bad_arguments_fail_at_trace_time(arguments, message):
    with pytest.raises(ValueError, match=message):
        contrast.contrastive_loss(
            jnp.ones((2, 4)), jnp.zeros(2, int), jnp.ones(2, bool), **arguments
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: contrast.enqueue(b, jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2), bool)), "B, 2"),
        (lambda b: contrast.enqueue(b, jnp.ones((1, 2, 2, 5)), jnp.ones((1, 2, 2), bool)), "4"),
        (lambda b: contrast.enqueue(b, jnp.ones((1, 2, 2, 4)), jnp.ones((1, 2), bool)), "valid"),
        (lambda b: consistency_of(b, (1, 6, 5), (1, 6)), r"B, n, 4"),
        (lambda b: consistency_of(b, (1, 6, 4), (1, 5)), r"labels and valid"),
        (lambda b: consistency_of(b, (1, 6, 4), (1, 6), class_mean="median"), "median"),
        (lambda b: contrast.gate(b, b, "sometimes"), "sometimes"),
        (lambda b: contrast.init_memory_bank(0, 3, 4), "positive"),
        (lambda b: contrast.consistency(jnp.ones((2, 4)), jnp.ones((3, 4))), "one shape"),
        (lambda b: contrast.order_by_class(KEY, jnp.ones(3, int), jnp.ones(4, int), 2), "labels"),
        (
            lambda b: contrast.order_by_class(KEY, jnp.ones(3, int), jnp.ones(3, int), 40000),
            "32768",
        ),
    ],
)
def test_shapes_and_names_that_do_not_fit_fail_at_trace_time(call, message):
    bank = contrast.init_memory_bank(2, 3, 4)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, bank)


def consistency_of(bank, queries, labels, **options):
    return contrast.consistency_step(
        bank, jnp.ones(queries), jnp.ones(labels, int), jnp.ones(labels, bool), **options
    )


def test_separation_of_known_banks():
    bank = contrast.init_memory_bank(2, 2, 2)
    one_each = jnp.zeros((1, 2, 1, 2))

    def with_means(first, second):
        features = one_each.at[0, 0, 0].set(jnp.array(first)).at[0, 1, 0].set(jnp.array(second))
        return contrast.enqueue(bank, features, jnp.ones((1, 2, 1), bool))

    # Diagonal 2, twice the cosine of the two means, V = 2 (decisions.md 3).
    np.testing.assert_allclose(contrast.separation(with_means([1.0, 0.0], [0.0, 1.0])), 4.0)
    np.testing.assert_allclose(contrast.separation(with_means([1.0, 0.0], [1.0, 0.0])), 6.0)
    np.testing.assert_allclose(contrast.separation(with_means([1.0, 0.0], [-1.0, 0.0])), 2.0)
    np.testing.assert_allclose(
        contrast.class_separation(with_means([1.0, 0.0], [0.6, 0.8])), [0.6, 0.6], rtol=1e-6
    )


def test_consistency_is_the_mean_cosine():
    now = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    then = jnp.array([[5.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    np.testing.assert_allclose(contrast.consistency(now, then), 0.0, atol=1e-7)
    mask = jnp.array([True, False, True])
    np.testing.assert_allclose(contrast.consistency(now, then, mask), 0.5)
    assert contrast.consistency(now, then, jnp.zeros(3, bool)) == 0.0


def test_consistency_step_on_a_hand_made_case():
    # Class 0: one entry (1, 0); queries (0, 1) twice in image 0 and (1, 0) once in image 1.
    bank = contrast.init_memory_bank(2, 2, 2)
    bank = contrast.enqueue(
        bank, jnp.array([1.0, 0.0] * 2).reshape(1, 2, 1, 2), jnp.ones((1, 2, 1), bool)
    )
    queries = jnp.array([[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [9.0, 9.0]]])
    labels, valid = jnp.zeros((2, 2), int), jnp.array([[True, True], [True, False]])
    alpha = 1 / (1 + 3)  # Eq. 8c
    per_image = unit(np.array([0.5, 0.5]))  # means (0, 1) and (1, 0), averaged, then normalised
    pooled = np.array([1 / 3, 2 / 3])
    for class_mean, mean in (("per_image", per_image), ("pooled", pooled)):
        expected = unit(alpha * np.array([1.0, 0.0]) + (1 - alpha) * mean)
        after = contrast.consistency_step(bank, queries, labels, valid, class_mean=class_mean)
        np.testing.assert_allclose(after.features[0, 0], expected, rtol=1e-6)
        # The free slot and the class without a query are left alone.
        np.testing.assert_array_equal(after.features[0, 1], bank.features[0, 1])
        np.testing.assert_array_equal(after.features[1], bank.features[1])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 5, 20]),
    calls=st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
def test_enqueue_is_first_in_first_out(seed, size, calls):
    rng = np.random.default_rng(seed)
    images, classes, per_image, dim = 2, 2, 4, 3
    bank = contrast.init_memory_bank(classes, size, dim)
    queues: list[list[np.ndarray]] = [[] for _ in range(classes)]
    for fill in calls:
        new = unit(rng.normal(size=(images, classes, per_image, dim))).astype(np.float32)
        valid = rng.random((images, classes, per_image)) < fill / 4
        bank = jax.jit(contrast.enqueue)(bank, jnp.asarray(new), jnp.asarray(valid))
        for c in range(classes):
            queues[c] += [new[b, c, k] for b, k in np.argwhere(valid[:, c])]
    for c, queue in enumerate(queues):
        kept = queue[-size:]
        assert bank.count[c] == len(kept)
        # Oldest first: the cursor is where the next one goes, so the queue ends just before it.
        slots = (int(bank.cursor[c]) - len(kept) + np.arange(len(kept))) % size
        expected = np.array(kept).reshape(-1, dim)
        np.testing.assert_allclose(np.asarray(bank.features)[c, slots], expected, rtol=1e-6)


def slow_separation(features, counts):
    """Eq. 9 as it is written: the Gram matrix of the normalised class means, and V."""
    means = []
    for entries, count in zip(features, counts, strict=True):
        mean = entries[:count].mean(0) if count else np.zeros(features.shape[2])
        means.append(mean / max(np.linalg.norm(mean), 1e-12))
    classes = len(counts)
    gram = sum(a @ b for a in means for b in means)
    return gram + classes * (classes - 1)


def slow_consistency_step(features, counts, queries, labels, valid, class_mean):
    """Eq. 8 as it is written, one entry at a time."""
    after = features.copy()
    for c, count in enumerate(counts):
        member = valid & (labels == c)  # (B, n)
        if not member.any():
            continue
        mean = queries[member].mean(0)
        if class_mean == "per_image":
            means = [queries[i][member[i]].mean(0) for i in range(len(queries)) if member[i].any()]
            mean = unit(np.mean(means, axis=0))
        alpha = count / (count + member.sum())
        for slot in range(count):
            after[c, slot] = unit(alpha * features[c, slot] + (1 - alpha) * mean)
    return after


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    counts=st.sampled_from([[4], [0, 4, 2], [3, 1, 0], [0, 0, 0]]),
    class_mean=st.sampled_from(["per_image", "pooled"]),
    share_valid=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
def test_bank_measures_equal_the_slow_ones(seed, counts, class_mean, share_valid):
    rng = np.random.default_rng([seed, 1])
    bank = random_bank(seed, counts, size=4, dim=3)
    queries = unit(rng.normal(size=(2, 5, 3))).astype(np.float32)
    labels = rng.choice([0, 1, 2, 255, -1], (2, 5))
    valid = rng.random((2, 5)) < share_valid
    step = jax.jit(contrast.consistency_step, static_argnames="class_mean")
    candidate = step(bank, queries, labels, valid, class_mean=class_mean)
    features = np.asarray(bank.features, np.float64)
    expected = slow_consistency_step(features, counts, queries, labels, valid, class_mean)
    np.testing.assert_allclose(candidate.features, expected, atol=1e-5)
    for x, y in ((bank, features), (candidate, expected)):
        np.testing.assert_allclose(contrast.separation(x), slow_separation(y, counts), rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "rise", "accepted"),
    [
        ("strict", -0.5, True),
        ("strict", 0.5, False),
        ("range", 0.5, True),  # within the margin of 1
        ("range", 1.5, False),
        ("off", 1.5, True),
    ],
)
def test_gate(mode, rise, accepted):
    def bank_at(cosine):
        features = jnp.array([[[1.0, 0.0]], [[cosine, np.sqrt(1 - cosine**2)]]], jnp.float32)
        ones = jnp.ones(2, jnp.int32)
        return contrast.MemoryBank(features, ones, 0 * ones, jnp.float32(4.0))

    # Separ of two means is 4 + 2 cos.
    current, candidate = bank_at(0.0), bank_at(rise / 2)
    chosen, verdict = jax.jit(contrast.gate, static_argnums=2)(current, candidate, mode)
    assert bool(verdict) == accepted
    if accepted:
        best = min(4.0, 4.0 + rise)
        assert_same_bank(chosen, candidate._replace(best_separation=jnp.float32(best)))
    else:
        assert_same_bank(chosen, current)


def test_range_gate_also_accepts_what_lowers_separ():
    high = random_bank(1, [1, 1], size=1, dim=2)._replace(best_separation=jnp.float32(0.0))
    separate = high._replace(features=jnp.array([[[1.0, 0.0]], [[-1.0, 0.0]]]))
    assert contrast.separation(high) > contrast.separation(separate) > 0.0 + 1.0
    _, accepted = contrast.gate(high, separate, "range")
    assert accepted


def update(bank, rng, **options):
    images, classes = 2, bank.features.shape[0]
    dim = bank.features.shape[2]
    queries = jnp.asarray(unit(rng.normal(size=(images, 6, dim))), jnp.float32)
    labels = jnp.asarray(rng.integers(0, classes, (images, 6)))
    new = jnp.asarray(rng.normal(size=(images, classes, 2, dim)), jnp.float32)
    valid = jnp.ones((images, 6), bool), jnp.ones((images, classes, 2), bool)
    return (
        queries,
        labels,
        new,
        contrast.update_memory_bank(bank, queries, labels, valid[0], new, valid[1], **options),
    )


def test_update_until_the_bank_is_ready_only_enqueues():
    bank = random_bank(0, [3, 0], size=4, dim=3)
    _, _, new, (after, metrics) = update(bank, np.random.default_rng(0))
    expected = contrast.enqueue(bank, new, jnp.ones(new.shape[:3], bool))
    for x, y in zip(after, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert metrics["ready"] == 0.0
    assert np.isnan(metrics["enqueue_accepted"])
    assert after.best_separation == jnp.inf


def test_absent_classes_and_min_fill_decide_when_the_bank_is_ready():
    bank = random_bank(0, [3, 0], size=4, dim=3)
    assert not contrast.bank_ready(bank)
    assert contrast.bank_ready(bank, absent=(1,))
    assert not contrast.bank_ready(bank, absent=(1,), min_fill=4)


@pytest.mark.parametrize("seed", range(6))
def test_update_is_algorithm_1(seed):
    bank = random_bank(seed, [4, 2, 3], size=4, dim=3)
    bank = bank._replace(best_separation=contrast.separation(bank))
    queries, labels, new, (after, metrics) = update(bank, np.random.default_rng(seed))
    expected = bank
    candidate = contrast.consistency_step(expected, queries, labels, jnp.ones(labels.shape, bool))
    consistent = contrast.separation(candidate) < contrast.separation(expected)
    if consistent:
        best = jnp.minimum(expected.best_separation, contrast.separation(candidate))
        expected = candidate._replace(best_separation=best)
    candidate = contrast.enqueue(expected, new, jnp.ones(new.shape[:3], bool))
    separation = contrast.separation(candidate)
    enqueued = separation < expected.best_separation + 1.0
    enqueued |= separation < contrast.separation(expected)
    if enqueued:
        best = jnp.minimum(expected.best_separation, separation)
        expected = candidate._replace(best_separation=best)
    for x, y in zip(after, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert metrics["consistency_accepted"] == float(consistent)
    assert metrics["enqueue_accepted"] == float(enqueued)
    np.testing.assert_allclose(metrics["separation"], contrast.separation(after), rtol=1e-6)


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
    labels = jnp.array([0] * 10 + [1] * 3 + [255] * 4)
    # Half of class 0 is hard: that must not change a pixel's chance.
    predictions = labels.at[:5].set(2)

    def draw(key):
        order_key, take_key = jax.random.split(key)
        order = contrast.order_by_class(order_key, labels, predictions, 2)
        return contrast.take_random(take_key, order, views)

    indices, valid = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000))
    assert np.all(np.asarray(valid).sum(axis=2) == [min(views, 10), min(views, 3)])
    for c, pixels in enumerate([range(10), range(10, 13)]):
        drawn = [np.asarray(i)[v] for i, v in zip(indices[:, c], valid[:, c], strict=True)]
        assert all(len(set(d)) == len(d) and set(d) <= set(pixels) for d in drawn[:100])
        share = np.bincount(np.concatenate(drawn), minlength=17)[list(pixels)] / 2000
        np.testing.assert_allclose(share, min(views, len(pixels)) / len(pixels), atol=0.05)


def test_order_differs_by_key():
    labels = jnp.zeros(50, int)
    a, b = (contrast.order_by_class(jax.random.key(k), labels, labels, 1).pixels for k in (0, 1))
    assert sorted(a.tolist()) == sorted(b.tolist()) == list(range(50))
    assert a.tolist() != b.tolist()


def test_normalize_keeps_zero_and_its_gradient_finite():
    assert np.all(contrast.normalize(jnp.zeros(3)) == 0)
    gradient = jax.grad(lambda x: jnp.sum(contrast.normalize(x)))(jnp.zeros(3))
    assert np.all(np.isfinite(gradient))
