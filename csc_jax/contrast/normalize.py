"""Unit-length feature vectors."""

import jax.numpy as jnp
from jax import Array


def normalize(x: Array, epsilon: float = 1e-12) -> Array:
    """Scales the last axis of `x` (..., D) to length 1; zero stays zero and has a finite gradient.

    `sqrt` has no finite derivative at 0, so the length is floored before the root, not after it.
    """
    x = x.astype(jnp.float32)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squared, epsilon**2))
