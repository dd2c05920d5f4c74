"""What several methods do alike."""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax import augment, losses
from csc_jax.methods.base import Pixels, Task
from csc_jax.models import Outputs, resize_aligned
from csc_jax.state import TrainState

_Tree = TypeVar("_Tree")  # pytree of arrays


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


def strong_view(key: Array, weak: Array, task: Task) -> tuple[Array, Array]:
    """Returns the strong view of UniMatch's code, and the mask of its CutMix.

    Args:
      key: random key.
      weak: (B, H, W, K).
      task: whose `config.method.unimatch_view` says how strong it is.

    Returns:
      (B, H, W, K) float32 in the units of the images, and (B, H, W) bool for `augment.mix`.
    """
    photo_key, mix_key = jax.random.split(key)
    config = task.config.method.unimatch_view
    mask = augment.unimatch_mask(mix_key, weak.shape[0], size_of(weak), config)
    return augment.mix(mask, task.photometric(photo_key, weak, config)), mask


def join(*batches: _Tree) -> _Tree:
    """Returns batches, pytrees of (Bi, ...) arrays, as one.

    With G the greatest common divisor of all Bi, it has G groups, each of B1 / G images of the
    first batch, then B2 / G of the second, and so on. Each device thereby keeps the images that it
    has, where one batch behind the other would move most of them to another device. BatchNorm and
    means do not depend on the order.
    """
    groups = math.gcd(*(jax.tree.leaves(each)[0].shape[0] for each in batches))

    def deal(*arrays: Array) -> Array:
        dealt = [x.reshape(groups, -1, *x.shape[1:]) for x in arrays]
        return jnp.concatenate(dealt, axis=1).reshape(-1, *arrays[0].shape[1:])

    joined: _Tree = jax.tree.map(deal, *batches)
    return joined


def split(joined: _Tree, *batches: Array) -> list[_Tree]:
    """Takes apart what `join` has put together, or what a network made of it.

    Arrays that were only made for the first of the batches (`Outputs.aux`) are given to those.

    Args:
      joined: pytree of arrays whose first axis is that of a joined batch.
      batches: (Bi, ...), the batches that were joined, for their sizes.
    """
    groups = math.gcd(*(each.shape[0] for each in batches))
    parts: list[_Tree] = []
    start = 0
    for each in batches:
        end = start + each.shape[0] // groups

        def take(x: Array, start: int = start, end: int = end) -> Array:
            group = x.reshape(groups, -1, *x.shape[1:])
            return group[:, start:end].reshape(-1, *x.shape[1:])

        parts.append(jax.tree.map(take, joined))
        start = end
    return parts


def size_of(x: Array) -> tuple[int, int]:
    """Returns (height, width) of (B, H, W, ...)."""
    return x.shape[1], x.shape[2]


def pixels(student: Outputs, bank_features: Array, labels: Array) -> Pixels:
    """Returns what a contrastive module on top of a method needs.

    Args:
      student: of the images, `join`ed where there are two batches; the network was asked for its
        projection.
      bank_features: (B, h, w, D), see `bank_features`.
      labels: (B, H, W) int ground truth and pseudo-labels of the images as the student saw them.
    """
    features = projection(student)
    # Where the projection skips pixels of the logits, the nearest ones are those that it has.
    logits = augment.nearest(student.logits, size_of(features))
    return Pixels(
        features=features,
        bank_features=bank_features,
        labels=augment.nearest(labels.astype(jnp.int32), size_of(features)),
        predictions=jnp.argmax(logits, axis=-1).astype(jnp.int32),
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
      student: its outputs on labelled and unlabelled images, as `join` has them.
      labeled: (Bl, H, W, K).
      unlabeled: (Bu, H, W, K) weak views; None for a method that sees none.
      mask: (Bu, H, W) bool of CutMix, None without it.
    """
    if task.config.contrast.bank_source == "student":
        return jax.lax.stop_gradient(projection(student))
    images = labeled if unlabeled is None else join(labeled, unlabeled)
    features = projection(task.eval_forward(state.teacher, images, projection=True))
    if unlabeled is None or mask is None:
        return features
    features_l, features_u = split(features, labeled, unlabeled)
    small = augment.nearest(mask, size_of(features))
    return join(features_l, augment.mix(small, features_u))


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


def projection(outputs: Outputs) -> Array:
    """Returns the projection (B, h, w, D) of a network that was asked for it."""
    assert outputs.projection is not None
    return outputs.projection
