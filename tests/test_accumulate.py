"""`train.accumulate`: a batch in parts gives the gradient and the bank of a whole one."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny import CLASSES, tiny_config
from toy_network import toy_batch, toy_harness, toy_method

from csc_jax import config as config_lib
from csc_jax import methods
from csc_jax.errors import UserError
from csc_jax.methods.base import Task
from csc_jax.models import Outputs
from csc_jax.optimizer import combine
from csc_jax.parallel import sharding
from csc_jax.training.accumulate import accumulated
from csc_jax.training.step import compile_init, train_step

PARTS = 2
SIZE = (4, 32, 32)


def in_parts(method, parts, state, batch, key):
    """Returns what `accumulated` makes of a method's loss."""

    def loss(params, state, batch, key):
        return method.loss(params, state, batch, key)

    grad = jax.value_and_grad(loss, has_aux=True)
    return accumulated(grad, parts, state.trained, state, batch, key)


class WithoutBatchNorm(nn.Module):
    """Two convolutions, of which each image has its own result."""

    num_classes: int
    bands: int = 3

    def logits_size(self, size):
        return size // 4

    @nn.compact
    def __call__(self, x, train, projection=True, perturb=None):
        del train, projection, perturb

        deep = nn.relu(nn.Conv(8, (4, 4), (4, 4), name="body")(x))
        return Outputs(nn.Conv(self.num_classes, (3, 3), name="classifier")(deep), None, None, deep)


def without_batch_norm():
    config = config_lib.resolve(tiny_config(method__name="supervised"), steps_per_epoch=4)
    task = Task(config, WithoutBatchNorm(CLASSES), CLASSES, config.train.steps)
    method = methods.build(task)
    return method, compile_init(method, combine(method.optimizers()), sharding.make_mesh(1))()


@pytest.mark.parametrize("parts", [2, 4])
def test_without_batch_norm_the_parts_make_the_whole(parts):
    method, state = without_batch_norm()
    batch, key = toy_batch(size=SIZE), jax.random.key(0)
    grad = jax.value_and_grad(method.loss, has_aux=True)
    (loss, outputs), gradients = jax.jit(grad)(state.trained, state, batch, key)
    run = jax.jit(lambda *given: in_parts(method, parts, *given))
    (of_parts, outputs_of_parts), gradients_of_parts = run(state, batch, key)
    np.testing.assert_allclose(of_parts, loss, rtol=1e-6)
    np.testing.assert_allclose(outputs_of_parts.metrics["loss_s"], outputs.metrics["loss_s"], 1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        gradients_of_parts,
        gradients,
    )


def test_each_part_has_other_images_and_all_are_seen():
    method, state = without_batch_norm()
    batch = toy_batch(size=SIZE)
    halves = {  # one image a part: its loss alone
        i: jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)
    }
    loss = jax.jit(method.loss)
    alone = [loss(state.trained, state, halves[i], jax.random.key(0))[0] for i in range(4)]
    assert len(set(map(float, alone))) == 4
    (total, _), _ = in_parts(method, 4, state, batch, jax.random.key(0))
    np.testing.assert_allclose(total, np.mean(alone), rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in methods.available() if n != "u2pl"])
def test_every_method_steps_with_the_shapes_of_a_whole_batch(name):
    method, state = toy_method(method__name=name, model__projection_dim=4, train__accumulate=PARTS)
    tx, batch = combine(method.optimizers()), toy_batch(size=SIZE)
    whole, _ = toy_method(method__name=name, model__projection_dim=4)
    key = jax.random.key(0)
    outputs = jax.eval_shape(lambda: whole.loss(state.trained, state, batch, key)[1])
    of_parts = jax.eval_shape(lambda: in_parts(method, PARTS, state, batch, key)[0][1])
    forms = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), x) for x in (outputs, of_parts)]
    assert forms[0] == forms[1]
    after, _ = jax.eval_shape(lambda: train_step(method, tx, 0, state, batch))
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_the_bank_sees_all_parts_once_and_the_teacher_follows_once():
    harness = toy_harness(tiny_config(train__accumulate=PARTS, contrast__bank_size=1000), devices=4)
    one = toy_harness(tiny_config(train__accumulate=PARTS, contrast__bank_size=1000))
    batch = toy_batch(size=(8, 32, 32))
    states = []
    for each in (harness, one):
        state = each.init()
        for _ in range(2):
            state, metrics = each.step(state, sharding.shard_batch(batch, each.mesh))
        states.append(jax.device_get((state, metrics)))
    (state, metrics), (alone, _) = states
    # Ground truth alone gives every class of each of 8 labelled images two pixels a step.
    assert np.all(state.bank.count >= 2 * 8 * 2)
    assert np.all(state.bank.count <= 2 * 16 * 2)
    assert metrics["loss_c"] > 0
    assert int(state.step) == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        (state.student, state.teacher, state.bank),
        (alone.student, alone.teacher, alone.bank),
    )


def test_u2pl_is_refused_by_name():
    with pytest.raises(UserError, match=r"train\.accumulate is 2, but u2pl needs"):
        toy_method(method__name="u2pl", train__accumulate=2)
    with pytest.raises(UserError, match=r"u2pl needs"):
        toy_method(method__name="u2pl", method__contrast="csc", train__accumulate=2)


def test_parts_that_do_not_divide_the_batch_are_refused():
    config = tiny_config(train__accumulate=3, batch__labeled=6, batch__unlabeled=8)
    with pytest.raises(UserError, match=r"batch\.unlabeled is 8, .*accumulate = 3 parts"):
        sharding.check_batch_sizes(config, sharding.make_mesh(1))


def test_the_rate_is_scaled_once_and_only_where_asked():
    fields = {"optimizer__learning_rate": 0.5, "optimizer__recipe_batch": 8, "batch__labeled": 2}
    plain = config_lib.resolve(tiny_config(**fields), steps_per_epoch=4)
    assert plain.optimizer.learning_rate == 0.5
    scaled = config_lib.resolve(
        tiny_config(**fields, optimizer__scale_rate=True), steps_per_epoch=4
    )
    assert scaled.optimizer.learning_rate == 0.125
    assert config_lib.resolve(scaled, steps_per_epoch=4) == scaled


def test_a_recipe_without_batch_cannot_be_scaled():
    with pytest.raises(UserError, match=r"recipe_batch is 0"):
        tiny_config(optimizer__scale_rate=True)
