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

from benchmarks.step import build, random_batch
from benchmarks.timing import Candidate, machine, table, take_turns
from csc_jax.methods.base import Batch
from csc_jax.optimizer import learning_rate_schedule
from csc_jax.parallel import sharding
from csc_jax.state import TrainState
from csc_jax.training import loop as train
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import Experiment
from csc_jax.training.step import train_step

GOAL = 0.02  # of the time of a step


def run() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="benchmark.py health", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/synthetic.py"))
    parser.add_argument("--method", default="csc")
    parser.add_argument("--classes", type=int, default=7, help="of the data set it is for")
    parser.add_argument("--repeats", type=int, default=20, help="of the steps")
    parser.add_argument("--saves", type=int, default=7)
    options = parser.parse_args()
    print(machine())
    built = build(options.config, options.method, options.classes, dtype=None)
    batch = sharding.shard_batch(random_batch(built), built.mesh)
    state = built.compile_init()()

    steps = {"without checks": _bare_step, "train_step": train_step}
    candidates = {name: _candidate(function, built, batch) for name, function in steps.items()}
    timings = take_turns(candidates, options.repeats)
    print(f"\nStep of {options.config}:\n{table(timings)}")
    bare, checked = (timings[name] for name in steps)
    # Neighbours in time, so that a machine whose speed changes does not decide.
    pairs = [b / a for a, b in zip(bare.seconds, checked.seconds, strict=True)]
    checks = statistics.median(pairs) - 1

    copy, block, write, work = _saves(built, state, options.saves)
    every = built.config.checkpoint.every
    resume = block / (every * bare.median)
    shared = work / (every * bare.median)
    print(
        f"\nCheckpoint, {_mebibytes(state):.1f} MiB, medians of {options.saves}:\n"
        f"copy to the host alone         {1e3 * copy:8.1f} ms\n"
        f"save blocks the loop for       {1e3 * block:8.1f} ms\n"
        f"written behind it within       {1e3 * write:8.1f} ms\n"
        f"CPU time of both               {1e3 * work:8.1f} ms\n"
        f"\nOf the time of a step: checks {checks:+.1%} (median of {len(pairs)} pairs), a "
        f"checkpoint every {every} steps {resume:+.2%}; together {checks + resume:+.1%} (goal: "
        f"{GOAL:.0%}). If the writing takes its time from the steps, as on a single core, the "
        f"checkpoint costs {shared:+.2%}."
    )


def _bare_step(
    method: Any, tx: optax.GradientTransformation, seed: int, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`train_step` without the norm of the gradient and without its way out."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    loss_key, update_key = jax.random.split(key)
    trainable = method.trainable(state.trained)

    def whole(trainable: dict[str, Any]) -> dict[str, Any]:
        return {name: {**state.trained[name], **part} for name, part in trainable.items()}

    def loss_of(trainable: dict[str, Any]) -> Any:
        return method.loss(whole(trainable), state, batch, loss_key)

    (loss, outputs), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
    updates, opt_state = tx.update(gradients, state.opt_state, trainable)
    params = whole(optax.apply_updates(trainable, updates))
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
            lambda state, batch: function(built.method, built.tx, built.config.seed, state, batch),
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


def _saves(built: Experiment, state: TrainState, repeats: int) -> list[float]:
    """Returns medians in s: copy to the host, `save`, the writing behind it, CPU time of these two.

    The write is waited for each time, so that no save waits for the one before.
    """
    run, loop = train.describe(built), {"iterator": {"next_index": 0}, "recorder": {}}
    seconds = []
    with tempfile.TemporaryDirectory() as folder, Checkpointer(Path(folder)) as checkpointer:
        for step in range(1, repeats + 2):
            started = time.perf_counter()
            jax.tree.map(
                np.array, jax.device_get(state)
            )  # on a CPU device_get alone copies nothing
            copied, work = time.perf_counter(), time.process_time()
            checkpointer.save(step, state, loop, run, None)
            returned = time.perf_counter()
            checkpointer.wait()
            written, work = time.perf_counter(), time.process_time() - work
            seconds.append((copied - started, returned - copied, written - returned, work))
    return [statistics.median(part) for part in zip(*seconds[1:], strict=True)]


def _mebibytes(state: TrainState) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20
