"""The device mesh: a batch is split over all of it, large parameters over its axis "fsdp".

With `parallel.fsdp` = 1, the default, every device holds the whole state. With more, networks and
optimizer state are split over that many devices and gathered where a layer needs them (fully
sharded data parallelism); results are the same, memory and traffic are not.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from csc_jax.errors import UserError

# Elements of the smallest array worth splitting: gathering anything smaller costs more than it
# saves.
_SMALLEST = 1024


def make_mesh(devices: int = 0, fsdp: int = 1) -> Mesh:
    """Returns a mesh ("data", "fsdp") over the first `devices` devices, all of them for 0.

    Args:
      devices: in the mesh.
      fsdp: devices that share one copy of the parameters.

    Raises:
      UserError: more devices asked for than there are, or a number that `fsdp` does not divide.
    """
    available = jax.devices()
    if devices > len(available):
        raise UserError(
            f"parallel.devices is {devices}, but JAX sees {len(available)} "
            f"({available[0].platform}). Set --config.parallel.devices={len(available)} or fewer; "
            "0 takes all."
        )
    count = devices or len(available)
    if count % fsdp:
        raise UserError(
            f"parallel.fsdp is {fsdp}, which does not divide the {count} devices of the mesh. "
            f"Choose a divisor of {count}; 1 gives every device the whole state."
        )
    # Auto axes: the Explicit default rejects top_k, gathers and scatters on a sharded axis.
    return jax.make_mesh(
        (count // fsdp, fsdp),
        ("data", "fsdp"),
        (AxisType.Auto, AxisType.Auto),
        devices=available[:count],
    )


def check_batch_sizes(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for a batch that does not divide by the mesh."""
    for name in ("labeled", "unlabeled", "eval"):
        size = config.batch[name]
        if size % mesh.size:
            raise UserError(
                f"batch.{name} is {size}, which does not divide by the {mesh.size} devices of the "
                f"mesh. Choose a multiple of {mesh.size}, or fewer devices with "
                "--config.parallel.devices=N."
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0, the batch, is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of every leaf of a TrainState, or of its shapes.

    Networks and optimizer state are split along the longest axis that "fsdp" divides; small arrays
    and all else, the memory bank above all, are replicated.
    """
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    names = ("student", "teacher", "companions", "opt_state")
    parts = {name: getattr(state, name) for name in names}
    return whole.replace(**jax.tree.map(lambda x: _longest_axis(x.shape, mesh), parts))


def _longest_axis(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    parts = mesh.shape["fsdp"]
    axes = [i for i, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or not axes or math.prod(shape) < _SMALLEST:
        return replicated(mesh)
    longest = max(axes, key=lambda i: shape[i])
    return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "fsdp"))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a pytree of host arrays (B, ...) on the mesh, split along the batch."""
    return jax.device_put(jax.tree.map(np.asarray, batch), batch_sharding(mesh))
