"""The pixel-wise contrastive loss: L_p over all positives (Eq. 5) and L_c over the TopN (Eq. 6)."""

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.contrast.bank import MemoryBank

# Stands for "no such key" in a maximum or a log-sum-exp: finite, so that gradients stay finite.
_NONE = -1e30


def contrastive_loss(
    queries: Array,
    labels: Array,
    valid: Array,
    bank: MemoryBank | None = None,
    *,
    temperature: float = 0.1,
    top_n: int | None = None,
) -> Array:
    """Returns L_p (Eq. 5) or, with `top_n`, L_c (Eq. 6), () float32.

    The keys of a query are the other queries of the mini-batch and the bank's entries; positives
    share its class, all other keys are negatives. A query's loss is the mean over its selected
    positives, the batch loss the mean over valid queries with at least one positive
    (decisions.md 10). The gradient flows through queries and mini-batch keys, not the bank.

    Args:
      queries: (n, D), unit length; float16 and bfloat16 are computed in float32.
      labels: (n,) int; outside [0, C) counts as ignored (C is the bank's; without a bank only
        negative labels and 255 are outside).
      valid: (n,) bool.
      bank: C classes of entries of width D, or None for keys from the mini-batch alone.
      temperature: tau of Eq. 5b, > 0.
      top_n: N of Eq. 6b, the number of most similar positives that count; None = all of them.

    Raises:
      ValueError: at trace time, where shapes do not fit or a constant is out of its range.
    """
    _check(queries, labels, valid, bank, temperature, top_n)
    queries = queries.astype(jnp.float32)
    labels = labels.astype(jnp.int32)
    valid = valid & (labels >= 0) & (labels != 255)
    # An invalid query may hold anything; zero keeps a stray NaN out of the products.
    queries = jnp.where(valid[:, None], queries, 0.0)
    keys, key_labels, key_valid = queries, labels, valid
    if bank is not None:
        num_classes, size, dim = bank.features.shape
        in_range = labels < num_classes
        valid = valid & in_range
        entries = jax.lax.stop_gradient(bank.features).reshape(num_classes * size, dim)
        keys = jnp.concatenate([queries, entries])  # (n + C S, D)
        entry_labels = jnp.repeat(jnp.arange(num_classes, dtype=jnp.int32), size)
        key_labels = jnp.concatenate([labels, entry_labels])
        key_valid = jnp.concatenate([valid, bank.occupied.reshape(-1)])
    n = queries.shape[0]
    similarity = (
        jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST) / temperature
    )  # (n, keys)
    same_class = labels[:, None] == key_labels[None, :]
    is_self = jnp.arange(n)[:, None] == jnp.arange(keys.shape[0])[None, :]
    positive = same_class & key_valid[None, :] & ~is_self
    negative = ~same_class & key_valid[None, :]

    negatives = jax.nn.logsumexp(jnp.where(negative, similarity, _NONE), axis=1)  # (n,)
    if top_n is None:
        chosen, weight = similarity, positive
    else:
        candidates = jnp.where(positive, similarity, _NONE)
        chosen, _ = jax.lax.top_k(candidates, min(top_n, candidates.shape[1]))  # (n, N)
        weight = chosen > _NONE / 2
    # -log(e^s / (e^s + sum of negatives)) = softplus(log sum of negatives - s), Eq. 5a and 6a.
    # Slots without a positive get s = 0 first: the masked branch must have a finite gradient.
    terms = jax.nn.softplus(negatives[:, None] - jnp.where(weight, chosen, 0.0))
    positives = jnp.sum(weight, axis=1)  # (n,)
    per_query = jnp.sum(jnp.where(weight, terms, 0.0), axis=1) / jnp.maximum(positives, 1)
    counted = valid & (positives > 0)
    return jnp.sum(jnp.where(counted, per_query, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def _check(
    queries: Array,
    labels: Array,
    valid: Array,
    bank: MemoryBank | None,
    temperature: float,
    top_n: int | None,
) -> None:
    if queries.ndim != 2 or labels.shape != queries.shape[:1] or valid.shape != queries.shape[:1]:
        raise ValueError(
            "queries, labels and valid must be (n, D), (n,) and (n,), got "
            f"{queries.shape}, {labels.shape} and {valid.shape}"
        )
    if bank is not None and bank.features.shape[2] != queries.shape[1]:
        raise ValueError(
            f"the bank holds features of width {bank.features.shape[2]}, the queries have "
            f"{queries.shape[1]}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if top_n is not None and top_n < 1:
        raise ValueError(f"top_n must be at least 1 or None, got {top_n}")
