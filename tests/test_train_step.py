"""The step: learning, repeatable, faithful to the equations."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, Harness, tiny_config
from toy_network import toy_harness

from csc_jax import contrast
from csc_jax.data import abstract_batch
from csc_jax.evaluation import Scores, confusion_matrix
from csc_jax.models import resize_aligned
from csc_jax.optimizer import make_optimizer, polynomial_decay
from csc_jax.state import Network, teacher_decay, update_ema
from csc_jax.training import step as train_step


def run(config, steps):
    harness = Harness(config)
    state, history = harness.init(), []
    for i in range(steps):
        state, metrics = harness.step(state, harness.batch(i))
        history.append({name: float(value) for name, value in jax.device_get(metrics).items()})
    return jax.device_get(state), history


@pytest.fixture(scope="module")
def csc_run():
    """30 steps of csc."""
    return run(tiny_config(train__steps=30, contrast__weight=0.1), 30)


def test_training_lowers_the_loss_and_raises_miou():
    steps = 200
    config = tiny_config(
        method__name="supervised", train__steps=steps, optimizer__learning_rate=1e-2
    )
    harness = Harness(config)
    unseen = harness.batch(1000)["labeled"]

    @jax.jit
    def confusion(network):
        logits = harness.method.task.eval_forward(network, unseen["image"]).logits
        predictions = jnp.argmax(resize_aligned(logits, (32, 32)), axis=-1)
        return confusion_matrix(unseen["label"], predictions, CLASSES)

    def miou(network):
        return Scores(np.asarray(confusion(network), np.int64)).miou

    state = harness.init()
    before, losses = miou(state.teacher), []
    for i in range(steps):
        state, metrics = harness.step(state, harness.batch(i))
        losses.append(metrics["loss"])
    assert losses[-1] < 0.7 * losses[0]
    assert miou(state.teacher) > before + 0.2


def test_csc_lowers_the_loss_and_fills_the_bank(csc_run):
    state, history = csc_run
    first, last = (np.mean([m["loss_s"] for m in part]) for part in (history[:3], history[-3:]))
    assert last < first
    assert history[0]["ready"] == 0.0
    assert history[-1]["ready"] == 1.0
    assert state.bank.count.min() >= 1
    norms = np.linalg.norm(state.bank.features, axis=-1)
    np.testing.assert_allclose(norms[np.arange(6) < state.bank.count[:, None]], 1.0, rtol=1e-5)
    assert state.step == 30
    assert np.isfinite(state.bank.best_separation)


def test_the_same_seed_repeats_the_run(csc_run):
    again, _ = run(tiny_config(train__steps=30, contrast__weight=0.1), 30)
    for a, b in zip(jax.tree.leaves(csc_run[0]), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_runs_of_other_seeds_share_their_programs():
    """In the compilation cache; and yet no two of them make the same choices."""
    one, other = (Harness(tiny_config(seed=seed)) for seed in (0, 1))
    assert one.lower().as_text() == other.lower().as_text()
    inits = [harness.init.func.lower(*harness.init.args).as_text() for harness in (one, other)]
    assert inits[0] == inits[1]
    one, other = (toy_harness(tiny_config(seed=seed)) for seed in (0, 1))
    states = [harness.init() for harness in (one, other)]
    kernels = [jax.device_get(s.student.params["classifier"]["kernel"]) for s in states]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
    losses = [h.step(one.init(), one.batch(0))[1]["loss"] for h in (one, other)]
    assert losses[0] != losses[1]  # same state and images, other dropout and CutMix


LOWER = """
import hashlib, jax
from tiny import Harness, tiny_config

harness = Harness(tiny_config())
for program in (jax.jit(harness.init).lower(), harness.lower()):
    print(hashlib.sha256(program.as_text().encode()).hexdigest())
