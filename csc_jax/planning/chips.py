"""Accelerators that a run is planned for without having one: their rates, and XLA's view of them.

Rates are the makers' peaks for dense matrices. Sources: for TPUs the pages v4, v5e, v5p and v6e of
Google Cloud's documentation, for GPUs NVIDIA's data sheets of the H100 SXM and the A100 80GB SXM
and, for the network, of the DGX that holds eight. Where a page counts both directions of a link,
half is taken. JAX takes part of a GPU's memory alone, which is what a program may have there.
"""

import math
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from csc_jax.errors import UserError

_GB, _GIB, _TERA = 1e9, 2.0**30, 1e12

# What JAX takes of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_GPU_SHARE = 0.75
# s that the smallest message needs from a device to the next ("How to Scale Your Model", which has
# it for TPUs; taken for NVLink and between hosts as well, where it is more).
HOP = 1e-6


@dataclass(frozen=True)
class Chip:
    """What one accelerator does at best."""

    name: str
    memory: float  # bytes that a program may take
    bandwidth: float  # bytes/s of that memory
    bfloat16: float  # FLOP/s of products of bfloat16
    float32: float  # the same of float32 at JAX's default precision: TF32 on GPUs, else bfloat16
    full: float  # the same at precision "highest"
    link: float  # bytes/s that it sends to others, all its links together
    network: float = math.inf  # bytes/s that it sends to other hosts where links end at the host
    per_host: int = 0  # devices of a host; 0 = links span hosts


class Topology(NamedTuple):
    """Devices that are not there, which JAX compiles for."""

    name: str  # as asked for
    chip: Chip
    compiler: str  # the package that holds it
    devices: list[Any]  # jax.Device, without memory
    hops: int  # from a device to the one farthest away


def _tpu(name: str, memory: float, bandwidth: float, tflops: float, gbits: float) -> Chip:
    peak = tflops * _TERA
    # A product of float32 factors takes one pass of bfloat16 by default, six at full precision.
    return Chip(name, memory * _GIB, bandwidth * _GB, peak, peak, peak / 6, gbits / 8 * _GB)


TPUS = {
    "v4": _tpu("TPU v4", 32, 1228, 275, 2400),
    "v5e": _tpu("TPU v5e", 16, 819, 197, 1600),
    "v5p": _tpu("TPU v5p", 95, 2765, 459, 4800),
    "v6e": _tpu("TPU v6e", 32, 1640, 918, 3200),
}
GPUS = {
    "a100": Chip(
        "A100 80GB SXM",
        _GPU_SHARE * 85.10 * _GB,
        2039 * _GB,
        312 * _TERA,
        156 * _TERA,
        19.5 * _TERA,
        300 * _GB,
        25 * _GB,
        8,
    ),
    "h100": Chip(
        "H100 80GB SXM",
        _GPU_SHARE * 84.94 * _GB,
        3352 * _GB,
        989.4 * _TERA,
        494.7 * _TERA,
        66.9 * _TERA,
        450 * _GB,
        50 * _GB,
        8,
    ),
}

# XLA's description of a GPU (its GpuTargetConfigProto): limits of the compute capability, from the
# CUDA programming guide, and sizes of the card. The version of cuDNN is the oldest that jax takes.
_GPU_LIMITS = (
    "threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
    "thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 "
    "registers_per_core_limit: 65536 registers_per_block_limit: 65536 "
    "shared_memory_per_block: 49152"
)
_GPU_SIZES = {
    "a100": "core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 l2_cache_size: 41943040 "
    "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 "
    "cuda_compute_capability { major: 8 }",
    "h100": "core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800 "
    "shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 "
    "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }",
}


def topology(name: str) -> Topology:
    """Returns the devices of `v5e:4x4`, chips of a TPU slice, or `h100:8`, GPUs in hosts of eight.

    JAX itself is set to run on the CPU.

    Raises:
      UserError: no such chip or slice, or the compiler for it is not installed.
    """
    kind, _, size = name.partition(":")
    if kind not in TPUS | GPUS or not re.fullmatch(r"\d+(x\d+)*", size):
        raise UserError(
            f"--topology={name} is none that can be planned for; give a TPU slice as v5e:4x4 "
            f"({', '.join(TPUS)}) or a number of GPUs as h100:8 ({', '.join(GPUS)})."
        )
    jax.config.update("jax_platforms", "cpu")
    return _slice(name) if kind in TPUS else _gpus(name, kind, size)


def _slice(name: str) -> Topology:
    if find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs libtpu, which holds the compiler for TPUs and needs none of "
            "them: pip install -e '.[plan]'."
        )
    # Without a TPU there is nobody to ask for the slice that this host belongs to, and no reason
    # for one process to keep others from the library.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    # Both cores of a v4 chip as one device, as jax has them.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(name, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={name} is no slice that libtpu knows: {error}. Sides of a v5e or v6e "
            "slice are as in 2x2, 2x4, 4x4 up to 16x16, of v4 and v5p as in 2x2x1."
        ) from error
    devices: list[Any] = list(found.devices)
    sides = [max(axis) + 1 for axis in zip(*(device.coords for device in devices), strict=True)]
    hops = sum(side // 2 for side in sides)
    return Topology(name, TPUS[name.partition(":")[0]], "libtpu", devices, hops)


def _gpus(name: str, kind: str, size: str) -> Topology:
    if not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda12")):
        raise UserError(
            f"--topology={name} needs JAX's plugin for CUDA 12, which holds the compiler for GPUs "
            "and needs none of them: pip install -e '.[gpu]'."
        )
    chip, count = GPUS[kind], int(size) if size.isdigit() else 0
    hosts = -(-count // chip.per_host)
    if count < 1 or (hosts > 1 and count % chip.per_host):
        raise UserError(
            f"--topology={name} has {size} GPUs; give 1 to {chip.per_host}, or a multiple of "
            f"{chip.per_host} for several hosts, as in {kind}:{2 * chip.per_host}."
        )
    memory = f"device_memory_size: {chip.memory / _GPU_SHARE:.0f}"
    rates = f"memory_bandwidth: {chip.bandwidth:.0f}"
    target = (
        f"gpu_device_info {{ {_GPU_LIMITS} {_GPU_SIZES[kind]} {memory} {rates} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } '
        f'device_description_str: "{chip.name}"'
    )
    found = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{hosts}x{count // hosts}", target_config=target
    )
    hops = 1 if hosts == 1 else 2
    return Topology(name, chip, "jax-cuda12-plugin", list(found.devices), hops)
