"""Batch normalisation as pure functions; `layers.BatchNorm` holds its variables.

All are jitted, so that JAX traces each once for all layers of a shape.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Statistics = tuple[jax.Array, jax.Array]  # mean and variance, (K,) float32 each


@partial(jax.jit, static_argnames=("epsilon", "dtype"))
def normalize(
    x: jax.Array,
    statistics: Statistics,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    dtype: Any,
) -> jax.Array:
    """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias.

    Args:
      x: (..., K).
      statistics: of each of the K channels.
      scale: (K,) float32.
      bias: (K,) float32.
      epsilon: added to the variance.
      dtype: of the result; the inside is float32.
    """
    mean, variance = statistics
    factor = jax.lax.rsqrt(variance + epsilon) * scale
    return ((x - _row(x, mean)) * _row(x, factor) + _row(x, bias)).astype(dtype)


@partial(jax.jit, static_argnames=("epsilon", "dtype"))
def batch_normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, dtype: Any
) -> tuple[jax.Array, Statistics]:
    """Returns `normalize` by the statistics of `x` itself, and these, the variance biased.

    The gradient goes through the first alone.
    """
    y, statistics = _batch_normalize(x, scale, bias, epsilon, dtype)
    return y, jax.lax.stop_gradient(statistics)


@partial(jax.jit, static_argnames="momentum")
def update_running(
    running: Statistics, now: Statistics, pixels: jax.Array | int, *, momentum: float
) -> Statistics:
    """Returns running statistics that have seen a batch: momentum * running + (1 - momentum) * now.

    Args:
      running: before, the variance unbiased as PyTorch's.
      now: of the batch, the variance biased.
      pixels: n that `now` was taken over.
      momentum: 0.9 is PyTorch's 0.1.
    """
    mean, variance = now
    unbiased = variance * (pixels / jnp.maximum(pixels - 1, 1))
    return (
        momentum * running[0] + (1 - momentum) * mean,
        momentum * running[1] + (1 - momentum) * unbiased,
    )


# JAX's own gradient reads a map more often. With a ReLU, forward and backward took 12.5 ms in place
# of 22.7 for (2, 81, 81, 256), 4.5 in place of 14 for (2, 161, 161, 64), on 2 CPU cores.
@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> tuple[jax.Array, Statistics]:
    axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.float32)
    mean = jnp.mean(wide, axes)
    variance = jnp.maximum(jnp.mean(wide * wide, axes) - mean * mean, 0.0)
    y = normalize(x, (mean, variance), scale, bias, epsilon=epsilon, dtype=dtype)
    return y, (mean, variance)


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> tuple[tuple[jax.Array, Statistics], tuple[jax.Array, jax.Array, Statistics]]:
    y, statistics = _batch_normalize(x, scale, bias, epsilon, dtype)
    return (y, statistics), (x, scale, statistics)


def _backward(
    epsilon: float,
    dtype: Any,
    residuals: tuple[jax.Array, jax.Array, Statistics],
    gradients: tuple[jax.Array, Statistics],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, (mean, variance) = residuals
    axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    wide, gradient = x.astype(jnp.float32), gradients[0].astype(jnp.float32)
    inverse = jax.lax.rsqrt(variance + epsilon)
    by_bias = jnp.sum(gradient, axes)
    by_scale = (jnp.sum(gradient * wide, axes) - mean * by_bias) * inverse
    # scale * inverse * (gradient - (by_bias + (x - mean) * inverse * by_scale) / n), as one pass
    factor = scale * inverse
    slope = -factor * inverse * by_scale / n
    offset = -factor * by_bias / n - mean * slope
    by_x = gradient * _row(x, factor) + wide * _row(x, slope) + _row(x, offset)
    return by_x.astype(x.dtype), by_scale, by_bias


_batch_normalize.defvjp(_forward, _backward)


def _row(x: jax.Array, vector: jax.Array) -> jax.Array:
    """(K,) with the rank of `x`."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
