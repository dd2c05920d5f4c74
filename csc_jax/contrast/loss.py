"""The pixel-wise contrastive loss: L_p over all positives (Eq. 5) and L_c over the TopN (Eq. 6).

No (queries x all keys) matrix is ever held. The keys stream by in blocks, once for the log-sum-exp
over the negatives and, where a gradient is wanted, for its gradient in the same sweep: what softmax
attention does with its values. The gradient is therefore computed together with the loss, and the
backward pass only scales it. Second derivatives and forward mode are not available.

On a mesh each device has its share of the queries and meets all keys, which it is sent once. So is
what the gradient by a key takes of the queries that it is a key of, a few numbers each, so that no
gradient has to be sent back. Where `max_keys` leaves few keys, their gradients are sent back.

Shapes are named as in `streaming.py`; n are the queries of one device.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from csc_jax.contrast import devices
from csc_jax.contrast.bank import MemoryBank
from csc_jax.contrast.streaming import (
    NONE,
    Keys,
    Queries,
    flat_bank,
    fold,
    fold_own_class,
    matmul,
    top,
)


def contrastive_loss(
    queries: Array,
    labels: Array,
    valid: Array,
    bank: MemoryBank | None = None,
    *,
    temperature: float = 0.1,
    top_n: int | None = None,
    max_keys: int = 0,
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
      max_keys: of the queries so many, `key_places`, are keys; 0 = all of them. Work and memory
        grow with n x keys, and so with the square of the batch unless the keys are bounded. Each
        query still counts, and meets the whole bank.

    Raises:
      ValueError: at trace time, where shapes do not fit or a constant is out of its range.
    """
    _check(queries, labels, valid, bank, temperature, top_n, max_keys)
    labels = labels.astype(jnp.int32)
    valid = valid & (labels >= 0) & (labels != 255)
    if bank is not None:
        valid = valid & (labels < bank.features.shape[0])
    # An invalid query may hold anything; zero keeps a stray NaN out of the products.
    queries = jnp.where(valid[:, None], queries.astype(jnp.float32), 0.0)
    constants = _Constants(temperature, top_n, max_keys if max_keys < len(queries) else 0)
    return _loss(constants, queries, jnp.where(valid, labels, -1), bank)


def key_places(queries: int, keys: int) -> np.ndarray:
    """Returns which queries are keys where not all of them are, (keys,) int32, ascending.

    One of each of `keys` equal stretches of the queries, so of all images and classes alike, at a
    place within it that goes round by the golden ratio, so that no slot of an image is preferred:
    the hard pixels come first in each. Which pixel fills a slot is another one in each step.

    Args:
      queries: n.
      keys: in [1, n].
    """
    edges = np.arange(keys + 1) * queries // keys
    turn = np.arange(keys) * ((math.sqrt(5) - 1) / 2) % 1
    return (edges[:-1] + np.floor(turn * np.diff(edges))).astype(np.int32)


class _Constants(NamedTuple):
    """What is known when the loss is traced; as in `contrastive_loss`."""

    temperature: float
    top_n: int | None
    max_keys: int  # below n, or 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(constants: _Constants, queries: Array, labels: Array, bank: MemoryBank | None) -> Array:
    """`contrastive_loss` of clean arguments: invalid queries are zero and have the label -1."""
    return _value_and_gradient(constants, queries, labels, bank, want_gradient=False)[0]


def _loss_forward(
    constants: _Constants, queries: Array, labels: Array, bank: MemoryBank | None
) -> tuple[Array, Array]:
    return _value_and_gradient(constants, queries, labels, bank, want_gradient=True)


def _loss_backward(
    constants: _Constants, gradient: Array, cotangent: Array
) -> tuple[Array, None, None]:
    return cotangent * gradient, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _value_and_gradient(
    constants: _Constants,
    queries: Array,
    labels: Array,
    bank: MemoryBank | None,
    *,
    want_gradient: bool,
) -> tuple[Array, Array]:
    """Returns the loss, () float32, and its gradient, float32, zeros if not wanted.

    `queries` and gradient are those of all devices.
    """
    peers = devices.Peers(devices.axes())
    total, keys = queries.shape[0], constants.max_keys
    parts = jax.sharding.get_abstract_mesh().size if peers.axes else 1
    missing = -total % parts
    queries = jnp.pad(queries, ((0, missing), (0, 0)))
    labels = jnp.pad(labels, (0, missing), constant_values=-1)
    chosen = (
        jnp.asarray(_by_device(key_places(total, keys), total + missing, parts)) if keys else None
    )
    share = functools.partial(_share, constants, peers, want_gradient)
    if not peers.axes:
        return share(queries, labels, bank, chosen)
    rows, whole = PartitionSpec(peers.axes), PartitionSpec()
    value, gradient = jax.shard_map(
        share, in_specs=(rows, rows, whole, rows), out_specs=(whole, rows), check_vma=False
    )(queries, labels, bank, chosen)
    return value, gradient[:total]


