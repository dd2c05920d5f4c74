"""What several methods do alike."""

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from csc_jax import augment, losses
from csc_jax.methods.base import Pixels, Task
from csc_jax.models import Outputs, resize_aligned
from csc_jax.state import TrainState


def ramp_up(step: Array, start: int, length: float) -> Array:
    """Returns exp(-5 (1 - x)^2) with x from 0 at `start` to 1 after `length` steps; before it 0.

    The sigmoid-shaped weight of Laine and Aila (2017) that mean_teacher, cct and gct share.
    """
    x = jnp.clip((step - start) / length, 0.0, 1.0) if length else jnp.ones(())
    return jnp.where(step >= start, jnp.exp(-5.0 * (1.0 - x) ** 2), 0.0)


def consistency(logits: Array, target: Array, counted: Array) -> Array:
    """Returns the mean squared difference of the softmax from `target`, () float32.

    Args:
      logits: (B, h, w, C).
      target: (B, h, w, C) probabilities, taken as constant.
      counted: (B, h, w) bool; the mean runs over these pixels and all classes.
    """
    difference = jax.nn.softmax(logits) - jax.lax.stop_gradient(target)
    return masked_mean(jnp.mean(difference**2, axis=-1), counted)


def masked_mean(x: Array, counted: Array) -> Array:
    """Returns the mean of x over the pixels `counted`, both (B, h, w); 0 without any."""
    return jnp.sum(jnp.where(counted, x, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def likeliest(probabilities: Array, inside: Array, threshold: float = 0.0) -> Array:
    """Returns the arg max of (B, H, W, C) as (B, H, W) int32, 255 below `threshold` or outside.

    A method that teaches with every pixel, or with soft targets, has no mask M. It hands what
    reaches `method.pseudo_label.threshold` to a contrastive module on top.
    """
    labels = jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
    kept = inside & (jnp.max(probabilities, axis=-1) >= threshold)
    return jnp.where(kept, labels, losses.IGNORE)


def confident_labels(logits: Array, inside: Array, threshold: float) -> Array:
    """Returns the arg max at full size, 255 where its probability is below `threshold`.

    Args:
      logits: (B, h, w, C).
      inside: (B, H, W) bool, False on padding, which gets no label.
      threshold: probability.

    Returns:
      (B, H, W) int32, without gradient.
    """
    logits = resize_aligned(jax.lax.stop_gradient(logits), size_of(inside))
    return likeliest(jax.nn.softmax(logits), inside, threshold)


def strong_view(key: Array, weak: Array, config: ConfigDict) -> tuple[Array, Array]:
    """Returns the strong view of UniMatch's code, and the mask of its CutMix.

    Args:
      key: random key.
      weak: (B, H, W, 3) uint8.
      config: `config.method.unimatch_view`.

    Returns:
      (B, H, W, 3) float32 on 0..255, and (B, H, W) bool for `augment.mix`.
    """
    photo_key, mix_key = jax.random.split(key)
    mask = augment.unimatch_mask(mix_key, weak.shape[0], size_of(weak), config)
    return augment.mix(mask, augment.photometric(photo_key, weak, config)), mask


def split(outputs: Outputs, *images: Array) -> list[Outputs]:
    """Takes the outputs of images (Bi, ...) apart that went through the network as one batch.

    Outputs that were only made for the first of them (`aux`) are given to those.
    """
    parts: list[Outputs] = []
    start = 0
    for each in images:
        end = start + each.shape[0]
        parts.append(jax.tree.map(lambda x, a=start, b=end: x[a:b], outputs))
        start = end
    return parts


def join(first: Outputs, second: Outputs) -> Outputs:
    """Returns two batches of outputs as one."""
    joined: Outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    return joined


def size_of(x: Array) -> tuple[int, int]:
    """Returns (height, width) of (B, H, W, ...)."""
    return x.shape[1], x.shape[2]


def pixels(student: Outputs, bank_features: Array, labels: Array) -> Pixels:
    """Returns what a contrastive module on top of a method needs.

    Args:
      student: of the images; the network was asked for its projection.
      bank_features: (B, h, w, D), see `bank_features`.
      labels: (B, H, W) int ground truth and pseudo-labels of the images as the student saw them.
    """
    return Pixels(
        features=_projection(student),
        bank_features=bank_features,
        labels=augment.nearest(labels.astype(jnp.int32), size_of(student.logits)),
        predictions=jnp.argmax(student.logits, axis=-1).astype(jnp.int32),
    )


def bank_features(
    task: Task,
    state: TrainState,
    student: Outputs,
    labeled: Array,
    unlabeled: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Returns the features that may enter the memory bank, (B, h, w, D), without gradient.

    They are the student's, or for `contrast.bank_source` = "teacher" (Fig. 3, decisions.md 8) the
    teacher's of the weak views, mixed as the student's images were.

    Args:
      task: the task.
      state: the state before the step.
      student: its outputs on labelled and unlabelled images.
      labeled: (Bl, H, W, 3).
      unlabeled: (Bu, H, W, 3) weak views; None for a method that sees none.
      mask: (Bu, H, W) bool of CutMix, None without it.
    """
    if task.config.contrast.bank_source == "student":
        return jax.lax.stop_gradient(_projection(student))
    images = labeled if unlabeled is None else jnp.concatenate([labeled, unlabeled])
    features = _projection(task.eval_forward(state.teacher, images, projection=True))
    if mask is None:
        return features
    features_l, features_u = features[: labeled.shape[0]], features[labeled.shape[0] :]
    small = augment.nearest(mask, size_of(features))
    return jnp.concatenate([features_l, augment.mix(small, features_u)])


def pseudo_label_metrics(pseudo: Array, inside: Array, truth: Array) -> dict[str, Array]:
    """Returns kept share of the pixels, and right share of the kept ones whose truth is known.

    Args:
      pseudo: (B, H, W) int32, 255 where dropped.
      inside: (B, H, W) bool, False on padding.
      truth: (B, H, W) int, for these metrics only.
    """
    kept = pseudo != losses.IGNORE
    judged = kept & (truth != losses.IGNORE)
    right = judged & (pseudo == truth.astype(jnp.int32))
    known = jnp.sum(judged)
    accuracy = jnp.where(known > 0, jnp.sum(right) / jnp.maximum(known, 1), jnp.nan)
    kept_fraction = jnp.sum(kept) / jnp.maximum(jnp.sum(inside), 1)
    return {"kept_fraction": kept_fraction, "pseudo_label_accuracy": accuracy}


def _projection(outputs: Outputs) -> Array:
    """(B, h, w, D) of a network that was asked for it."""
    assert outputs.projection is not None
    return outputs.projection
