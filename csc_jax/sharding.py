"""The device mesh: one axis, "data", over which a batch is split; everything else is replicated."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from csc_jax.errors import UserError


def make_mesh(devices: int = 0) -> Mesh:
    """Returns a mesh over the first `devices` devices, all of them for 0.

    Raises:
      UserError: more devices asked for than there are.
    """
    available = jax.devices()
    if devices > len(available):
        raise UserError(
            f"parallel.devices is {devices}, but JAX sees {len(available)} "
            f"({available[0].platform}). Set --config.parallel.devices={len(available)} or fewer; "
            "0 takes all."
        )
    count = devices or len(available)
    # Auto axes: the Explicit default rejects top_k, gathers and scatters on a sharded axis.
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=available[:count])


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
    """Axis 0, the batch, is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a pytree of host arrays (B, ...) on the mesh, split along the batch."""
    return jax.device_put(jax.tree.map(np.asarray, batch), batch_sharding(mesh))
