"""The class-wise memory bank: its state, the consistency step (Eq. 8) and the enqueue step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.contrast import loops
from csc_jax.contrast.normalize import normalize


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
    """What a step would do to a bank, class by class; one of two that a gate decides between.

    A gate must know the candidate's class means before the bank may change. Seen class by class
    they need the memory of one class, where a candidate beside the bank needs that of a bank.
    """

    entries: Callable[[Array, Any], Array]  # ((S, D), data of one class) -> (S, D)
    data: Any  # pytree of arrays with C as their first axis
    count: Array  # type: ignore[assignment]  # (C,) int32, afterwards; see MemoryBank
    cursor: Array  # (C,) int32, afterwards


def apply_change(bank: MemoryBank, change: Change) -> MemoryBank:
    """Returns the bank after a change; in place where the compiler may reuse the bank's buffer."""

    def one_class(c: Array, features: Array) -> Array:
        entries, data = jax.tree.map(lambda x: x[c], (features, change.data))
        return features.at[c].set(change.entries(entries, data))

    if loops.all_at_once((bank.features, change.data)):
        features = jax.vmap(change.entries)(bank.features, change.data)
    else:  # in place
        features = jax.lax.fori_loop(0, bank.features.shape[0], one_class, bank.features)
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
    num_classes, size, _ = bank.features.shape
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
    last = jnp.where(total > 0, bank.count, 0)  # (C,), entries that move

    def entries(old: Array, data: tuple[Array, Array, Array]) -> Array:
        mean, alpha, last = data  # (D,), (), ()
        blended = normalize(alpha * old + (1.0 - alpha) * mean[None, :])  # Eq. 8b
        return jnp.where(jnp.arange(size)[:, None] < last, blended, old)

    return Change(entries, (mean, alpha, last), bank.count, bank.cursor)


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
    new = normalize(features).transpose(1, 0, 2, 3).reshape(num_classes, images * per_image, dim)
    keep = valid.transpose(1, 0, 2).reshape(num_classes, images * per_image)
    rank = jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1  # (C, B*K), order among the valid ones
    total = rank[:, -1:] + 1  # (C, 1)
    # A scatter with two writers of one slot has no defined winner: drop those that would be
    # overwritten within this very call.
    keep &= rank >= total - size
    slot = jnp.where(keep, (bank.cursor[:, None] + rank) % size, size)  # `size` is out of bounds

    def entries(old: Array, data: tuple[Array, Array]) -> Array:
        slot, new = data  # (B*K,), (B*K, D)
        return old.at[slot].set(new, mode="drop")

    count = jnp.minimum(bank.count + total[:, 0], size)
    return Change(entries, (slot, new), count, (bank.cursor + total[:, 0]) % size)


def _check_sampled(bank: MemoryBank, queries: Array, labels: Array, valid: Array) -> None:
    dim = bank.features.shape[2]
    if queries.ndim != 3 or queries.shape[2] != dim:
        raise ValueError(f"queries must be (B, n, {dim}) for this bank, got {queries.shape}")
    if labels.shape != queries.shape[:2] or valid.shape != queries.shape[:2]:
        raise ValueError(
            f"labels and valid must be {queries.shape[:2]}, got {labels.shape} and {valid.shape}"
        )
