"""Everything that changes from one step to the next, in one pytree."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from csc_jax.contrast import MemoryBank


class Network(struct.PyTreeNode):
    """One network's variables."""

    params: Any  # pytree of float32
    batch_stats: Any  # pytree of float32, BatchNorm's running mean and variance

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class TrainState(struct.PyTreeNode):
    """The state of a run; `tx` and `apply_fn` live outside it, so that it is arrays only."""

    step: Array  # () int32, batches seen
    rejected: Array  # () int32, of the newest steps, how many in a row were not finite
    student: Network
    teacher: Network  # EMA of the student (decisions.md 19)
    companions: dict[str, Network]  # further trained networks of a method, {} for most
    bank: MemoryBank | None  # the paper's memory bank; None where the method has none
    method_state: Any  # pytree that the method owns beside networks and bank
    opt_state: optax.OptState

    @property
    def trained(self) -> dict[str, Any]:
        """Parameters that receive gradients, by network name."""
        return {"student": self.student.params} | {
            name: network.params for name, network in self.companions.items()
        }

    def with_trained(self, params: dict[str, Any], batch_stats: dict[str, Any]) -> "TrainState":
        """Returns the state with new parameters and statistics of all trained networks."""
        networks = {name: Network(params[name], batch_stats[name]) for name in params}
        return self.replace(student=networks.pop("student"), companions=networks)


def update_ema(teacher: Network, student: Network, decay: Array) -> Network:
    """Returns decay x teacher + (1 - decay) x student, BatchNorm statistics included."""
    return jax.tree.map(partial(_mix, decay), teacher, student)


@jax.jit  # so that JAX traces it once for all arrays of a shape
def _mix(decay: Array, teacher: Array, student: Array) -> Array:
    mixed = decay * teacher + (1.0 - decay) * student
    # What is equal stays so, unrounded: a frozen backbone is the same in both for good.
    return jnp.where(teacher == student, teacher, mixed)


def teacher_decay(step: Array, start: int, limit: float) -> Array:
    """Returns min(1 - 1/(t + 1), limit), t from `start`; before it 0, a copy (decisions.md 19)."""
    t = jnp.maximum(step - start, 0).astype(jnp.float32)
    return jnp.minimum(1.0 - 1.0 / (t + 1.0), limit)


def copy_network(network: Network) -> Network:
    """Returns the same values in buffers of their own.

    Teacher and student must never share one: the state is donated to the step, and a buffer
    donated twice can crash the process.
    """
    return jax.tree.map(jnp.array, network)
