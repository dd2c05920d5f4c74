"""Loops over blocks and classes, as the device at hand likes them.

A GPU lets the host decide after each turn of a `while` whether there is another, and waits. XLA
also cannot put a `cond` that holds a `while` into a CUDA graph, so that the host decides about that
one, too. On a GPU loops of few turns are therefore written out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_TURNS = 64  # written out at most: a program of thousands takes minutes to compile
_ELEMENTS = 2**24  # of the arrays of all classes together (64 MB) that may be there at once


def on_gpu() -> bool:
    """Whether to trace for a GPU; what is traced for one device is right on others, but slower."""
    return jax.default_backend() == "gpu"


def has_tf32() -> bool:
    """Whether to trace for a GPU with tensor cores for float32 factors: NVIDIA's since Ampere."""
    if not on_gpu():
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "9.0"; ROCm: "gfx942"
    return capability[:1].isdigit() and float(capability) >= 8.0


def repeat(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Runs `carry = body(i, carry)` for i from 0 to `count` - 1."""
    if not on_gpu() or count > _TURNS:
        return jax.lax.fori_loop(0, count, body, carry)
    for i in range(count):
        # Or the products of later turns might be computed early, and all be held at once.
        carry = jax.lax.optimization_barrier(carry)
        carry = body(jnp.asarray(i, jnp.int32), carry)
    return carry


def all_at_once(classes: Any) -> bool:
    """Whether to work on all classes of a pytree of (C, …) arrays at once: a GPU, small ones."""
    return on_gpu() and sum(x.size for x in jax.tree.leaves(classes)) <= _ELEMENTS


def each_class(function: Callable[[Any], Any], classes: Any) -> Any:
    """Applies `function` to each class of a pytree of (C, …) arrays; the results are (C, …)."""
    if all_at_once(classes):
        return jax.vmap(function)(classes)
    return jax.lax.map(function, classes)
