"""Which pixels become queries and which enter the bank: fixed shapes, one sort per image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Samples(NamedTuple):
    """Pixels drawn from one image, `views` slots per class; a pytree."""

    features: Array  # (C, views, D), zero in invalid slots
    indices: Array  # (C, views) int32, which pixel of the image
    valid: Array  # (C, views) bool


def semi_hard_sample(
    key: Array,
    features: Array,
    labels: Array,
    predictions: Array,
    *,
    num_classes: int,
    views: int,
) -> Samples:
    """Draws up to `views` pixels of each class of one image, half of them hard (decisions.md 14).

    A pixel is hard where the prediction differs from the label. Where the hard or the easy pixels
    of a class run short the other kind fills up; where both do, slots are invalid. No pixel is
    drawn twice.

    Args:
      key: random key.
      features: (N, D) of one image.
      labels: (N,) int; outside [0, C) counts as ignored.
      predictions: (N,) int, the student's class.
      num_classes: C.
      views: slots per class.
    """
    group, offset = _shuffled_groups(key, labels, labels != predictions, num_classes)
    hard_start, easy_start = offset[:-1:2], offset[1::2]  # (C,) each
    hard = easy_start - hard_start
    easy = offset[2::2] - easy_start
    # The larger half goes to the hard ones when `views` is odd.
    take_hard = jnp.minimum(hard, jnp.maximum((views + 1) // 2, views - easy))
    take_easy = jnp.minimum(easy, views - take_hard)
    slot = jnp.arange(views)[None, :]
    position = jnp.where(
        slot < take_hard[:, None],
        hard_start[:, None] + slot,
        easy_start[:, None] + slot - take_hard[:, None],
    )
    return _gather(features, group, position, slot < (take_hard + take_easy)[:, None])


def random_sample(
    key: Array, features: Array, labels: Array, *, num_classes: int, views: int
) -> Samples:
    """Draws up to `views` pixels of each class of one image uniformly, none twice (decisions.md 9).

    Arguments as in `semi_hard_sample`.
    """
    group, offset = _shuffled_groups(key, labels, jnp.ones(labels.shape, bool), num_classes)
    start = offset[:-1:2]  # (C,)
    available = offset[2::2] - start
    slot = jnp.arange(views)[None, :]
    return _gather(features, group, start[:, None] + slot, slot < available[:, None])


def _shuffled_groups(
    key: Array, labels: Array, hard: Array, num_classes: int
) -> tuple[Array, Array]:
    """Orders pixels by (class, hard first), at random within a group, ignored ones last.

    Returns the pixel indices in that order, (N,) int32, and the offsets at which the groups
    hard 0, easy 0, hard 1, easy 1, … begin, closed by the end of the last, (2 C + 1,) int32.
    """
    if labels.ndim != 1 or hard.shape != labels.shape:
        raise ValueError(f"labels and predictions must be (N,), got {labels.shape}, {hard.shape}")
    labels = labels.astype(jnp.int32)
    ignored = (labels < 0) | (labels >= num_classes)
    group = jnp.where(ignored, 2 * num_classes, 2 * labels + (~hard).astype(jnp.int32))
    tie_break = jax.random.bits(key, labels.shape, jnp.uint32)
    pixels = jnp.arange(labels.shape[0], dtype=jnp.int32)
    ordered, _, pixels = jax.lax.sort((group, tie_break, pixels), num_keys=2)
    offset = jnp.searchsorted(ordered, jnp.arange(2 * num_classes + 1, dtype=jnp.int32))
    return pixels, offset.astype(jnp.int32)


def _gather(features: Array, pixels: Array, position: Array, valid: Array) -> Samples:
    indices = pixels[jnp.where(valid, position, 0)]  # (C, views)
    return Samples(jnp.where(valid[..., None], features[indices], 0), indices, valid)
