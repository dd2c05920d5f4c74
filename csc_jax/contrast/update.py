"""The gated update of the memory bank: second half of Algorithm 1."""

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.contrast.bank import (
    Change,
    MemoryBank,
    apply_change,
    bank_ready,
    consistency_change,
    enqueue_change,
)
from csc_jax.contrast.measures import separation, separation_of

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
    after = separation(candidate)
    accepted = _accepts(mode, separation(current), after, current.best_separation + margin)
    candidate = candidate._replace(best_separation=jnp.minimum(current.best_separation, after))
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
    ready = bank_ready(bank, min_fill=min_fill, absent=absent)
    before = separation(bank)
    # No gate with nothing to judge, so that Separ_b stays as it is.
    known = valid & (labels >= 0) & (labels < bank.count.shape[0])
    consistency_accepted = jnp.full((), jnp.nan)
    if consistency:
        change = consistency_change(bank, queries, labels, valid, class_mean=class_mean)
        asked = ready & jnp.any(known)
        bank, before, accepted = _change(bank, change, before, asked, consistency_gate, margin)
        consistency_accepted = jnp.where(asked, accepted.astype(jnp.float32), jnp.nan)
    change = enqueue_change(bank, new_features, new_valid)
    asked = ready & jnp.any(new_valid)
    bank, before, accepted = _change(
        bank, change, before, asked, enqueue_gate, margin, ungated=~ready
    )
    metrics = {
        "ready": ready.astype(jnp.float32),
        "separation": before,
        "consistency_accepted": consistency_accepted,
        "enqueue_accepted": jnp.where(asked, accepted.astype(jnp.float32), jnp.nan),
    }
    return bank, metrics


def _change(
    bank: MemoryBank,
    change: Change,
    before: Array,
    asked: Array,
    mode: str,
    margin: float,
    *,
    ungated: Array | bool = False,
) -> tuple[MemoryBank, Array, Array]:
    """What `gate` does, for the bank after a change, without a candidate beside the bank.

    Args:
      bank: the bank.
      change: what is offered.
      before: () float32, Separ(bank).
      asked: () bool, whether the gate is to judge it.
      mode, margin: see `gate`.
      ungated: () bool, True to make the change unasked, Separ_b left alone.

    Returns:
      The bank in force, its Separ, and () bool whether the gate accepted.
    """
    after = separation_of(change.sums)
    accepted = asked & _accepts(mode, before, after, bank.best_separation + margin)
    best = jnp.where(accepted, jnp.minimum(bank.best_separation, after), bank.best_separation)
    done = accepted | ungated
    bank = jax.lax.cond(done, lambda b: apply_change(b, change), lambda b: b, bank)
    return bank._replace(best_separation=best), jnp.where(done, after, before), accepted


def _accepts(mode: str, before: Array, after: Array, limit: Array) -> Array:
    """() bool, whether the gate lets a bank's Separ go from `before` to `after`."""
    if mode not in GATE_MODES:
        raise ValueError(f"gate mode must be one of {GATE_MODES}, got {mode!r}")
    if mode == "off":
        return jnp.ones((), bool)
    better = after < before
    return better if mode == "strict" else better | (after < limit)
