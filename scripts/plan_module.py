"""Compiles the contrastive module for hardware that is not there, and prints what it promises.

Command:    python scripts/plan_module.py --topology=v5e:4x4,h100:8 [--images=2 …]

Loss, its gradient by the sampled features, and the update of the bank, on the samples of images
that are split over the devices; without the network that makes them. In `csc` a step has two such
losses, each over half of the images (`contrast.halves`). Nothing runs; times are lower bounds. For
a whole step there is `--mode=plan`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from csc_jax import contrast
from csc_jax.parallel import sharding
from csc_jax.planning.chips import Topology, topology
from csc_jax.planning.hlo import Program
from csc_jax.planning.plan import work

MIB = 2.0**20


def run() -> None:
    """Prints a paragraph for each topology."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", required=True, help="as of --mode=plan, with commas between")
    parser.add_argument("--images", type=int, default=2, help="of each device")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--views", type=int, default=50, help="queries per class and image")
    parser.add_argument("--pixels_per_class", type=int, default=10, help="enqueued per image")
    parser.add_argument("--bank_size", type=int, default=2000, help="S, entries per class")
    parser.add_argument("--dim", type=int, default=256, help="D")
    parser.add_argument("--top_n", type=int, default=1, help="0 = all positives")
    parser.add_argument("--max_keys", type=int, default=0, help="0 = all queries")
    parser.add_argument("--no_bank", action="store_true", help="L_p, without bank and update")
    options = parser.parse_args()
    for name in options.topology.split(","):
        print(describe(options, topology(name)), flush=True)


def describe(options: argparse.Namespace, hardware: Topology) -> str:
    """Compiles the module and returns what there is to know of it."""
    begin = time.perf_counter()
    compiled = compile_module(options, hardware)
    seconds = time.perf_counter() - begin
    program = Program(compiled.as_text() or "")
    images = options.images * len(hardware.devices)
    keys = options.max_keys or images * options.classes * options.views
    lines = [
        f"PLANNED, not measured: {hardware.name}, {images} images, "
        f"{images * options.classes * options.views:,} queries, {keys:,} keys; compiled in "
        f"{seconds:.0f} s"
    ]
    kinds: dict[str, list[float]] = {}
    for each in program.collectives():
        kind = kinds.setdefault(each.kind + (" IN A LOOP" if each.in_loop else ""), [0, 0.0])
        kind[0] += each.times
        kind[1] += each.times * each.bytes
    for name, (times, size) in sorted(kinds.items()):
        lines.append(f"  {name}: {times:,.0f} times, {size / MIB:,.1f} MiB")
    together = sum(size for _, size in kinds.values())
    lines.append(f"  together {together / MIB:,.1f} MiB, {together / images / MIB:.2f} an image")
    loops = [each for each in program.executions if each.instruction.opcode == "while"]
    turns = max((each.times for each in program.executions), default=1)
    unknown = len(program.unknown_loops)
    lines.append(f"  {len(loops)} loops, {turns:,} turns at most, {unknown} of unknown length")
    found = work(program, hardware)
    flop = sum(found["flop"].values())
    memory: Any = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes
    lines.append(f"  a device: {flop / 1e9:,.0f} GFLOP, temporaries {temporary / MIB:,.0f} MiB")
    lines.append(
        f"  at least {1e3 * found['step_seconds']:.2f} ms, of these exchanges "
        f"{1e3 * found['link_seconds']:.2f}"
    )
    return "\n".join(lines)


def compile_module(options: argparse.Namespace, hardware: Topology) -> jax.stages.Compiled:
    """Returns the module's program: samples are split over the devices, the bank is on each."""
    mesh = sharding.make_mesh(available=hardware.devices)
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    images, classes, dim = options.images * mesh.size, options.classes, options.dim

    def samples(slots: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        shape = (images, classes, slots)
        return jax.ShapeDtypeStruct((*shape, dim), jnp.float32), jax.ShapeDtypeStruct(shape, bool)

    bank = jax.eval_shape(lambda: contrast.init_memory_bank(classes, options.bank_size, dim))
    arguments = (*samples(options.views), *samples(options.pixels_per_class), bank)
    function = jax.jit(
        lambda *given: _module(options, mesh, *given),
        in_shardings=(split, split, split, split, whole),
        out_shardings=(whole, split, whole),
    )
    return function.lower(*arguments).compile()


def _module(
    options: argparse.Namespace,
    mesh: jax.sharding.Mesh,
    features: jax.Array,
    valid: jax.Array,
    new: jax.Array,
    new_valid: jax.Array,
    bank: contrast.MemoryBank,
) -> Any:
    ids = jnp.arange(options.classes, dtype=jnp.int32)[None, :, None]
    labels = jnp.broadcast_to(ids, valid.shape)

    def loss(features: jax.Array) -> jax.Array:
        return contrast.contrastive_loss(
            contrast.normalize(features).reshape(-1, options.dim),
            labels.reshape(-1),
            valid.reshape(-1),
            None if options.no_bank else bank,
            top_n=options.top_n or None,
            max_keys=options.max_keys,
        )

    images = features.shape[0]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        value, gradient = jax.value_and_grad(loss)(features)
        if not options.no_bank:
            queries = contrast.normalize(features).reshape(images, -1, options.dim)
            labels, valid = labels.reshape(images, -1), valid.reshape(images, -1)
            bank, _ = contrast.update_memory_bank(bank, queries, labels, valid, new, new_valid)
        return value, gradient, bank


if __name__ == "__main__":
    run()
