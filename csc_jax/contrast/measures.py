"""The paper's two measures: Separ of the bank (Eq. 9) and Cons of an image's features (Eq. 7)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.contrast import loops
from csc_jax.contrast.bank import Change, MemoryBank
from csc_jax.contrast.normalize import normalize


def class_means(bank: MemoryBank, change: Change | None = None) -> Array:
    """Returns (C, D) float32, the normalised mean entry of each class (Eq. 9b); zero when empty.

    Args:
      bank: the bank.
      change: where given, the means are those of the bank after it, in the memory of one class.
    """
    count = bank.count if change is None else change.count

    def mean(one: tuple[Array, Array, Any]) -> Array:
        entries, count, data = one  # (S, D), (), of one class
        if change is not None:
            entries = change.entries(entries, data)
        occupied = jnp.arange(entries.shape[0]) < count
        total = jnp.sum(jnp.where(occupied[:, None], entries, 0.0), axis=0)
        return normalize(total / jnp.maximum(count, 1).astype(jnp.float32))

    data = () if change is None else change.data
    means: Array = loops.each_class(mean, (bank.features, count, data))
    return means


def separation(bank: MemoryBank, change: Change | None = None) -> Array:
    """Returns Separ (Eq. 9a), () float32 in [0, 2 C^2 - C]; smaller means better separated.

    The sum runs over all pairs of the Gram matrix, the diagonal included, and V = C(C-1)
    (decisions.md 3). For `change` see `class_means`.
    """
    means = class_means(bank, change)
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
