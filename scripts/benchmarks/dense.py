"""The contrastive loss as one writes it first: every query against every key at once.

The yardstick of `benchmark.py contrast`, and in tests a second opinion on the streamed loss.
"""

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.contrast import MemoryBank

_NONE = -1e30


def contrastive_loss(
    queries: Array,
    labels: Array,
    valid: Array,
    bank: MemoryBank,
    *,
    temperature: float = 0.1,
    top_n: int | None = None,
) -> Array:
    """See `csc_jax.contrast.contrastive_loss`; labels must be class ids of the bank."""
    n = queries.shape[0]
    num_classes, size, dim = bank.features.shape
    entries = jax.lax.stop_gradient(bank.features).reshape(num_classes * size, dim)
    keys = jnp.concatenate([queries, entries])  # (n + C S, D)
    ids = jnp.repeat(jnp.arange(num_classes, dtype=jnp.int32), size)
    key_labels = jnp.concatenate([labels, ids])
    key_valid = jnp.concatenate([valid, bank.occupied.reshape(-1)])
    similarity = jnp.matmul(queries, keys.T, precision="highest") / temperature  # (n, keys)
    same = labels[:, None] == key_labels[None, :]
    itself = jnp.arange(n)[:, None] == jnp.arange(keys.shape[0])[None, :]
    positive = same & key_valid[None, :] & ~itself
    negative = ~same & key_valid[None, :]
    log_sum = jax.nn.logsumexp(jnp.where(negative, similarity, _NONE), axis=1)
    if top_n is None:
        chosen, weight = similarity, positive
    else:
        candidates = jnp.where(positive, similarity, _NONE)
        chosen, _ = jax.lax.top_k(candidates, min(top_n, candidates.shape[1]))
        weight = chosen > _NONE / 2
    terms = jax.nn.softplus(log_sum[:, None] - jnp.where(weight, chosen, 0.0))
    number = jnp.sum(weight, axis=1)
    per_query = jnp.sum(jnp.where(weight, terms, 0.0), axis=1) / jnp.maximum(number, 1)
    counted = valid & (number > 0)
    return jnp.sum(jnp.where(counted, per_query, 0.0)) / jnp.maximum(jnp.sum(counted), 1)
