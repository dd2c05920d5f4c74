"""The paper's module over several devices: equal results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contrast_cases import compiled_module
from jax.sharding import PartitionSpec

from csc_jax import contrast
from csc_jax.parallel import sharding

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
    programs = [compiled_module(arguments, mesh1, **constants)]
    programs += [compiled_module(arguments, sharding.make_mesh(8, 2), **constants)]
    if top_n == 1:  # a loop that sets no mesh
        programs += [compiled_module(arguments, sharding.make_mesh(4), in_force=False, **constants)]
    expected, *others = (
        program(*jax.device_put(arguments, program.input_shardings[0])) for program in programs
    )
    for actual in others:
        for x, y in zip(*map(jax.tree.leaves, (expected, actual)), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "max_keys"), [(3, 0), (21, 0), (21, 2), (21, 13), (24, 8)])
def test_queries_and_keys_need_not_divide_by_the_devices(n, max_keys):
    rng = np.random.default_rng(0)
    queries = contrast.normalize(jnp.asarray(rng.normal(size=(n, 4)), jnp.float32))
    labels, valid = jnp.arange(n) % 2, jnp.arange(n) != 1
    loss = jax.value_and_grad(
        functools.partial(contrast.contrastive_loss, top_n=1, max_keys=max_keys)
    )
    expected = loss(queries, labels, valid)
    with jax.set_mesh(sharding.make_mesh(8)):
        actual = jax.jit(loss)(queries, labels, valid)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected
    )


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
