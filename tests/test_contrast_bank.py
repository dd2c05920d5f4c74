"""Memory bank, measures, gates and update against recorded numbers, hand-made cases, slow NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contrast_cases import GOLDEN, assert_same_bank, golden_bank, random_bank, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_jax import contrast

KEY = jax.random.key(0)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return dict(np.load(request.param))


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


@pytest.mark.parametrize("mode", ["strict", "range"])
def test_what_neither_lowers_separ_nor_lies_below_the_limit_is_rejected(mode):
    """Both comparisons are strict (decisions.md 4): a bank at the limit itself is not below it."""
    bank = random_bank(1, [2, 1], size=2, dim=2)
    bank = bank._replace(best_separation=contrast.separation(bank))
    same = bank._replace(cursor=bank.cursor + 1)
    chosen, accepted = contrast.gate(bank, same, mode, margin=0.0)
    assert not accepted
    assert_same_bank(chosen, bank)


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


@pytest.mark.parametrize(
    ("labels", "valid"), [([0, 1, 1], False), ([255, -1, 2], True), ([255, 0, -1], [1, 0, 1])]
)
def test_gates_are_not_asked_without_pixels_of_a_known_class(labels, valid):
    bank = random_bank(0, [1, 1], size=4, dim=3)  # one entry each: ready by default
    bank = bank._replace(best_separation=contrast.separation(bank) - 0.5)
    after, metrics = contrast.update_memory_bank(
        bank,
        jnp.asarray(unit(np.random.default_rng(0).normal(size=(1, 3, 3))), jnp.float32),
        jnp.asarray([labels]),
        jnp.broadcast_to(jnp.asarray(valid, bool), (1, 3)),
        jnp.ones((1, 2, 2, 3)),
        jnp.zeros((1, 2, 2), bool),
    )
    assert metrics["ready"] == 1.0
    assert np.isnan(metrics["consistency_accepted"])
    assert np.isnan(metrics["enqueue_accepted"])
    assert_same_bank(after, bank)


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


def test_update_needs_no_second_bank():
    """A bank that is donated is changed in place."""
    bank = random_bank(0, [512] * 16, size=512, dim=64)
    rng = np.random.default_rng(0)
    arguments = (
        jnp.asarray(unit(rng.normal(size=(2, 32, 64))), jnp.float32),
        jnp.tile(jnp.arange(32) % 16, (2, 1)),
        jnp.ones((2, 32), bool),
        jnp.asarray(rng.normal(size=(2, 16, 4, 64)), jnp.float32),
        jnp.ones((2, 16, 4), bool),
    )
    program = jax.jit(contrast.update_memory_bank, donate_argnums=0).lower(bank, *arguments)
    beside = program.compile().memory_analysis().temp_size_in_bytes
    assert beside < bank.features.nbytes / 4, beside


def test_update_has_no_loop():
    bank = random_bank(0, [6, 8, 7], 8, 4)
    program = jax.jit(contrast.update_memory_bank).lower(
        bank,
        jnp.ones((2, 5, 4)),
        jnp.ones((2, 5), jnp.int32),
        jnp.ones((2, 5), bool),
        jnp.ones((2, 3, 2, 4)),
        jnp.ones((2, 3, 2), bool),
    )
    assert "stablehlo.while" not in program.as_text()
