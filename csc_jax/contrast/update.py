"""The gated update of the memory bank: second half of Algorithm 1."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.contrast.bank import MemoryBank, bank_ready, consistency_step, enqueue
from csc_jax.contrast.measures import separation

GATE_MODES = ("strict", "range", "off")


def gate(
    current: MemoryBank, candidate: MemoryBank, mode: str, margin: float = 1.0
) -> tuple[MemoryBank, Array]:
    """Accepts or rejects a candidate bank as a whole by its Separ (decisions.md 4).

    Args:
      current: the bank before the step.
      candidate: the bank after it.
      mode: "strict" accepts Separ(candidate) < Separ(current); "range" also accepts
        Separ(candidate) < Separ_b + margin; "off" accepts always.
      margin: x of the paper's "within a specific range x of Separ_b", in units of Separ.

    Returns:
      The bank in force and whether the candidate was accepted, () bool. An accepted candidate
      lowers `best_separation` to its own Separ where that is smaller; a rejected one leaves every
      leaf of `current` as it was.
    """
    if mode not in GATE_MODES:
        raise ValueError(f"gate mode must be one of {GATE_MODES}, got {mode!r}")
    before, after = separation(current), separation(candidate)
    if mode == "off":
        accepted = jnp.ones((), bool)
    elif mode == "strict":
        accepted = after < before
    else:
        accepted = (after < current.best_separation + margin) | (after < before)
    best = jnp.minimum(current.best_separation, after)
    candidate = candidate._replace(best_separation=best)
    return jax.lax.cond(accepted, lambda: candidate, lambda: current), accepted


def update_memory_bank(
    bank: MemoryBank,
    queries: Array,
    labels: Array,
    valid: Array,
    new_features: Array,
    new_valid: Array,
    *,
    consistency: bool = True,
    class_mean: str = "per_image",
    consistency_gate: str = "strict",
    enqueue_gate: str = "range",
    margin: float = 1.0,
    min_fill: int = 1,
    absent: tuple[int, ...] = (),
) -> tuple[MemoryBank, dict[str, Array]]:
    """Consistency step, then enqueue step, each behind its own gate (Algorithm 1).

    While a class has no entry yet there is no consistency step and no gate (decisions.md 11).

    Args:
      bank: the bank, C classes of S entries of width D.
      queries, labels, valid: (B, n, D), (B, n), (B, n), see `consistency_step`.
      new_features, new_valid: (B, C, K, D), (B, C, K), see `enqueue`.
      consistency: False leaves the consistency step out.
      class_mean: see `consistency_step`.
      consistency_gate, enqueue_gate, margin: see `gate`.
      min_fill, absent: see `bank_ready`.

    Returns:
      The new bank and metrics, each () float32: `ready` (before the update), `separation` (after
      it), and `consistency_accepted`, `enqueue_accepted`, NaN where that gate was not asked.
    """
    queries, new_features = jax.lax.stop_gradient((queries, new_features))
    not_asked = jnp.full((), jnp.nan, jnp.float32)

    def step(
        bank: MemoryBank, offered: Array, make: Callable[[MemoryBank], MemoryBank], mode: str
    ) -> tuple[MemoryBank, Array]:
        def ask(bank: MemoryBank) -> tuple[MemoryBank, Array]:
            bank, accepted = gate(bank, make(bank), mode, margin)
            return bank, accepted.astype(jnp.float32)

        # With nothing to add there is nothing to judge, and Separ_b stays as it is.
        return jax.lax.cond(offered, ask, lambda bank: (bank, not_asked), bank)

    def consistent(bank: MemoryBank) -> MemoryBank:
        return consistency_step(bank, queries, labels, valid, class_mean=class_mean)

    def enqueued(bank: MemoryBank) -> MemoryBank:
        return enqueue(bank, new_features, new_valid)

    def gated(bank: MemoryBank) -> tuple[MemoryBank, Array, Array]:
        known = valid & (labels >= 0) & (labels < bank.count.shape[0])
        first = not_asked
        if consistency:
            bank, first = step(bank, jnp.any(known), consistent, consistency_gate)
        bank, second = step(bank, jnp.any(new_valid), enqueued, enqueue_gate)
        return bank, first, second

    def free(bank: MemoryBank) -> tuple[MemoryBank, Array, Array]:
        return enqueued(bank), not_asked, not_asked

    branches: tuple[Callable, Callable] = (gated, free)
    ready = bank_ready(bank, min_fill=min_fill, absent=absent)
    bank, consistency_accepted, enqueue_accepted = jax.lax.cond(ready, *branches, bank)
    metrics = {
        "ready": ready.astype(jnp.float32),
        "separation": separation(bank),
        "consistency_accepted": consistency_accepted,
        "enqueue_accepted": enqueue_accepted,
    }
    return bank, metrics
