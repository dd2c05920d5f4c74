"""Pseudo-labels and their binary mask M (Eq. 4, decisions.md 13)."""

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from csc_jax.losses import IGNORE, valid_pixels
from csc_jax.parallel import order_statistics

MODES = ("adaptive", "entropy", "confidence")


def pseudo_labels(
    key: Array,
    probabilities: Array,
    counted: Array,
    class_confidence: Array,
    progress: Array,
    config: ConfigDict,
) -> Array:
    """Returns the teacher's most likely classes, 255 where M = 0; shaped (B, H, W), int32.

    Args:
      key: random key, for the "adaptive" draw.
      probabilities: (B, H, W, C) float32, the teacher's softmax on the weak view (Eq. 4b).
      counted: (B, H, W) bool, False on padding, which never gets a pseudo-label.
      class_confidence: (C,) float32, see `update_class_confidence`; read in mode "adaptive".
      progress: () float32 in [0, 1], share of training done; read in mode "entropy".
      config: `config.method.pseudo_label`.
    """
    labels = jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
    top = jnp.max(probabilities, axis=-1)
    if config.mode == "confidence":
        kept = top >= config.threshold
    elif config.mode == "adaptive":
        rate = jnp.maximum(keep_rate(class_confidence, config.gamma), config.floor)[labels]
        kept = (jax.random.uniform(key, labels.shape) < rate) & (top >= config.threshold)
    else:
        kept = _low_entropy(probabilities, counted, progress, config.percentile)
    return jnp.where(kept & counted, labels, IGNORE)


def keep_rate(class_confidence: Array, gamma: float) -> Array:
    """Returns r_c = ((1 - conf_c) / max_k(1 - conf_k))^gamma, (C,): near 1 for rare classes."""
    doubt = 1.0 - class_confidence
    return (doubt / jnp.maximum(jnp.max(doubt), 1e-6)) ** gamma


def update_class_confidence(
    class_confidence: Array, logits: Array, labels: Array, decay: float
) -> Array:
    """Moves the class-wise confidence bank towards a labelled batch; (C,) float32.

    The target of class c is the student's mean softmax probability of c over the labelled pixels
    of c; a class absent from the batch is left alone.

    Args:
      class_confidence: (C,) float32 in [0, 1].
      logits: (B, h, w, C) float, the student's on labelled images.
      labels: (B, h, w) int ground truth at the same resolution.
      decay: of the exponential moving average.
    """
    num_classes = logits.shape[-1]
    member = jax.nn.one_hot(labels, num_classes) * valid_pixels(labels, num_classes)[..., None]
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    axes = tuple(range(labels.ndim))
    count = jnp.sum(member, axis=axes)
    mean = jnp.sum(member * probability, axis=axes) / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, decay * class_confidence + (1.0 - decay) * mean, class_confidence)


def _low_entropy(
    probabilities: Array, counted: Array, progress: Array, percentile: tuple[float, float]
) -> Array:
    """True below the p-th percentile of the entropy over `counted` pixels, p linear in progress."""
    entropy = -jnp.sum(probabilities * jnp.log(probabilities + 1e-10), axis=-1)
    first, last = percentile
    p = first + (last - first) * progress
    return entropy < order_statistics.percentile(entropy, counted, p)
