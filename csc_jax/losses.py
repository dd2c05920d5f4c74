"""Losses on logits: cross entropy, focal loss, online hard example mining, soft Dice."""

from collections.abc import Sequence

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


def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    class_weights: Sequence[float] = (),
    focal_gamma: float = 0.0,
) -> Array:
    """Returns the mean cross entropy over labelled pixels (Eq. 2), () float32; 0 without any.

    With `class_weights` it is sum w l / sum w over the pixels, as in PyTorch's
    `CrossEntropyLoss(weight)`; with `focal_gamma` l = -(1 - p)^gamma log p of the true class, the
    focal loss of Lin et al. (ICCV 2017), Eq. 4 and with weights Eq. 5.

    Args:
      logits: (..., C) float.
      labels: (...,) int; outside [0, C) counts as ignored.
      class_weights: C numbers >= 0; () = all alike.
      focal_gamma: >= 0; 0 = cross entropy.
    """
    loss = pixel_cross_entropy(logits, labels)
    if focal_gamma:
        # Where p is 1, to float32, the power has no finite gradient for a gamma below 1.
        missing = -jnp.expm1(-loss)  # 1 - p, which keeps its digits
        imperfect = missing > 0
        factor = jnp.where(imperfect, missing, 1.0) ** focal_gamma
        loss = jnp.where(imperfect, factor * loss, 0.0)
    return _mean(loss, labels, valid_pixels(labels, logits.shape[-1]), class_weights)


def _mean(loss: Array, labels: Array, counted: Array, class_weights: Sequence[float]) -> Array:
    """Returns the mean over the pixels `counted`, all (...,), weighted by class; 0 without any."""
    loss = jnp.where(counted, loss, 0.0)
    if not len(class_weights):
        return jnp.sum(loss) / jnp.maximum(jnp.sum(counted), 1)
    of_class = jnp.asarray(class_weights, jnp.float32)
    weights = jnp.where(counted, of_class[jnp.where(counted, labels, 0).astype(jnp.int32)], 0.0)
    whole = jnp.sum(weights)
    return jnp.sum(weights * loss) / jnp.where(whole > 0, whole, 1.0)


def dice_loss(logits: Array, labels: Array) -> Array:
    """Returns 1 - the mean soft Dice coefficient, () float32 in [0, 1]; 0 without a labelled pixel.

    Of class c it is 2 sum p_c y_c / (sum p_c + sum y_c) over all labelled pixels of the batch
    (Milletari et al., 3DV 2016, with the plain sum of p_c in place of its squares); the mean runs
    over the classes that a label holds. So each class counts alike, however few its pixels.

    Args:
      logits: (..., C) float.
      labels: (...,) int; outside [0, C) counts as ignored.
    """
    classes = logits.shape[-1]
    valid = valid_pixels(labels, classes)[..., None]
    axes = tuple(range(labels.ndim))
    p = jnp.where(valid, jax.nn.softmax(logits.astype(jnp.float32)), 0.0)
    y = jnp.where(valid, jax.nn.one_hot(labels, classes), 0.0)
    truth = jnp.sum(y, axes)
    dice = 2 * jnp.sum(p * y, axes) / jnp.maximum(jnp.sum(p, axes) + truth, 1.0)
    present = truth > 0  # the denominator of such a class is at least 1
    return jnp.sum(jnp.where(present, 1 - dice, 0.0)) / jnp.maximum(jnp.sum(present), 1)


def ohem_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    threshold: float | Array = 0.7,
    min_kept: int = 100_000,
    class_weights: Sequence[float] = (),
) -> Array:
    """Returns the mean cross entropy over the hard pixels (decisions.md 21), () float32.

    A labelled pixel is hard where its true class has a probability of at most `threshold`, or of
    at most the `min_kept`-th smallest one in the batch if that is larger. With fewer than
    `min_kept` labelled pixels all of them count. `class_weights` choose no pixels; they weigh those
    that are kept, as in `cross_entropy`.

    Args:
      logits: (..., C) float.
      labels: (...,) int; outside [0, C) counts as ignored.
      threshold: probability.
      min_kept: pixels of the batch kept at least.
      class_weights: C numbers >= 0; () = all alike.
    """
    valid = valid_pixels(labels, logits.shape[-1])
    loss = pixel_cross_entropy(logits, labels)
    # Ignored pixels come last.
    probability = jax.lax.stop_gradient(jnp.where(valid, jnp.exp(-loss), 1.0))
    limit = kth_smallest(probability, min(min_kept, probability.size) - 1)
    enough = jnp.sum(valid) >= min_kept
    kept = valid & ((probability <= jnp.maximum(limit, threshold)) | ~enough)
    return _mean(loss, labels, kept, class_weights)


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