def _by_device(places: np.ndarray, total: int, parts: int) -> np.ndarray:
    """Returns the places as rows of their devices, of n = total / parts each: n = no key.

    As many for each device, one device's after the other's, int32.
    """
    device, row = np.divmod(places, total // parts)
    mine = [row[device == i] for i in range(parts)]
    most = max(map(len, mine))
    filled = [np.pad(x, (0, most - len(x)), constant_values=total // parts) for x in mine]
    return np.concatenate(filled).astype(np.int32)


def _share(
    constants: _Constants,
    peers: devices.Peers,
    want_gradient: bool,
    queries: Array,
    labels: Array,
    bank: MemoryBank | None,
    chosen: Array | None,
) -> tuple[Array, Array]:
    """Returns the loss of all queries and the gradient of those of this device, (n, D).

    `chosen` are the rows of this device that are keys; None = all.
    """
    temperature, top_n, _ = constants
    n = queries.shape[0]
    places = peers.first(n) + jnp.arange(n, dtype=jnp.int32)
    batch = Queries(queries / temperature, labels, places)
    if chosen is None:
        everywhere = jnp.arange(peers.number * n, dtype=jnp.int32)
        own = Keys(peers.gather(queries), peers.gather(labels), everywhere)
    else:
        filled = ((queries, 0.0), (labels, -1), (places, -1))
        mine = (x.at[chosen].get(mode="fill", fill_value=value) for x, value in filled)
        own = Keys(*map(peers.gather, mine))
    in_batch, nearest = _mini_batch(batch, own, top_n or 0)
    negatives = _negatives(batch, in_batch, bank, want_gradient)
    log_sum = negatives.log_sum
    if top_n is None:
        positives = _all_positives(batch, own, bank, log_sum, want_gradient)
    else:
        positives = _nearest_positives(batch, peers.number * n, bank, log_sum, nearest)
    counted = (labels >= 0) & (positives.number > 0)
    # (n,): one over (queries that count x positives of this one); float32, as the product of two
    # counts may be beyond int32.
    terms = positives.number.astype(jnp.float32) * peers.sum(jnp.sum(counted))
    weight = jnp.where(counted, 1.0, 0.0) / jnp.maximum(terms, 1.0)
    value = peers.sum(jnp.sum(weight * positives.loss))
    if not want_gradient:
        return value, jnp.zeros_like(queries)

    rows = _Row(log_sum, positives.sigma, weight / temperature, positives.places)

    def add_all(gradient: Array, keys: Keys) -> Array:
        # Each pair counts twice: the row's query has the other as its key, and the other way round.
        similarity, negative = batch.similarity(keys), batch.negative(keys)
        positive, others = batch.other_positive(keys), keys.extra
        in_row = positive & _among(keys.places[None, :], rows.places, axis=0)
        in_column = positive & _among(batch.places[:, None], others.places, axis=1)
        pull = rows.by_similarity(similarity, negative, in_row, axis=0)
        pull += others.by_similarity(similarity, negative, in_column, axis=1)
        return gradient + matmul(pull, keys.features)

    def add_chosen(gradients: tuple[Array, Array], keys: Keys) -> tuple[Array, Array]:
        of_queries, of_keys = gradients
        similarity, negative = batch.similarity(keys), batch.negative(keys)
        positive, begin = batch.other_positive(keys), keys.extra[0]
        in_row = positive & _among(keys.places[None, :], rows.places, axis=0)
        pull = rows.by_similarity(similarity, negative, in_row, axis=0)
        block = jax.lax.dynamic_slice_in_dim(of_keys, begin, len(pull.T))
        block += matmul(pull.T, queries)
        of_keys = jax.lax.dynamic_update_slice_in_dim(of_keys, block, begin, 0)
        return of_queries + matmul(pull, keys.features), of_keys

    sigma, scale = rows.sigma[:, None], rows.scale[:, None]
    from_bank = scale * (sigma * negatives.bank_mean - positives.bank_sum)
    if chosen is None:
        own = own._replace(extra=jax.tree.map(peers.gather, rows))
        return value, fold(add_all, from_bank, own, n)
    own = own._replace(extra=jnp.arange(len(own.labels)))
    gradient, of_keys = fold(add_chosen, (from_bank, jnp.zeros_like(own.features)), own, n)
    return value, gradient.at[chosen].add(peers.sum_of_own(of_keys), mode="drop")


class _Row(NamedTuple):
    """What the derivatives of a query's loss by its similarities take; a pytree."""

    log_sum: Array  # (n,), log of the sum of exp(similarity) over the negatives
    sigma: Array  # (n,), sum over the selected positives of sigmoid(log_sum - similarity)
    scale: Array  # (n,), weight of the query's terms over the temperature
    places: Array | None  # (n, N) int32, the selected positives, -1 = none; None = all of them

    def by_similarity(self, similarity: Array, negative: Array, chosen: Array, axis: int) -> Array:
        """(n, K), for queries along `axis`.

        The term of a selected positive, softplus(log_sum - s), has the derivative
        -sigmoid(log_sum - s) by s, and sigmoid(log_sum - s) x softmax by the negatives'.
        """
        log_sum, sigma, scale = (
            jnp.expand_dims(x, 1 - axis) for x in (self.log_sum, self.sigma, self.scale)
        )
        softmax = jnp.where(negative, jnp.exp(similarity - log_sum), 0.0)
        pull = jnp.where(chosen, jax.nn.sigmoid(log_sum - similarity), 0.0)
        return scale * (sigma * softmax - pull)


def _among(place: Array, places: Array | None, axis: int) -> Array:
    """Whether `place` is in the list `places` (n, N) that belongs to its entry along `axis`."""
    if places is None:
        return jnp.ones((), bool)
    listed = jnp.expand_dims(places, 1 - axis)  # (n, 1, N) or (1, n, N)
    return jnp.any(place[..., None] == listed, axis=-1)


class _Negatives(NamedTuple):
    """What the negatives of each query add up to."""

    log_sum: Array  # (n,), log of the sum of exp(similarity)
    bank_mean: Array  # (n, D), those of the bank, weighted by the softmax over all negatives


_LogSum = tuple[Array, Array, Array]  # (n,) peak, (n,) total, (n, D or 0) sum: a running softmax
_Nearest = tuple[Array, Array]  # similarity, descending, and place among all keys, (n, N) each


def _mini_batch(batch: Queries, own: Keys, top_n: int) -> tuple[_LogSum, _Nearest]:
    """Returns what the mini-batch has of the negatives, and its `top_n` most similar positives."""
    n = batch.labels.shape[0]
    # The sum is of the bank's keys alone: no width yet.
    log_sum = jnp.full((n,), NONE), jnp.zeros((n,)), jnp.zeros((n, 0))
    nearest = jnp.full((n, top_n), NONE), jnp.full((n, top_n), -1, jnp.int32)

    def add(both: tuple[_LogSum, _Nearest], keys: Keys) -> tuple[_LogSum, _Nearest]:
        log_sum, nearest = both
        if top_n:
            similarity, chosen = batch.similarity(keys), batch.other_positive(keys)
            nearest = _add_nearest(nearest, similarity, keys.places, chosen)
        return _add_negatives(batch, log_sum, keys), nearest

    return fold(add, (log_sum, nearest), own, n)


def _add_negatives(batch: Queries, log_sum: _LogSum, keys: Keys) -> _LogSum:
    """One block of a running log-sum-exp, as in flash attention; the sum of keys if D > 0."""
    peak, total, mean = log_sum
    similarity, negative = batch.similarity(keys), batch.negative(keys)
    new_peak = jnp.maximum(peak, jnp.max(jnp.where(negative, similarity, NONE), axis=1))
    share = jnp.where(negative, jnp.exp(similarity - new_peak[:, None]), 0.0)  # (n, K)
    shrink = jnp.exp(peak - new_peak)
    total = shrink * total + jnp.sum(share, axis=1)
    if mean.shape[1]:
        mean = shrink[:, None] * mean + matmul(share, keys.features)
    return new_peak, total, mean


def _add_nearest(nearest: _Nearest, similarity: Array, places: Array, chosen: Array) -> _Nearest:
    """Keeps the N most similar of those so far and the `chosen` of a block."""
    top_n = nearest[0].shape[1]
    candidates = jnp.where(chosen, similarity, NONE)
    new = top(candidates, jnp.broadcast_to(places[None, :], candidates.shape), top_n)
    values, places = (jnp.concatenate(pair, axis=1) for pair in zip(nearest, new, strict=True))
    return top(values, places, top_n)


def _negatives(
    batch: Queries, log_sum: _LogSum, bank: MemoryBank | None, want_gradient: bool
) -> _Negatives:
    """Adds those of the bank to those of the mini-batch."""
    n, dim = batch.scaled.shape
    log_sum = *log_sum[:2], jnp.zeros((n, dim if want_gradient else 0))
    if bank is not None:
        log_sum = fold(functools.partial(_add_negatives, batch), log_sum, flat_bank(bank), n)
    peak, total, mean = log_sum
    floor = jnp.where(total > 0, total, 1.0)
    return _Negatives(jnp.where(total > 0, peak + jnp.log(floor), NONE), mean / floor[:, None])


class _Positives(NamedTuple):
    """What the selected positives of each query add up to."""

    number: Array  # (n,) int32
    loss: Array  # (n,), sum of their terms
    sigma: Array  # (n,), sum of sigma
    bank_sum: Array  # (n, D), sum of sigma x key over those in the bank
    places: Array | None = None  # (n, N) int32, which they are; None = all


def _terms(similarity: Array, log_sum: Array, chosen: Array) -> tuple[Array, Array]:
    """Returns -log(e^s / (e^s + sum of negatives)) (Eq. 5a, 6a) and sigma, (n, K), 0 elsewhere."""
    difference = log_sum[:, None] - similarity
    loss = jnp.where(chosen, jax.nn.softplus(difference), 0.0)
    return loss, jnp.where(chosen, jax.nn.sigmoid(difference), 0.0)


def _all_positives(
    batch: Queries, own: Keys, bank: MemoryBank | None, log_sum: Array, want_gradient: bool
) -> _Positives:
    """Every positive is selected."""
    Sums = tuple[Array, Array, Array, Array]  # as in _Positives; the last may be of width 0

    def add(
        sums: Sums, batch: Queries, log_sum: Array, keys: Keys, chosen: Array, *, stored: bool
    ) -> Sums:
        number, loss, sigma, bank_sum = sums
        terms, sigmas = _terms(batch.similarity(keys), log_sum, chosen)
        if stored and bank_sum.shape[1]:
            bank_sum = bank_sum + matmul(sigmas, keys.features)
        number = number + jnp.sum(chosen, axis=1, dtype=jnp.int32)
        return number, loss + jnp.sum(terms, axis=1), sigma + jnp.sum(sigmas, axis=1), bank_sum

    def add_mini_batch(sums: Sums, keys: Keys) -> Sums:
        return add(sums, batch, log_sum, keys, batch.other_positive(keys), stored=False)

    def add_bank(sums: Sums, rows: tuple[Queries, Array], keys: Keys) -> Sums:
        return add(sums, *rows, keys, rows[0].positive(keys), stored=True)

    n, dim = batch.scaled.shape
    zeros = jnp.zeros((n,))
    sums = zeros.astype(jnp.int32), zeros, zeros, jnp.zeros((n, dim if want_gradient else 0))
    sums = fold(add_mini_batch, sums, own, n)
    if bank is not None:
        sums = fold_own_class(add_bank, sums, (batch, log_sum), bank)
    return _Positives(*sums)


def _nearest_positives(
    batch: Queries, in_batch: int, bank: MemoryBank | None, log_sum: Array, nearest: _Nearest
) -> _Positives:
    """The N most similar ones are selected (Eq. 6b); `nearest` are those of the mini-batch.

    The bank's places follow the `in_batch` ones of the mini-batch.
    """

    def add_bank(nearest: _Nearest, rows: Queries, keys: Keys) -> _Nearest:
        similarity, chosen = rows.similarity(keys), rows.positive(keys)
        return _add_nearest(nearest, similarity, in_batch + keys.places, chosen)

    if bank is not None:
        nearest = fold_own_class(add_bank, nearest, batch, bank)
    similarity, places = nearest
    selected = similarity > NONE / 2
    loss, sigma = _terms(similarity, log_sum, selected)
    bank_sum = jnp.zeros_like(batch.scaled)
    if bank is not None:
        features, stored = flat_bank(bank).features, selected & (places >= in_batch)
        share, entry = jnp.where(stored, sigma, 0.0), jnp.where(stored, places - in_batch, 0)
        # One of the N at a time: (n, D) at once, not (n, N, D).
        bank_sum = devices.repeat(
            places.shape[1],
            lambda i, total: total + share[:, i, None] * features[entry[:, i]],
            bank_sum,
        )
    return _Positives(
        number=jnp.sum(selected, axis=1, dtype=jnp.int32),
        loss=jnp.sum(loss, axis=1),
        sigma=jnp.sum(sigma, axis=1),
        bank_sum=bank_sum,
        places=jnp.where(selected, places, -1),
    )


def _check(
    queries: Array,
    labels: Array,
    valid: Array,
    bank: MemoryBank | None,
    temperature: float,
    top_n: int | None,
    max_keys: int,
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
    if max_keys < 0:
        raise ValueError(f"max_keys must be at least 1 or 0, which is no bound, got {max_keys}")
