"""The paper's module over several devices: equal results, and no feature map on the wire."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from csc_jax import contrast

IMAGES, PIXELS, DIM, CLASSES, VIEWS, NEW = 8, 32 * 32, 16, 3, 4, 2


def module(maps, labels, predictions, bank, keys, top_n):
    """Loss, its gradient by the maps, and the bank's update: all that a step does with them."""

    def sample(key, features, labels, predictions):
        order_key, take_key = jax.random.split(key)
        order = contrast.order_by_class(order_key, labels, predictions, CLASSES)
        queries = contrast.gather(features, *contrast.take_semi_hard(order, VIEWS))
        return queries, contrast.gather(features, *contrast.take_random(take_key, order, NEW))

    def loss(maps):
        queries, new = jax.vmap(sample)(keys, contrast.normalize(maps), labels, predictions)
        ids = jnp.broadcast_to(jnp.arange(CLASSES)[None, :, None], queries.valid.shape)
        value = contrast.contrastive_loss(
            queries.features.reshape(-1, DIM),
            ids.reshape(-1),
            queries.valid.reshape(-1),
            bank,
            top_n=top_n,
        )
        return value, (queries, ids, new)

    (value, (queries, ids, new)), gradient = jax.value_and_grad(loss, has_aux=True)(maps)
    bank, _ = contrast.update_memory_bank(
        bank,
        queries.features.reshape(IMAGES, -1, DIM),
        ids.reshape(IMAGES, -1),
        queries.valid.reshape(IMAGES, -1),
        new.features,
        new.valid,
    )
    return value, gradient, bank


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


def compiled(arguments, mesh, top_n):
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    return (
        jax.jit(
            lambda *args: module(*args, top_n),
            in_shardings=(split, split, split, whole, split),
            out_shardings=(whole, split, whole),
        )
        .lower(*arguments)
        .compile()
    )


@pytest.mark.parametrize("top_n", [None, 1])
def test_four_devices_equal_one_and_exchange_no_map(arguments, mesh1, mesh4, top_n):
    one, four = (compiled(arguments, mesh, top_n) for mesh in (mesh1, mesh4))
    results = [
        program(*jax.device_put(arguments, program.input_shardings[0])) for program in (one, four)
    ]
    for expected, actual in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

    exchanged = sizes_of_collectives(four.as_text())
    assert exchanged  # the samples do travel
    # Samples: 8 images x 3 classes x 4 views x 16 numbers; one image's map alone is 1024 x 16.
    assert max(exchanged) <= IMAGES * CLASSES * VIEWS * DIM
    assert max(exchanged) < PIXELS * DIM


def sizes_of_collectives(program: str) -> list[int]:
    """Returns how many elements each collective operation of a compiled program yields."""
    sizes = []
    for line in program.splitlines():
        name = r"(all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast)"
        match = re.search(rf"= (.*?) {name}(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes += [math.prod(int(d) for d in shape.split(",") if d) for shape in shapes]
    return sizes


def test_a_map_on_the_wire_would_be_seen(mesh4):
    whole, split = (NamedSharding(mesh4, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    gather = jax.jit(lambda x: x + 1, in_shardings=split, out_shardings=whole)
    program = gather.lower(jnp.zeros((IMAGES, PIXELS, DIM))).compile()
    assert max(sizes_of_collectives(program.as_text())) >= IMAGES * PIXELS * DIM
