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

from csc_jax.contrast import devices
from csc_jax.contrast.bank import MemoryBank

# Stands for "no such key" in a maximum or a log-sum-exp: finite, so that no inf - inf arises.
NONE = -1e30
# Elements of the largest temporary. 8 MB, on a CPU and what is not named here: small beside any
# feature map, large enough that matrix products keep their speed. A GPU spends its time on starting
# kernels then: with 32 MB loss and gradient took 9.7 ms in place of 13.0 on an H100, as loops (19 x
# 2,000 entries of width 256, 4,864 queries). For a TPU the compiler takes 19 s of a CPU with 2 MB
# and 52 with 8 (4 v5e chips, 7,600 queries).
_BLOCK_ELEMENTS = 2**21
_BLOCK_ELEMENTS_OF = {"gpu": 2**23, "tpu": 2**19}
_BLOCK_KEYS = 4096  # with few queries a block would grow beyond its use
_TILE = 256  # queries of a class that meet its entries together


class Keys(NamedTuple):
    """A block of keys."""

    features: Array  # (K, D) float32
    labels: Array  # (K,) int32, -1 = no key
    places: Array  # (K,) int32, place in the mini-batch or in the flattened bank
    extra: Any = ()  # pytree of (K, …) arrays that go with them


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
    return Keys(bank.features.reshape(-1, dim), labels, jnp.arange(labels.size, dtype=jnp.int32))


def _block_elements() -> int:
    return _BLOCK_ELEMENTS_OF.get(devices.platform(), _BLOCK_ELEMENTS)


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
        block = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), keys)
        block = block._replace(labels=jnp.where(is_new, block.labels, -1))
        return step(carry, block), keys

    # The keys as well, so that no block is read before its turn.
    return devices.repeat(blocks, body, (carry, keys))[0]


def fold_own_class(
    step: Callable[[Any, Any, Keys], Any], carry: Any, rows: Any, bank: MemoryBank
) -> Any:
    """Runs `carry = step(carry, rows, keys)` for each query over its own class of the bank alone.

    Tiles of queries of one class meet that class: n x S work in place of n x C x S, and how many
    tiles there may be is known to the compiler. Invalid queries are left out.

    Args:
      step: takes a tile of `carry` and `rows` and one class of the bank.
      carry: pytree of (n, …) arrays.
      rows: pytree of (n, …) arrays, the first of them a Queries.
      bank: the bank.
    """
    num_classes, size, _ = bank.features.shape
    labels = jax.tree.leaves(rows, is_leaf=lambda x: isinstance(x, Queries))[0].labels
    n = labels.shape[0]
    elements = _block_elements()
    tile = min(-(-n // num_classes), max(1, elements // size), _TILE)
    most = n // tile + num_classes  # tiles: the last of a class may not be full
    turns = -(-most // max(1, elements // (tile * size)))
    together = -(-most // turns)  # tiles of a turn

    order = jnp.argsort(labels)
    begin = jnp.searchsorted(labels[order], jnp.arange(num_classes + 1), method="compare_all")
    count = jnp.diff(begin)  # (C,)
    tiles = -(-count // tile)
    end = jnp.cumsum(tiles)  # (C,), tiles of a class and all before it

    def visit(i: Array, carry: Any) -> Any:
        t = i * together + jnp.arange(together)
        c = jnp.searchsorted(end, t, side="right", method="compare_all")
        c = jnp.minimum(c, num_classes - 1)  # behind the last tile the last class has none left
        place = ((t - (end - tiles)[c]) * tile)[:, None] + jnp.arange(tile)[None, :]
        query = order[jnp.minimum(begin[c][:, None] + place, n - 1)]  # (tiles of a turn, tile)
        entries = jnp.where(bank.occupied[c], c[:, None], -1)
        places = (c * size)[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
        keys = Keys(bank.features[c], entries, places)
        part, mine = jax.tree.map(lambda x: x[query], (carry, rows))
        part = jax.vmap(step)(part, mine, keys)
        target = jnp.where(place < count[c][:, None], query, n)  # n = nowhere
        return jax.tree.map(lambda x, y: x.at[target].set(y, mode="drop"), carry, part)

    return devices.repeat(turns, visit, carry)


def matmul(a: Array, b: Array) -> Array:
    """Product in full float32, where accelerators would round the factors to fewer bits.

    Tensor cores take three products of rounded factors for that, which differ in the last bits.
    """
    full = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if not devices.has_tf32():
        return full(a, b)
    thrice = functools.partial(jnp.matmul, precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3)
    product: Array = jax.lax.platform_dependent(a, b, cuda=thrice, default=full)
    return product
