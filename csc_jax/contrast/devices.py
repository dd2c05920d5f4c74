"""The devices that a program is traced for, and how they like it.

They are those of the mesh in force: that of `jax.set_mesh` around the call of a jitted function, or
of `jax.sharding.use_abstract_mesh` within it. Without one they are as this host's first.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

_TURNS = 64  # written out at most: a program of thousands takes minutes to compile


def axes() -> tuple[str, ...]:
    """Names of the mesh's axes, to split work over; () on one device, and within a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.size == 1 or mesh.manual_axes else mesh.auto_axes


class Peers(NamedTuple):
    """The devices that rows are split over, as one of them sees them within a `shard_map`."""

    axes: tuple[str, ...]  # of the mesh; () = this device has all rows

    @property
    def number(self) -> int:
        """How many they are."""
        sizes = jax.sharding.get_abstract_mesh().shape
        return math.prod(sizes[axis] for axis in self.axes)

    def first(self, rows: int) -> Array | int:
        """Returns the place of this device's first row among all, () int32; each has `rows`."""
        return jax.lax.axis_index(self.axes) * rows if self.axes else 0

    def gather(self, x: Array) -> Array:
        """Returns the rows (n, …) of all devices in order."""
        return jax.lax.all_gather(x, self.axes, tiled=True) if self.axes else x

    def sum_of_own(self, x: Array) -> Array:
        """Returns of rows as `gather` has them this device's, summed over all devices, (n, …)."""
        return jax.lax.psum_scatter(x, self.axes, tiled=True) if self.axes else x

    def sum(self, x: Array) -> Array:
        """Returns the sum over all devices."""
        total: Array = jax.lax.psum(x, self.axes)
        return total


def on_every_device(tree: Any) -> Any:
    """Returns the arrays whole on each device, so that none is asked for its part again."""
    if not axes():
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def split_over_devices(tree: Any) -> Any:
    """Returns the arrays (B, …) with the rows split over the devices, whatever XLA would choose."""
    if not (names := axes()):
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(names))


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def has_tf32() -> bool:
    """Whether to trace for a GPU with tensor cores for float32 factors: NVIDIA's since Ampere."""
    if platform() != "gpu":
        return False
    # "9.0"; ROCm: "gfx942". A GPU that this host lacks is taken to be of today.
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    return capability[:1].isdigit() and float(capability) >= 8.0


def repeat(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Runs `carry = body(i, carry)` for i from 0 to `count` - 1.

    On a GPU a loop of few turns is written out. There the host decides after each turn of a `while`
    whether there is another, and waits; and XLA cannot put a `cond` that holds a `while` into a
    CUDA graph, so that the host decides about that one, too.
    """
    if platform() != "gpu" or count > _TURNS:
        return jax.lax.fori_loop(0, count, body, carry)
    for i in range(count):
        # Or the products of later turns might be computed early, and all be held at once.
        carry = jax.lax.optimization_barrier(carry)
        carry = body(jnp.asarray(i, jnp.int32), carry)
    return carry