"""


@pytest.mark.slow
def test_programs_are_the_same_in_every_process():
    """Or the compilation cache would not know them: sets have another order in each process."""
    tests = Path(__file__).parent
    path = f"{tests}{os.pathsep}{tests.parent}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOWER],
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    one, other = (process.communicate()[0].split() for process in processes)
    assert len(one) == 2
    assert one == other


def test_ema_by_hand():
    assert teacher_decay(jnp.int32(0), 0, 0.99) == 0.0  # the first step copies the student
    assert teacher_decay(jnp.int32(1), 0, 0.99) == 0.5
    np.testing.assert_allclose(teacher_decay(jnp.int32(3), 0, 0.99), 0.75)
    np.testing.assert_allclose(teacher_decay(jnp.int32(1000), 0, 0.99), 0.99)
    assert teacher_decay(jnp.int32(7), 7, 0.99) == 0.0  # and so does the end of supervised_only
    teacher = Network({"w": jnp.array(2.0)}, {"mean": jnp.array(4.0)})
    student = Network({"w": jnp.array(0.0)}, {"mean": jnp.array(8.0)})
    after = update_ema(teacher, student, 0.75)
    assert (after.params["w"], after.batch_stats["mean"]) == (1.5, 5.0)


def test_teacher_follows_the_student(csc_run):
    harness = Harness(tiny_config(train__steps=30, contrast__weight=0.1))
    state = harness.init()
    for i in range(3):
        before = jax.device_get(state)
        state, _ = harness.step(state, harness.batch(i))
        expected = jax.device_get(
            update_ema(before.teacher, state.student, teacher_decay(before.step, 0, 0.99))
        )
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(state.teacher), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    # A weakly typed leaf in the first state would have the step compiled anew for the second.
    assert harness.step.func._cache_size() == 1


def test_student_and_teacher_start_equal_in_buffers_of_their_own():
    state = Harness(tiny_config()).init()
    for a, b in zip(jax.tree.leaves(state.student), jax.tree.leaves(state.teacher), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()


def test_the_gradient_is_that_of_the_unsupervised_loss_only_after_supervised_only():
    config = tiny_config(
        method__name="cutmix_mean_teacher",
        method__supervised_only=2,
        method__pseudo_label__threshold=0.0,
        train__steps=4,
    )
    harness = toy_harness(config)
    state = harness.init()
    for i in range(3):
        state, metrics = harness.step(state, harness.batch(i))
        weight = 0.0 if i < 2 else 1.0
        expected = metrics["loss_s"] + weight * metrics["loss_u"]
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
        assert metrics["loss_u"] > 0
        if i < 2:  # until then the teacher is the student
            for a, b in zip(
                jax.tree.leaves(state.student), jax.tree.leaves(state.teacher), strict=True
            ):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("parts", "has_bank"),
    [
        ({"memory_bank": False}, False),  # L_p alone
        ({"top_n": 0, "consistency": False, "enqueue_gate": "off"}, True),  # + bank
        ({"consistency": False, "enqueue_gate": "off"}, True),  # + TopN
        ({"bank_source": "teacher", "update_every": 2}, True),
    ],
)
def test_parts_of_csc_switch_on_one_by_one(parts, has_bank):
    config = tiny_config(**{f"contrast__{name}": value for name, value in parts.items()})
    harness = toy_harness(config)
    state = harness.init()
    assert (state.bank is not None) == has_bank
    for i in range(4):
        state, metrics = harness.step(state, harness.batch(i))
        assert metrics["loss_c"] > 0
        if not has_bank:
            continue
        if parts.get("consistency") is False:
            assert np.isnan(metrics["consistency_accepted"])
        if i >= 2 and parts.get("enqueue_gate") == "off":
            assert metrics["enqueue_accepted"] == 1.0
    if "update_every" in parts:  # steps 0 and 2 update, 1 and 3 do not
        assert np.isnan(metrics["enqueue_accepted"])


def test_contrast_starts_when_told():
    harness = toy_harness(tiny_config(contrast__start=2))
    state = harness.init()
    for i in range(4):
        state, metrics = harness.step(state, harness.batch(i))
        assert (metrics["loss_c"] > 0) == (i >= 2)
        assert (contrast.bank_fill(state.bank) > 0) == (i >= 2)


def test_ohem_and_auxiliary_head():
    config = tiny_config(
        method__name="supervised", loss__name="ohem", loss__ohem_min_kept=200, loss__aux_weight=0.4
    )
    harness = Harness(config)
    state = harness.init()
    before = jax.device_get(state.student.params["auxiliary"])
    state, metrics = harness.step(state, harness.batch(0))
    assert np.isfinite(metrics["loss"])
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(before), jax.tree.leaves(state.student.params["auxiliary"]), strict=True
        )
    ]
    assert any(changed)


def test_sgd_is_pytorchs_with_polynomial_decay_and_head_multiplier():
    config = tiny_config().optimizer
    config.name, config.learning_rate, config.weight_decay = "sgd", 0.1, 0.01
    config.head_multiplier = 10.0
    tx = make_optimizer(config, total_steps=10)
    params = {"backbone": {"w": jnp.array(1.0)}, "classifier": {"w": jnp.array(1.0)}}
    opt_state = tx.init(params)
    velocity, expected = 0.0, {"backbone": 1.0, "classifier": 1.0}
    velocity = dict.fromkeys(expected, 0.0)
    for t in range(3):
        gradients = jax.tree.map(lambda w: 2.0 * w, params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        params = jax.tree.map(lambda w, u: w + u, params, updates)
        rate = 0.1 * (1 - t / 10) ** 0.9
        for name, factor in (("backbone", 1.0), ("classifier", 10.0)):
            velocity[name] = 0.9 * velocity[name] + 2.0 * expected[name] + 0.01 * expected[name]
            expected[name] -= factor * rate * velocity[name]
    for name, value in expected.items():
        np.testing.assert_allclose(params[name]["w"], value, rtol=1e-5)


def test_the_rate_is_finite_beyond_the_last_step():
    """In one program with its count, optax's polynomial is NaN at 6 of 6 steps."""
    for steps in range(1, 50):
        rate = jax.jit(polynomial_decay(0.1, 0.9, steps))
        last = 0.1 * (1 / steps) ** 0.9
        np.testing.assert_allclose([rate(steps - 1), rate(steps), rate(steps + 1)], last, rtol=1e-4)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_compiled_ahead_is_the_step(devices):
    harness = toy_harness(tiny_config(method__name="supervised"), devices)
    state = train_step.abstract_state(harness.method, harness.tx, harness.mesh)
    ahead = train_step.compile_ahead(harness.step, state, abstract_batch(harness.config))
    results = []
    for step in (harness.step, ahead):
        state = harness.init()
        for i in range(2):
            state, metrics = step(state, harness.batch(i))
        results.append(jax.device_get((state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_step_compiled_ahead_takes_no_other_batch():
    harness = toy_harness(tiny_config(method__name="supervised"))
    ahead = train_step.compile_ahead(
        harness.step, jax.eval_shape(harness.init), abstract_batch(harness.config)
    )
    small = jax.tree.map(lambda x: x[:1], harness.batch(0))
    with pytest.raises(TypeError, match="labeled"):
        ahead(harness.init(), small)
