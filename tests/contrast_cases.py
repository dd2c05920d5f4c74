"""What the tests of the paper's module share."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from csc_jax import contrast
from csc_jax.parallel import sharding

GOLDEN = sorted((Path(__file__).parent / "golden" / "contrast").glob("*.npz"))


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


def golden_bank(golden: dict[str, np.ndarray]) -> contrast.MemoryBank:
    count = jnp.asarray(golden["count"], jnp.int32)
    return contrast.MemoryBank(
        jnp.asarray(golden["bank"]), count, jnp.zeros_like(count), jnp.float32(jnp.inf)
    )


# Or a CPU's compiler takes out of a loop what other compilers leave in it.
AS_WRITTEN = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def module(maps, labels, predictions, bank, keys, *, views, new, top_n, with_bank=True, max_keys=0):
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
            max_keys=max_keys,
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


def compiled_module(arguments, mesh, *, in_force=True, **constants):
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
