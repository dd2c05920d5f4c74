"""The class-wise memory bank: its state, the consistency step (Eq. 8) and the enqueue step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.contrast import devices
from csc_jax.contrast.normalize import inverse_length, normalize


class MemoryBank(NamedTuple):
    """One first-in-first-out queue of unit-length features per class; a pytree."""

    features: Array  # (C, S, D) float32; entries at or past `count` are zero
    # Shadows tuple.count, which nobody asks of a bank.
    count: Array  # type: ignore[assignment]  # (C,) int32, entries in use, L_c of Eq. 8c
    cursor: Array  # (C,) int32, slot that the next entry overwrites
    best_separation: Array  # () float32, Separ_b: smallest Separ seen so far, infinite at first

    @property
    def occupied(self) -> Array:
        """(C, S) bool, which entries are in use."""
        return jnp.arange(self.features.shape[1])[None, :] < self.count[:, None]


def init_memory_bank(num_classes: int, size: int, dim: int) -> MemoryBank:
    """Returns an empty bank: `num_classes` (C) queues of `size` (S) entries of width `dim` (D)."""
    if min(num_classes, size, dim) < 1:
        raise ValueError(
            f"num_classes, size and dim must be positive, got {num_classes}, {size}, {dim}"
        )
    return MemoryBank(
        features=jnp.zeros((num_classes, size, dim), jnp.float32),
        count=jnp.zeros((num_classes,), jnp.int32),
        cursor=jnp.zeros((num_classes,), jnp.int32),
        best_separation=jnp.full((), jnp.inf, jnp.float32),
    )


def bank_fill(bank: MemoryBank) -> Array:
    """Returns the share of the bank's entries in use, () float32 in [0, 1]."""
    return jnp.mean(bank.count.astype(jnp.float32)) / bank.features.shape[1]


def bank_ready(bank: MemoryBank, *, min_fill: int = 1, absent: tuple[int, ...] = ()) -> Array:
    """Returns () bool: every class not in `absent` holds at least `min_fill` entries.

    Until then L_p is in force and nothing is gated (Algorithm 1, decisions.md 11).
    """
    expected = jnp.ones(bank.count.shape, bool)
    if absent:
        expected = expected.at[jnp.asarray(absent)].set(False)
    return jnp.all((bank.count >= min_fill) | ~expected)


class Change(NamedTuple):
    """What a step would do to a bank: a gate must know its sums before the bank may change.

    So nothing of the size of a bank is ever held beside it.
    """

    entries: Callable[[Array], Array]  # (C, S, D) -> (C, S, D)
    sums: Array  # (C, D) float32, of each class's entries afterwards
    count: Array  # type: ignore[assignment]  # (C,) int32, afterwards; see MemoryBank
    cursor: Array  # (C,) int32, afterwards


def apply_change(bank: MemoryBank, change: Change) -> MemoryBank:
    """Returns the bank after a change; in place where the compiler may reuse the bank's buffer."""
    features = change.entries(bank.features)
    return bank._replace(features=features, count=change.count, cursor=change.cursor)


def consistency_step(
    bank: MemoryBank, queries: Array, labels: Array, valid: Array, *, class_mean: str = "per_image"
) -> MemoryBank:
    """Moves every entry towards the mini-batch's mean feature of its class (Eq. 8), ungated.

    Args:
      bank: the bank, C classes of S entries of width D.
      queries: (B, n, D), the sampled features of B images, unit length.
      labels: (B, n) int, outside [0, C) counts as ignored.
      valid: (B, n) bool.
      class_mean: "per_image" averages the per-image class means and normalises (Eq. 8a,
        decisions.md 6); "pooled" averages all queries of the class and does not normalise.

    Returns:
      The bank with new features. A class without a query, and every free slot, is left alone.
    """
    change = consistency_change(bank, queries, labels, valid, class_mean=class_mean)
    return apply_change(bank, change)


