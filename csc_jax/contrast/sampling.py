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


class ClassOrder(NamedTuple):
    """One image's pixels by (class, hard first), shuffled within; ignored ones last. A pytree."""

    pixels: Array  # (N,) int32, which pixel stands at each place
    # (2 C + 1,) int32, where the groups hard 0, easy 0, hard 1, easy 1, … begin, and the last ends
    offset: Array


def order_by_class(key: Array, labels: Array, predictions: Array, num_classes: int) -> ClassOrder:
    """Sorts and shuffles the pixels of one image: the one sort from which all samples are taken.

    Args:
      key: random key.
      labels: (N,) int; outside [0, C) counts as ignored.
      predictions: (N,) int, the student's class; a pixel is hard where it differs from the label.
      num_classes: C.
    """
    if labels.ndim != 1 or predictions.shape != labels.shape:
        raise ValueError(
            f"labels and predictions must be (N,), got {labels.shape} and {predictions.shape}"
        )
    labels = labels.astype(jnp.int32)
    ignored = (labels < 0) | (labels >= num_classes)
    easy = (labels == predictions.astype(jnp.int32)).astype(jnp.int32)
    group = jnp.where(ignored, 2 * num_classes, 2 * labels + easy).astype(jnp.uint32)
    # One unsigned key: the group in the high bits, a random number in the rest.
    bits = (2 * num_classes).bit_length()
    if bits > 16:
        raise ValueError(f"num_classes must be below 32768, got {num_classes}")
    random = jax.random.bits(key, labels.shape, jnp.uint32) >> bits
    pixels = jnp.arange(labels.shape[0], dtype=jnp.int32)
    ordered, pixels = jax.lax.sort((group << (32 - bits) | random, pixels), num_keys=1)
    first = jnp.arange(2 * num_classes + 1, dtype=jnp.uint32) << (32 - bits)
    # Comparing with all needs no loop.
    offset = jnp.searchsorted(ordered, first, method="compare_all")
    return ClassOrder(pixels, offset.astype(jnp.int32))


def take_semi_hard(order: ClassOrder, views: int) -> tuple[Array, Array]:
    """Takes up to `views` pixels of each class, half of them hard (decisions.md 14).

    Where the hard or the easy pixels of a class run short the other kind fills up; where both do,
    slots are invalid. No pixel is taken twice.

    Returns:
      Their indices, (C, views) int32, and which slots are valid, (C, views) bool.
    """
    hard_start, easy_start = order.offset[:-1:2], order.offset[1::2]  # (C,) each
    hard = easy_start - hard_start
    easy = order.offset[2::2] - easy_start
    # The larger half goes to the hard ones when `views` is odd.
    take_hard = jnp.minimum(hard, jnp.maximum((views + 1) // 2, views - easy))
    take_easy = jnp.minimum(easy, views - take_hard)
    slot = jnp.arange(views)[None, :]
    position = jnp.where(
        slot < take_hard[:, None],
        hard_start[:, None] + slot,
        easy_start[:, None] + slot - take_hard[:, None],
    )
    return _look_up(order, position, slot < (take_hard + take_easy)[:, None])


def take_random(key: Array, order: ClassOrder, views: int) -> tuple[Array, Array]:
    """Takes up to `views` pixels of each class, every one as likely as the others, none twice.

    A class's places are taken at equal steps from a random start (systematic sampling), hard and
    easy ones in the proportion in which they occur. Returns as `take_semi_hard` does.
    """
    start = order.offset[:-1:2]  # (C,)
    available = order.offset[2::2] - start
    first = jax.random.randint(key, available.shape, 0, jnp.maximum(available, 1))
    slot = jnp.arange(views)[None, :]
    # Steps of at least one place: two slots never meet.
    spread = jnp.maximum(available, views)[:, None]
    step = (slot * (spread // views)) + (slot * (spread % views)) // views
    position = start[:, None] + (first[:, None] + step) % jnp.maximum(available, 1)[:, None]
    return _look_up(order, position, slot < available[:, None])


def gather(features: Array, indices: Array, valid: Array) -> Samples:
    """Returns the features (N, D) of one image at `indices` (C, views), zero in invalid slots."""
    return Samples(jnp.where(valid[..., None], features[indices], 0), indices, valid)


def semi_hard_sample(
    key: Array,
    features: Array,
    labels: Array,
    predictions: Array,
    *,
    num_classes: int,
    views: int,
) -> Samples:
    """Draws up to `views` pixels of each class of one image, half of them hard.

    For one kind of sample; several are taken from one `order_by_class`. See `take_semi_hard`.

    Args:
      key: random key.
      features: (N, D) of one image.
      labels: (N,) int; outside [0, C) counts as ignored.
      predictions: (N,) int, the student's class.
      num_classes: C.
      views: slots per class.
    """
    order = order_by_class(key, labels, predictions, num_classes)
    return gather(features, *take_semi_hard(order, views))


def _look_up(order: ClassOrder, position: Array, valid: Array) -> tuple[Array, Array]:
    return order.pixels[jnp.where(valid, position, 0)], valid
