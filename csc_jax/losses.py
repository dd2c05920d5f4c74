"""Per-pixel losses on logits: cross entropy and online hard example mining."""

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.parallel.order_statistics import kth_smallest

IGNORE = 255  # label of a pixel that counts in no loss and no score (lineage)


def valid_pixels(labels: Array, num_classes: int) -> Array:
    """Returns a bool mask, shaped like `labels`: which hold a class id in [0, C)."""
    return (labels >= 0) & (labels < num_classes)


def pixel_cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns -log p(label) of each pixel, (...,) float32, 0 where the label is ignored.

    Args:
      logits: (..., C) float.
      labels: (...,) int; outside [0, C) counts as ignored.
    """
    valid = valid_pixels(labels, logits.shape[-1])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    index = jnp.where(valid, labels, 0).astype(jnp.int32)
    chosen = jnp.take_along_axis(log_p, index[..., None], axis=-1)[..., 0]
    return jnp.where(valid, -chosen, 0.0)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the mean cross entropy over labelled pixels (Eq. 2), () float32; 0 without any.

    Args:
      logits: (..., C) float.
      labels: (...,) int; outside [0, C) counts as ignored.
    """
    count = jnp.sum(valid_pixels(labels, logits.shape[-1]))
    return jnp.sum(pixel_cross_entropy(logits, labels)) / jnp.maximum(count, 1)


def ohem_cross_entropy(
    logits: Array, labels: Array, *, threshold: float | Array = 0.7, min_kept: int = 100_000
) -> Array:
    """Returns the mean cross entropy over the hard pixels (decisions.md 21), () float32.

    A labelled pixel is hard where its true class has a probability of at most `threshold`, or of
    at most the `min_kept`-th smallest one in the batch if that is larger. With fewer than
    `min_kept` labelled pixels all of them count.

    Args:
      logits: (..., C) float.
      labels: (...,) int; outside [0, C) counts as ignored.
      threshold: probability.
      min_kept: pixels of the batch kept at least.
    """
    valid = valid_pixels(labels, logits.shape[-1])
    loss = pixel_cross_entropy(logits, labels)
    # Ignored pixels come last.
    probability = jax.lax.stop_gradient(jnp.where(valid, jnp.exp(-loss), 1.0))
    limit = kth_smallest(probability, min(min_kept, probability.size) - 1)
    enough = jnp.sum(valid) >= min_kept
    kept = valid & ((probability <= jnp.maximum(limit, threshold)) | ~enough)
    return jnp.sum(jnp.where(kept, loss, 0.0)) / jnp.maximum(jnp.sum(kept), 1)


def unsupervised_cross_entropy(logits: Array, labels: Array, counted: Array) -> Array:
    """Returns cross entropy on pseudo-labels, averaged over all `counted` pixels, () float32.

    Pixels that the mask M drops count as zeros, so a batch with few confident pixels has little
    weight (UniMatch's code; decisions.md 13a, "all"). `cross_entropy` averages over the kept ones.

    Args:
      logits: (..., C) float, the student's on the strong view.
      labels: (...,) int, 255 where M = 0.
      counted: (...,) bool, False on padding.
    """
    loss = jnp.where(counted, pixel_cross_entropy(logits, labels), 0.0)
    return jnp.sum(loss) / jnp.maximum(jnp.sum(counted), 1)


def reweighted_cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns U2PL's L_u, () float32: mean cross entropy of the kept pixels x all / kept pixels.

    Args:
      logits: (B, H, W, C) float.
      labels: (B, H, W) int, 255 where dropped. Without a kept pixel the loss is 0.
    """
    kept = jnp.sum(valid_pixels(labels, logits.shape[-1]))
    return cross_entropy(logits, labels) * labels.size / jnp.maximum(kept, 1)
