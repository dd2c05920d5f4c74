"""`benchmark.py step`: the train step with and without the paper's module, and inference."""

import argparse
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.timing import Candidate, in_a_row, machine, side_by_side, table, take_turns
from csc_jax import config as config_lib
from csc_jax.config import checks as config_checks
from csc_jax.parallel import sharding
from csc_jax.training import experiment
from csc_jax.training.step import compile_step


def run() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="benchmark.py step", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/camvid.py"))
    parser.add_argument("--classes", type=int, default=11, help="of the data set it is for")
    parser.add_argument("--methods", nargs="+", default=["cutmix_mean_teacher", "csc"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="instead of the config's")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(machine())
    built = [
        build(options.config, each, options.classes, options.dtype) for each in options.methods
    ]
    steps = dict(zip(options.methods, steps_of(built), strict=True))
    print(f"\nTrain step of {options.config}, L_c in force, batch on the device:")
    print(table(take_turns(steps, options.repeats)))
    print("\nPeak memory as the compiler plans it, state and batch included:")
    for method, step in steps.items():
        print(f"{method:<20} {'-' if step.peak is None else f'{step.peak / 2**20:.0f} MiB'}")
    print("\nInference, as the compiler counts it:")
    for method, (flops, size) in zip(options.methods, side_by_side(_forward, built), strict=True):
        print(f"{method:<14} {flops / 1e9:10.3f} GFLOP  {size / 2**20:8.1f} MiB moved")


def build(path: Path, method: str, classes: int, dtype: str | None) -> experiment.Experiment:
    """Returns the experiment of a config file with another method, all of it in force at once.

    Args:
      path: of the config file.
      method: its name, or "METHOD+csc".
      classes: of the data set that it is for.
      dtype: compute type, None for the config's.
    """
    config: ConfigDict = runpy.run_path(str(path))["get_config"]()
    config.method.name, _, contrast = method.partition("+")
    config.method.contrast = contrast or "none"
    config.method.supervised_only = config.contrast.start = 0
    config.method.supervised_only_epochs = 0.0
    if dtype:
        config.model.dtype = dtype
    config_checks.validate(config)
    names = tuple(map(str, range(classes)))
    palette = np.zeros((classes, 3), np.uint8)
    return experiment.build(config_lib.resolve(config, steps_per_epoch=100), names, palette)


def steps_of(built: Sequence[experiment.Experiment]) -> list[Candidate]:
    """Returns the compiled step of each, fed with its own state and one random batch."""
    return list(map(_step, built, side_by_side(_compile, built)))


def _compile(built: experiment.Experiment) -> tuple[Any, Any]:
    """The state before the first step, and the step."""
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch(built))
    state = built.abstract_state()
    step = compile_step(built.method, built.tx, built.mesh, state)  # a partial that holds the seed
    program = step.func.lower(*step.args, state, batch).compile()
    return built.compile_init()(), program


def _step(built: experiment.Experiment, compiled: tuple[Any, Any]) -> Candidate:
    batch = sharding.shard_batch(random_batch(built), built.mesh)
    state, program = compiled
    seed = np.asarray(built.config.seed, np.uint32)
    memory = program.memory_analysis()
    for _ in range(3):  # fills the bank, so that L_c is what is timed
        state, metrics = program(seed, state, batch)
    if "ready" in metrics and not metrics["ready"]:
        raise SystemExit("The memory bank is not ready after three steps: L_p would be timed.")
    holder = [state]
    together = in_a_row()

    def call() -> None:
        for _ in range(together):
            holder[0], metrics = program(seed, holder[0], batch)
        jax.block_until_ready(metrics)

    if memory is None:
        return Candidate(call, times=together)
    # A CPU's plan does not tell the peak.
    peak = None if jax.default_backend() == "cpu" else memory.peak_memory_in_bytes
    return Candidate(call, memory.temp_size_in_bytes, peak, together)


def random_batch(built: experiment.Experiment) -> dict[str, dict[str, np.ndarray]]:
    """Returns both halves, on the host, with every class in blocks of 8x8 px."""
    rng, config = np.random.default_rng(0), built.config
    height, width = config.data.crop_size
    halves = {}
    for name in ("labeled", "unlabeled"):
        shape = (config.batch[name], height, width)
        # Blocks, so that every class is there at the stride of the features.
        blocks = rng.integers(0, built.num_classes, (shape[0], -(-height // 8), -(-width // 8)))
        label = blocks.repeat(8, 1).repeat(8, 2)[:, :height, :width].astype(np.uint8)
        image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
        halves[name] = {"image": image, "label": label, "inside": np.ones(shape, bool)}
    return halves


def _forward(built: experiment.Experiment) -> tuple[float, float]:
    """FLOP and bytes of one forward pass of what is evaluated."""
    config, state = built.config, built.abstract_state()
    height, width = config.data.crop_size
    images = jax.ShapeDtypeStruct((config.batch.eval, height, width, 3), np.uint8)

    def logits(network: Any, images: jax.Array) -> jax.Array:
        return built.method.task.eval_forward(network, images).logits

    cost = jax.jit(logits).lower(state.teacher, images).compile().cost_analysis()
    return cost["flops"], cost["bytes accessed"]
