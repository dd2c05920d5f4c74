"""`benchmark.py methods`: what a step of each method costs, on one machine in one run."""

import argparse
from pathlib import Path

import jax

from benchmarks.step import build, steps_of
from benchmarks.timing import machine, take_turns
from csc_jax import methods
from csc_jax.models import count_parameters


def run() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="benchmark.py methods", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/camvid.py"))
    parser.add_argument("--classes", type=int, default=11, help="of the data set it is for")
    parser.add_argument("--methods", nargs="+", default=methods.available())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="instead of the config's")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(machine())
    built = [
        build(options.config, each, options.classes, options.dtype) for each in options.methods
    ]
    steps = dict(zip(options.methods, steps_of(built), strict=True))
    trained, state, images = {}, {}, {}
    for method, experiment in zip(options.methods, built, strict=True):
        shapes = experiment.abstract_state()
        trained[method] = count_parameters(shapes.trained)
        state[method] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        images[method] = experiment.config.batch.labeled + experiment.config.batch.unlabeled
    timings = take_turns(steps, options.repeats)
    print(f"\nTrain step of {options.config}; temporaries are the compiler's, beside the state:\n")
    columns = "method", "step, ms", "fastest, ms", "temporaries, MiB", "state, MiB", "trained, M"
    print(f"| {' | '.join(columns)} | images a step |\n|{'---|' * (len(columns) + 1)}")
    for method, timing in timings.items():
        memory = "-" if timing.temporaries is None else f"{timing.temporaries / 2**20:.0f}"
        print(
            f"| {method} | {1e3 * timing.median:.0f} | {1e3 * min(timing.seconds):.0f} | {memory} "
            f"| {state[method] / 2**20:.0f} | {trained[method] / 1e6:.2f} | {images[method]} |"
        )
