"""Sweeps of queries over keys, block by block; what `loss.py` is made of.

Names: n queries of width D; C classes of S bank entries; K keys of a block; N chosen positives.
The similarity of a query and a key is their inner product over the temperature.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.contrast import loops
from csc_jax.contrast.bank import MemoryBank

# Stands for "no such key" in a maximum or a log-sum-exp: finite, so that no inf - inf arises.
NONE = -1e30
# Elements of the largest temporary, 8 MB: small beside any feature map, large enough that the
# matrix products of a CPU keep their speed. A GPU spends its time on starting kernels then: with
# 32 MB loss and gradient took 9.7 ms in place of 13.0 on an H100, as loops (19 x 2,000 entries of
# width 256, 4,864 queries).
_BLOCK_ELEMENTS = 2**21
_BLOCK_ELEMENTS_GPU = 2**23
_BLOCK_KEYS = 4096  # with few queries a block would grow beyond its use
_TILE = 256  # queries that go through the bank class by class together


class Keys(NamedTuple):
    """A block of keys."""

    features: Array  # (K, D) float32
    labels: Array  # (K,) int32, -1 = no key
    start: Array  # () int32, place of the first one in the mini-batch or in the flattened bank
    extra: Any = ()  # pytree of (K, …) arrays that go with them

    @property
    def places(self) -> Array:
        """(K,) int32, place in the mini-batch or in the flattened bank."""
        return self.start + jnp.arange(self.labels.shape[0], dtype=jnp.int32)


class Queries(NamedTuple):
    """All queries of the mini-batch, or a tile of them; a pytree."""

    scaled: Array  # (n, D) float32, query / temperature
    labels: Array  # (n,) int32, -1 = invalid
    places: Array  # (n,) int32, place in the mini-batch

    def similarity(self, keys: Keys) -> Array:
        """(n, K)."""
        return matmul(self.scaled, keys.features.T)

    def negative(self, keys: Keys) -> Array:
        """(n, K) bool."""
        valid = (self.labels >= 0)[:, None] & (keys.labels >= 0)[None, :]
        return valid & (self.labels[:, None] != keys.labels[None, :])

    def positive(self, keys: Keys) -> Array:
        """(n, K) bool, for keys of the bank."""
        same = self.labels[:, None] == keys.labels[None, :]
        return same & (keys.labels >= 0)[None, :]

    def other_positive(self, keys: Keys) -> Array:
        """(n, K) bool, for keys of the mini-batch: no query is its own positive."""
        return self.positive(keys) & (self.places[:, None] != keys.places[None, :])


def top(values: Array, places: Array, top_n: int) -> tuple[Array, Array]:
    """Returns the N largest of (n, K) values, descending, and their places, (n, N) each.

    Of equal values the first comes first. With K < N the rest is NONE.
    """
    if top_n == 1:
        # No sort, and two plain reductions: XLA's argmax takes twice as long on a CPU.
        largest = jnp.max(values, axis=1, keepdims=True)
        columns = jnp.arange(values.shape[1])
        at = jnp.min(jnp.where(values == largest, columns, values.shape[1] - 1), 1, keepdims=True)
    else:
        largest, at = jax.lax.top_k(values, min(top_n, values.shape[1]))
    rest = ((0, 0), (0, top_n - at.shape[1]))
    return (
        jnp.pad(largest, rest, constant_values=NONE),
        jnp.pad(jnp.take_along_axis(places, at, axis=1), rest, constant_values=-1),
    )


def flat_bank(bank: MemoryBank) -> Keys:
    """All entries of the bank, K = C S."""
    num_classes, _, dim = bank.features.shape
    class_ids = jnp.arange(num_classes, dtype=jnp.int32)[:, None]
    labels = jnp.where(bank.occupied, class_ids, -1).reshape(-1)
    return Keys(bank.features.reshape(-1, dim), labels, jnp.zeros((), jnp.int32))


def _block_elements() -> int:
    return _BLOCK_ELEMENTS_GPU if loops.on_gpu() else _BLOCK_ELEMENTS


def fold(step: Callable[[Any, Keys], Any], carry: Any, keys: Keys, rows: int) -> Any:
    """Runs `carry = step(carry, block)` over blocks of keys, sized for `rows` (n) queries."""
    total = keys.labels.shape[0]
    largest = max(1, min(total, _BLOCK_KEYS, _block_elements() // rows))
    blocks = -(-total // largest)
    size = -(-total // blocks)  # blocks alike, so that the last one repeats next to nothing

    def body(i: Array, carry_and_keys: tuple[Any, Keys]) -> tuple[Any, Keys]:
        carry, keys = carry_and_keys
        # The last block is moved back to fit, and what the one before it had is masked out: no
        # padded copy of all keys.
        start = jnp.minimum(i * size, total - size)
        is_new = start + jnp.arange(size) >= i * size
        features, labels, extra = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, size),
            (keys.features, keys.labels, keys.extra),
        )
        labels = jnp.where(is_new, labels, -1)
        return step(carry, Keys(features, labels, keys.start + start, extra)), keys

    # The keys as well, so that no block is read before its turn.
    return loops.repeat(blocks, body, (carry, keys))[0]


def fold_own_class(
    step: Callable[[Any, Any, Keys], Any], carry: Any, rows: Any, bank: MemoryBank
) -> Any:
    """Runs `carry = step(carry, rows, keys)` for each query over its own class of the bank alone.

    The queries are sorted by class, so that a tile of them spans few classes: n x S work instead of
    n x C x S. Invalid ones come last and are left out. How many classes a tile spans is not known
    to the compiler, so that a GPU would have to ask the host: it takes the n x C x S.

    Args:
      step: takes a tile of `carry` and `rows` and one class of the bank; it meets rows of other
        classes too and must leave their carry as it is.
      carry: pytree of (n, …) arrays.
      rows: pytree of (n, …) arrays, the first of them a Queries.
      bank: the bank.
    """
    num_classes, size, _ = bank.features.shape
    labels = jax.tree.leaves(rows, is_leaf=lambda x: isinstance(x, Queries))[0].labels
    n = labels.shape[0]
    if loops.on_gpu():
        return fold(lambda carry, keys: step(carry, rows, keys), carry, flat_bank(bank), n)
    tile = min(n, max(1, _block_elements() // size), _TILE)
    order = jnp.argsort(jnp.where(labels >= 0, labels, num_classes))
    # Filled up to whole tiles with invalid rows.
    order = jnp.pad(order, (0, -n % tile))
    filling = jnp.arange(order.shape[0]) >= n
    sorted_labels = jnp.where(filling, -1, labels[order])
    carry, rows = jax.tree.map(lambda x: x[order], (carry, rows))

    def visit(t: Array, everything: Any) -> Any:
        def take(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, t * tile, tile)

        mine, ids = jax.tree.map(take, rows), take(sorted_labels)

        def visit_class(c: Array, part: Any) -> Any:
            entries = jnp.where(bank.occupied[c], c, -1)
            return step(part, mine, Keys(bank.features[c], entries, c * size))

        part = jax.lax.fori_loop(
            ids[0], jnp.max(ids) + 1, visit_class, jax.tree.map(take, everything)
        )
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, t * tile, axis=0),
            everything,
            part,
        )

    tiles = -(-jnp.sum(labels >= 0, dtype=jnp.int32) // tile)
    carry = jax.lax.fori_loop(0, tiles, visit, carry)
    place = jnp.argsort(order[:n])  # of a query among the sorted ones
    return jax.tree.map(lambda x: x[place], carry)


def matmul(a: Array, b: Array) -> Array:
    """Product in full float32, where accelerators would round the factors to fewer bits.

    Tensor cores take three products of rounded factors for that, which differ in the last bits.
    """
    full = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if not loops.has_tf32():
        return full(a, b)
    thrice = functools.partial(jnp.matmul, precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3)
    product: Array = jax.lax.platform_dependent(a, b, cuda=thrice, default=full)
    return product
