"""The paper's two measures: Separ of the bank (Eq. 9) and Cons of an image's features (Eq. 7)."""

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.contrast.bank import MemoryBank
from csc_jax.contrast.normalize import normalize


def class_means(bank: MemoryBank) -> Array:
    """Returns (C, D) float32, the normalised mean entry of each class (Eq. 9b); zero when empty."""
    return normalize(class_sums(bank))


def class_sums(bank: MemoryBank) -> Array:
    """Returns the sum of each class's entries, (C, D) float32."""
    return jnp.sum(bank.features, axis=1)  # free ones are zero


def separation(bank: MemoryBank) -> Array:
    """Returns Separ (Eq. 9a), () float32 in [0, 2 C^2 - C]; smaller means better separated.

    The sum runs over all pairs of the Gram matrix, the diagonal included, and V = C(C-1)
    (decisions.md 3).
    """
    return separation_of(class_sums(bank))


def separation_of(sums: Array) -> Array:
    """Returns Separ of a bank whose `class_sums` are given, (C, D)."""
    means = normalize(sums)  # a mean has the direction of its sum
    # Sum of a Gram matrix = squared length of the sum of its vectors: C x D work, not C x C x D.
    total = jnp.sum(means, axis=0)
    num_classes = means.shape[0]
    return jnp.sum(total * total) + num_classes * (num_classes - 1)


def consistency(now: Array, then: Array, mask: Array | None = None) -> Array:
    """Returns Cons (Eq. 7): mean cosine similarity of two feature maps, pixel by pixel.

    Args:
      now: (..., D), an image's features.
      then: (..., D), the same image's features T steps earlier.
      mask: (...) bool, which pixels count; all by default.

    Returns:
      () float32 in [-1, 1], higher is more consistent (decisions.md 15); 0 where no pixel counts.
    """
    if now.shape != then.shape:
        raise ValueError(f"feature maps must be of one shape, got {now.shape} and {then.shape}")
    cosine = jnp.sum(normalize(now) * normalize(then), axis=-1)
    weight = jnp.ones(cosine.shape) if mask is None else mask.astype(jnp.float32)
    return jnp.sum(cosine * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def class_separation(bank: MemoryBank) -> Array:
    """Returns (C,) float32: a class mean's mean cosine similarity to the others' (Fig. 4)."""
    means = class_means(bank)
    gram = jnp.matmul(means, means.T, precision=jax.lax.Precision.HIGHEST)
    others = jnp.sum(gram, axis=1) - jnp.diagonal(gram)
    return others / max(means.shape[0] - 1, 1)
