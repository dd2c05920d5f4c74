"""The device mesh: a batch is split over all of it, large parameters over its axis "fsdp".

With `parallel.fsdp` = 1, the default, every device holds the whole state. With more, networks and
optimizer state are split over that many devices and gathered where a layer needs them (fully
sharded data parallelism); results are the same, memory and traffic are not.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from ml_collections import ConfigDict

from csc_jax.errors import UserError

# Elements of the smallest array worth splitting: gathering anything smaller costs more than it
# saves.
_SMALLEST = 1024


def make_mesh(
    devices: int = 0, fsdp: int = 1, available: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh ("data", "fsdp") over the first `devices` devices, all of them for 0.

    The devices of a process lie side by side, so that its rows of a batch do too, and copies of the
    parameters are shared within a process as far as `fsdp` allows.

    Args:
      devices: in the mesh.
      fsdp: devices that share one copy of the parameters.
      available: devices to choose from; None = all that JAX sees.

    Raises:
      UserError: more devices asked for than there are, fewer than the processes of a run have, or a
        number that `fsdp` does not divide.
    """
    given = jax.devices() if available is None else available
    available = sorted(given, key=lambda device: (device.process_index, device.id))
    if devices > len(available):
        raise UserError(
            f"parallel.devices is {devices}, but there are {len(available)} "
            f"({available[0].platform}). Set --config.parallel.devices={len(available)} or fewer; "
            "0 takes all."
        )
    count = devices or len(available)
    if count < len(available) and jax.process_count() > 1:
        raise UserError(
            f"parallel.devices is {devices}, but the {jax.process_count()} processes of this run "
            f"have {len(available)} devices. Set --config.parallel.devices=0, which takes all, or "
            "start fewer processes."
        )
    if count % fsdp:
        raise UserError(
            f"parallel.fsdp is {fsdp}, which does not divide the {count} devices of the mesh. "
            f"Choose a divisor of {count}; 1 gives every device the whole state."
        )
    # Auto axes: the Explicit default rejects top_k, gathers and scatters on a sharded axis.
    grid = np.array(available[:count]).reshape(count // fsdp, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def check_batch_sizes(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for a batch of training that does not divide by the mesh, and its parts."""
    for name in ("labeled", "unlabeled"):
        size = config.batch[name]
        if size % mesh.size:
            raise UserError(
                f"batch.{name} is {size}, which does not divide by the {mesh.size} devices of the "
                f"mesh. Choose a multiple of {mesh.size}, or fewer devices with "
                "--config.parallel.devices=N."
            )
        if size % (mesh.size * config.train.accumulate):
            raise UserError(
                f"batch.{name} is {size}, which does not divide by train.accumulate = "
                f"{config.train.accumulate} parts on {mesh.size} devices. Choose a multiple of "
                f"{config.train.accumulate * mesh.size}, or fewer parts."
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
    """Puts a pytree of host arrays (B, ...) on the mesh, split along the batch.

    Of several processes each gives its own share of the batch.
    """
    place = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(jax.tree.map(np.asarray, batch), place)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(place, np.asarray(x)), batch
    )


def place_whole(array: np.ndarray, where: Sharding) -> jax.Array:
    """Puts a host array on the mesh that every process has in full."""
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def fetch(array: jax.Array) -> np.ndarray:
    """Returns the whole array on the host of every process; all of them call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
