"""`benchmark.py health`: what exact resume and the checks of every step cost."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.step import _batch, _build, _load
from benchmarks.timing import Candidate, machine, table, take_turns
from csc_jax import sharding, train
from csc_jax.checkpoint import Checkpointer
from csc_jax.experiment import Experiment
from csc_jax.methods.base import Batch
from csc_jax.optimizer import learning_rate_schedule
from csc_jax.state import TrainState
from csc_jax.train_step import train_step

GOAL = 0.02  # of the time of a step


def run() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="benchmark.py health", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/synthetic.py"))
    parser.add_argument("--classes", type=int, default=7, help="of the data set it is for")
    parser.add_argument("--repeats", type=int, default=20, help="of the steps")
    parser.add_argument("--saves", type=int, default=7)
    options = parser.parse_args()
    print(machine())
    config = _load(options.config)
    config.method.supervised_only = config.contrast.start = 0  # everything is in force at once
    built = _build(config, options.classes)
    batch = sharding.shard_batch(_batch(built), built.mesh)
    state = built.compile_init()()

    steps = {"without checks": _bare_step, "train_step": train_step}
    candidates = {name: _candidate(function, built, batch) for name, function in steps.items()}
    timings = take_turns(candidates, options.repeats)
    print(f"\nStep of {options.config}:\n{table(timings)}")
    bare, checked = (timings[name] for name in steps)
    # Neighbours in time, so that a machine whose speed changes does not decide.
    pairs = [b / a for a, b in zip(bare.seconds, checked.seconds, strict=True)]
    checks = statistics.median(pairs) - 1

    copy, block, write = _saves(built, state, options.saves)
    every = built.config.checkpoint.every
    resume = block / (every * bare.median)
    print(
        f"\nCheckpoint, {_mebibytes(state):.1f} MiB, medians of {options.saves}:\n"
        f"copy to the host alone         {1e3 * copy:8.1f} ms\n"
        f"save blocks the loop for       {1e3 * block:8.1f} ms\n"
        f"written behind it within       {1e3 * write:8.1f} ms\n"
        f"\nOf the time of a step: checks {checks:+.1%} (median of {len(pairs)} pairs), a "
        f"checkpoint every {every} steps {resume:+.2%}; together {checks + resume:+.1%} (goal: "
        f"{GOAL:.0%})."
    )


def _bare_step(
    method: Any, tx: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`train_step` without the norm of the gradient and without its way out."""
    key = jax.random.fold_in(jax.random.key(method.task.config.seed), state.step)
    loss_key, update_key = jax.random.split(key)
    grad = jax.value_and_grad(method.loss, has_aux=True)
    (loss, outputs), gradients = grad(state.trained, state, batch, loss_key)
    updates, opt_state = tx.update(gradients, state.opt_state, state.trained)
    params = optax.apply_updates(state.trained, updates)
    new_state = state.with_trained(params, outputs.batch_stats).replace(opt_state=opt_state)
    new_state, update_metrics = method.update(new_state, outputs, update_key)
    schedule = learning_rate_schedule(method.task.config.optimizer, method.task.total_steps)
    metrics = {"loss": loss, "learning_rate": schedule(state.step)}
    metrics |= outputs.metrics | update_metrics
    return new_state.replace(step=state.step + 1), metrics


def _candidate(function: Any, built: Experiment, batch: Any) -> Candidate:
    state = built.compile_init()()
    places = sharding.state_sharding(state, built.mesh)
    program = (
        jax.jit(
            lambda state, batch: function(built.method, built.tx, state, batch),
            in_shardings=(places, sharding.batch_sharding(built.mesh)),
            out_shardings=(places, sharding.replicated(built.mesh)),
            donate_argnums=0,
        )
        .lower(state, batch)
        .compile()
    )
    memory = program.memory_analysis()
    for _ in range(3):  # fills the bank, so that L_c is in force
        state, _ = program(state, batch)
    holder = [state]

    def call() -> None:
        holder[0], _ = jax.block_until_ready(program(holder[0], batch))

    return Candidate(call, None if memory is None else memory.temp_size_in_bytes)


def _saves(built: Experiment, state: TrainState, repeats: int) -> tuple[float, float, float]:
    """Returns the medians of a copy to the host, of `save`, and of the writing behind it, in s."""
    run, loop = train.describe(built), {"iterator": {"next_index": 0}, "recorder": {}}
    seconds = []
    with tempfile.TemporaryDirectory() as folder, Checkpointer(Path(folder)) as checkpointer:
        for step in range(1, repeats + 2):
            started = time.perf_counter()
            jax.tree.map(
                np.array, jax.device_get(state)
            )  # on a CPU device_get alone copies nothing
            copied = time.perf_counter()
            checkpointer.save(step, state, loop, run, None)
            returned = time.perf_counter()
            checkpointer.wait()
            written = time.perf_counter()
            seconds.append((copied - started, returned - copied, written - returned))
    copy, block, write = (statistics.median(part) for part in zip(*seconds[1:], strict=True))
    return copy, block, write


def _mebibytes(state: TrainState) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20
