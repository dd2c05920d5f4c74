"""Unit-length feature vectors."""

import jax
import jax.numpy as jnp
from jax import Array


def normalize(x: Array, epsilon: float = 1e-12) -> Array:
    """Scales the last axis of `x` (..., D) to length 1; shorter than `epsilon` becomes zero.

    The gradient of such a vector is zero, too: it has no direction, and a floor under its length
    would give it a gradient of 1 / epsilon, which plain SGD does not survive.
    """
    x = x.astype(jnp.float32)
    return x * inverse_length(x, epsilon)[..., None]


def inverse_length(x: Array, epsilon: float = 1e-12) -> Array:
    """Returns what `normalize` multiplies `x` (..., D) float32 by, (...)."""
    squared = jnp.sum(x * x, axis=-1)
    long = squared > epsilon**2
    scale = jax.lax.rsqrt(jnp.where(long, squared, 1.0))  # finite where it is not used
    return jnp.where(long, scale, 0.0)
