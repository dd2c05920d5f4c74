"""What the tests of the paper's module share."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from csc_jax import contrast

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
