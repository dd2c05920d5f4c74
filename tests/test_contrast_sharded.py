"""The paper's module over several devices: equal results, and what goes over the wire."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from csc_jax import contrast
from csc_jax.parallel import sharding
from csc_jax.planning.hlo import Program

# Or a CPU's compiler takes out of a loop what other compilers leave in it.
AS_WRITTEN = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def module(maps, labels, predictions, bank, keys, *, views, new, top_n, with_bank=True):
    """Loss, its gradient by the maps, and the bank's update: all that a step does with them."""
    classes, _, dim = bank.features.shape
    images = maps.shape[0]

    def sample(key, features, labels, predictions):
        order_key, take_key = jax.random.split(key)
        order = contrast.order_by_class(order_key, labels, predictions, classes)
        queries = contrast.gather(features, *contrast.take_semi_hard(order, views))
        return queries, contrast.gather(features, *contrast.take_random(take_key, order, new))

    def loss(maps):
        queries, new = jax.vmap(sample)(keys, contrast.normalize(maps), labels, predictions)
        ids = jnp.broadcast_to(jnp.arange(classes)[None, :, None], queries.valid.shape)
        value = contrast.contrastive_loss(
            queries.features.reshape(-1, dim),
            ids.reshape(-1),
            queries.valid.reshape(-1),
            bank if with_bank else None,
            top_n=top_n,
        )
        return value, (queries, ids, new)

    (value, (queries, ids, new)), gradient = jax.value_and_grad(loss, has_aux=True)(maps)
    bank, _ = contrast.update_memory_bank(
        bank,
        queries.features.reshape(images, -1, dim),
        ids.reshape(images, -1),
        queries.valid.reshape(images, -1),
        new.features,
        new.valid,
    )
    return value, gradient, bank


def compiled(arguments, mesh, *, in_force=True, **constants):
    """Returns the module's program with all but the bank split over the mesh."""
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def function(*arguments):
        if not in_force:
            return module(*arguments, **constants)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return module(*arguments, **constants)

    places = (split, split, split, whole, split)
    jitted = jax.jit(function, in_shardings=places, out_shardings=(whole, split, whole))
    return jitted.lower(*arguments).compile(compiler_options=AS_WRITTEN)


IMAGES, PIXELS, DIM, CLASSES = 8, 32 * 32, 16, 3


@pytest.fixture(scope="module")
def arguments():
    rng = np.random.default_rng(0)
    bank = contrast.init_memory_bank(CLASSES, 10, DIM)
    entries = rng.normal(size=(1, CLASSES, 7, DIM)).astype(np.float32)
    bank = contrast.enqueue(bank, jnp.asarray(entries), jnp.ones((1, CLASSES, 7), bool))
    return (
        rng.normal(size=(IMAGES, PIXELS, DIM)).astype(np.float32),
        rng.integers(0, CLASSES, (IMAGES, PIXELS)),
        rng.integers(0, CLASSES, (IMAGES, PIXELS)),
        bank,
        jax.random.split(jax.random.key(0), IMAGES),
    )


@pytest.mark.parametrize(
    ("top_n", "with_bank"), [(None, True), (1, True), (3, True), (None, False), (1, False)]
)
def test_devices_equal_one(arguments, mesh1, top_n, with_bank):
    constants = {"views": 5, "new": 2, "top_n": top_n, "with_bank": with_bank}
    programs = [compiled(arguments, mesh1, **constants)]
    programs += [compiled(arguments, sharding.make_mesh(8, 2), **constants)]
    if top_n == 1:  # a loop that sets no mesh
        programs += [compiled(arguments, sharding.make_mesh(4), in_force=False, **constants)]
    expected, *others = (
        program(*jax.device_put(arguments, program.input_shardings[0])) for program in programs
    )
    for actual in others:
        for x, y in zip(*map(jax.tree.leaves, (expected, actual)), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [3, 21])
def test_queries_need_not_divide_by_the_devices(n):
    rng = np.random.default_rng(0)
    queries = contrast.normalize(jnp.asarray(rng.normal(size=(n, 4)), jnp.float32))
    labels, valid = jnp.arange(n) % 2, jnp.arange(n) != 1
    loss = jax.value_and_grad(contrast.contrastive_loss)
    expected = loss(queries, labels, valid, top_n=1)
    with jax.set_mesh(sharding.make_mesh(8)):
        actual = jax.jit(functools.partial(loss, top_n=1))(queries, labels, valid)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected)


def test_within_a_shard_map_the_loss_is_that_of_the_device():
    rng = np.random.default_rng(0)
    queries = contrast.normalize(jnp.asarray(rng.normal(size=(12, 4)), jnp.float32))
    labels, valid = jnp.arange(12) % 2, jnp.ones(12, bool)
    rows = PartitionSpec("data")
    with jax.set_mesh(sharding.make_mesh(2)):
        losses = jax.jit(
            jax.shard_map(
                lambda *mine: contrast.contrastive_loss(*mine)[None],
                in_specs=(rows, rows, rows),
                out_specs=rows,
                check_vma=False,
            )
        )(queries, labels, valid)
    halves = [slice(0, 6), slice(6, 12)]
    expected = [contrast.contrastive_loss(queries[i], labels[i], valid[i]) for i in halves]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize(("top_n", "with_bank"), [(1, True), (3, True), (None, True), (1, False)])
def test_what_crosses_grows_with_the_samples_alone(top_n, with_bank):
    """At sizes of many blocks: the samples cross once, and nothing does in a loop."""
    classes, dim, views, new, pixels = 19, 256, 50, 10, 64 * 64
    mesh, sent = sharding.make_mesh(8), {}
    for images in (16, 32):
        shapes = (
            jax.ShapeDtypeStruct((images, pixels, dim), jnp.float32),
            jax.ShapeDtypeStruct((images, pixels), jnp.int32),
            jax.ShapeDtypeStruct((images, pixels), jnp.int32),
            jax.eval_shape(lambda: contrast.init_memory_bank(classes, 2000, dim)),
            jax.eval_shape(lambda b=images: jax.random.split(jax.random.key(0), b)),
        )
        constants = {"views": views, "new": new, "top_n": top_n, "with_bank": with_bank}
        program = Program(compiled(shapes, mesh, **constants).as_text())
        collectives = program.collectives()
        assert not [each for each in collectives if each.in_loop]
        # A sample, and a few numbers that go with it.
        samples = images * classes * (views + new) * (dim + 8) * 4
        sent[images] = sum(each.bytes * each.times for each in collectives)
        assert 0.9 * samples < sent[images] < 1.02 * samples, sent[images] / samples
        turns = [each.times for each in program.executions if each.in_loop]
        assert max(turns) > 10  # blocks, so that a collective in a loop would have been seen
    assert sent[32] < 2.01 * sent[16]


def test_a_collective_in_a_loop_would_be_seen(mesh4):
    whole, split = (NamedSharding(mesh4, spec) for spec in (PartitionSpec(), PartitionSpec("data")))

    def total(x):
        return jax.lax.fori_loop(0, 5, lambda _, t: jnp.sum(x * t), 1.0)

    program = jax.jit(total, in_shardings=split, out_shardings=whole).lower(jnp.zeros(4000))
    text = program.compile(compiler_options=AS_WRITTEN).as_text()
    assert sum(each.times for each in Program(text).collectives() if each.in_loop) >= 5