def consistency_change(
    bank: MemoryBank, queries: Array, labels: Array, valid: Array, *, class_mean: str
) -> Change:
    """Returns what `consistency_step` does."""
    num_classes = bank.features.shape[0]
    _check_sampled(bank, queries, labels, valid)
    if class_mean not in ("per_image", "pooled"):
        raise ValueError(f"class_mean must be 'per_image' or 'pooled', got {class_mean!r}")
    member = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32) * valid[..., None]  # (B, n, C)
    sums = jnp.einsum(
        "bnc,bnd->bcd", member, queries.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    counts = jnp.sum(member, axis=1)  # (B, C), n_x^c
    total = jnp.sum(counts, axis=0)  # (C,)
    if class_mean == "per_image":
        image_means = sums / jnp.maximum(counts, 1.0)[..., None]  # (B, C, D)
        images = jnp.maximum(jnp.sum(counts > 0, axis=0), 1).astype(jnp.float32)
        mean = normalize(jnp.sum(image_means, axis=0) / images[:, None])  # (C, D)
    else:
        mean = jnp.sum(sums, axis=0) / jnp.maximum(total, 1.0)[:, None]
    fill = bank.count.astype(jnp.float32)
    alpha = fill / jnp.maximum(fill + total, 1.0)  # (C,), Eq. 8c
    mean, alpha, total = devices.on_every_device((mean, alpha, total))
    # Eq. 8b: an entry becomes old_share x itself + mean_share x the mean, (C, S) each.
    moves = bank.occupied & (total > 0)[:, None]
    mean = jnp.where((total > 0)[:, None], mean, 0.0)
    blended = alpha[:, None, None] * bank.features + (1.0 - alpha)[:, None, None] * mean[:, None]
    scale = inverse_length(blended)
    old_share = jnp.where(moves, alpha[:, None] * scale, 1.0)
    mean_share = jnp.where(moves, (1.0 - alpha)[:, None] * scale, 0.0)

    def entries(old: Array) -> Array:
        return old_share[..., None] * old + mean_share[..., None] * mean[:, None]

    sums = _weighted_sums(old_share, bank.features) + jnp.sum(mean_share, 1, keepdims=True) * mean
    return Change(entries, sums, bank.count, bank.cursor)


def enqueue(bank: MemoryBank, features: Array, valid: Array) -> MemoryBank:
    """Appends features to their classes' queues, overwriting the oldest entries, ungated.

    Args:
      bank: the bank, C classes of S entries of width D.
      features: (B, C, K, D), new features by image and class; normalised here (decisions.md 9).
      valid: (B, C, K) bool, which of them exist.

    Returns:
      The bank with the valid features appended in the order image, then slot. Where one class
      brings more than S of them, the last S stay.
    """
    return apply_change(bank, enqueue_change(bank, features, valid))


def enqueue_change(bank: MemoryBank, features: Array, valid: Array) -> Change:
    """Returns what `enqueue` does."""
    num_classes, size, dim = bank.features.shape
    if features.ndim != 4 or features.shape[1] != num_classes or features.shape[3] != dim:
        raise ValueError(
            f"features must be (B, {num_classes}, K, {dim}) for this bank, got {features.shape}"
        )
    if valid.shape != features.shape[:3]:
        raise ValueError(f"valid must be {features.shape[:3]}, got {valid.shape}")
    images, _, per_image, _ = features.shape
    features, valid = devices.on_every_device((features, valid))
    new = normalize(features).transpose(1, 0, 2, 3).reshape(num_classes, images * per_image, dim)
    keep = valid.transpose(1, 0, 2).reshape(num_classes, images * per_image)
    rank = jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1  # (C, B*K), order among the valid ones
    added = rank[:, -1] + 1  # (C,)
    # A scatter with two writers of one slot has no defined winner: drop those that would be
    # overwritten within this very call.
    keep &= rank >= added[:, None] - size
    slot = jnp.where(keep, (bank.cursor[:, None] + rank) % size, size)  # `size` is out of bounds

    classes = jnp.arange(num_classes)[:, None]
    stays = jnp.ones((num_classes, size)).at[classes, slot].set(0.0, mode="drop")
    sums = _weighted_sums(stays, bank.features)
    sums += jnp.sum(jnp.where(keep[..., None], new, 0.0), axis=1)

    def entries(old: Array) -> Array:
        return old.at[classes, slot].set(new, mode="drop")

    count = jnp.minimum(bank.count + added, size)
    return Change(entries, sums, count, (bank.cursor + added) % size)


def _weighted_sums(weights: Array, features: Array) -> Array:
    """Returns the sums of weight (C, S) x feature (C, S, D), (C, D)."""
    return jnp.einsum("cs,csd->cd", weights, features, precision=jax.lax.Precision.HIGHEST)


def _check_sampled(bank: MemoryBank, queries: Array, labels: Array, valid: Array) -> None:
    dim = bank.features.shape[2]
    if queries.ndim != 3 or queries.shape[2] != dim:
        raise ValueError(f"queries must be (B, n, {dim}) for this bank, got {queries.shape}")
    if labels.shape != queries.shape[:2] or valid.shape != queries.shape[:2]:
        raise ValueError(
            f"labels and valid must be {queries.shape[:2]}, got {labels.shape} and {valid.shape}"
        )
