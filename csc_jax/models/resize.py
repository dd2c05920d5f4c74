"""Bilinear resizing with aligned corners, the only kind in the lineage (decisions.md)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def resize_aligned(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes feature maps (B, h, w, K) to (B, H, W, K), `size` being (H, W).

    The centres of the corner pixels of input and output coincide, as in PyTorch's
    `F.interpolate(mode="bilinear", align_corners=True)`. Computes in float32 and returns the
    dtype of `x` (any floating type); an equal size returns `x` itself. Sizes may be symbolic
    dimensions of `jax.export`.
    """
    height, width = size
    y = x.astype(jnp.float32)
    # Two matrix products compile to less and differentiate faster than a gather. "highest" keeps
    # accelerators from rounding the operands to TF32 or bfloat16.
    if height != x.shape[1]:
        y = jnp.einsum("Hh,bhwk->bHwk", _weights(x.shape[1], height), y, precision="highest")
    if width != x.shape[2]:
        y = jnp.einsum("Ww,bhwk->bhWk", _weights(x.shape[2], width), y, precision="highest")
    return y.astype(x.dtype)


def nearest_multiple(size: Any, patch: int) -> Any:
    """Returns sides, int or int array in px, at the nearest multiple of a patch, at least one.

    Halfway between two it is the larger (UniMatch V2's evaluation).
    """
    patches = (size + patch // 2) // patch
    return patch * (max(patches, 1) if isinstance(size, int) else patches.clip(1))


def _weights(n_in: int, n_out: int) -> np.ndarray | jax.Array:
    """Interpolation matrix (n_out, n_in), float32; each row sums to 1."""
    sides: tuple[object, object] = n_in, n_out
    if not all(isinstance(side, int) for side in sides):
        # Symbolic: whole pixels in integers, as no device divides floats exactly.
        last, steps = jnp.asarray(n_in - 1), jnp.maximum(jnp.asarray(n_out - 1), 1)
        below, rest = jnp.divmod(jnp.arange(n_out) * last, steps)
        offset = below[:, None] - jnp.arange(n_in)[None, :]
        traced = jnp.abs(offset + (rest / steps)[:, None])
        return jnp.maximum(0.0, 1.0 - traced).astype(jnp.float32)
    position = np.linspace(0.0, n_in - 1, n_out)  # in input pixels; a single output pixel sits at 0
    distance = np.abs(position[:, None] - np.arange(n_in)[None, :])
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)
