"""Kills a run again and again and compares what it ends with to a run that was left alone.

Command:    python scripts/torture.py --kills=20 [--steps=120] [--workdir=DIR]

A third of the kills (SIGKILL) come at random moments, a third while a checkpoint is being written,
a third during an evaluation. Each restart is the same command. At the end parameters, teacher,
optimizer, bank, place in the data and every record of metrics.jsonl but the rate must be the same
to the last bit. Exit status 0 if they are, 1 if not.
"""

import argparse
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from csc_jax import config as config_lib
from csc_jax.reporting import writers
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import build

ROOT = Path(__file__).resolve().parents[1]
# Small, and with intervals that have no common multiple: a restart meets half-full averages.
_FIELDS = {
    "data.labeled_fraction": "1/4",
    "data.crop_size": "(32, 32)",
    "data.synthetic.train": 32,
    "data.synthetic.val": 16,
    "data.synthetic.size": "(32, 32)",
    "batch.eval": 4,
    "model.width": 4,
    "model.decoder_width": 8,
    "model.projection_dim": 8,
    "method.supervised_only": 5,
    "contrast.bank_size": 16,
    "train.log_every": 4,
    "train.eval_every": 7,
    "train.panels": 1,
    "train.consistency_lag": 6,
    "checkpoint.every": 5,
    "parallel.devices": 1,
}


def run() -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, help="of each of the two runs; 6 a kill by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workdir", type=Path, help="kept; a temporary folder by default")
    options = parser.parse_args()
    options.steps = options.steps or 6 * options.kills
    with tempfile.TemporaryDirectory() as temporary:
        root = options.workdir or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        _start(root, "alone", options.steps).wait()
        print("the run left alone is done", flush=True)
        kills = _torture(root, options)
        differences = compare(root / "alone", root / "killed")
    print(f"\n{kills} kills; " + ("\n".join(differences) or "everything is the same to the bit"))
    if kills < options.kills:
        print(f"The run ended before it could be killed {options.kills} times: give more --steps.")
    return 1 if differences or kills < options.kills else 0


def _torture(root: Path, options: argparse.Namespace) -> int:
    """Kills the run `options.kills` times, then lets it finish; returns how often it was killed."""
    moments = random.Random(options.seed)
    workdir, kills = root / "killed", 0
    for kind in itertools.cycle(_KINDS):
        process = _start(root, "killed", options.steps)
        where = _KINDS[kind](workdir, process, moments)
        if process.poll() is not None:  # it finished first
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        print(f"kill {kills}: {kind}, {where}", flush=True)
        if kills == options.kills:
            break
    process = _start(root, "killed", options.steps)
    if process.wait():
        raise SystemExit(f"the run could not be continued: {(root / 'killed.log').read_text()}")
    return kills


def _at_random(workdir: Path, process: subprocess.Popen, moments: random.Random) -> str:
    # Seconds after a random number of new records; none of them = while it still starts.
    before, more = len(writers.read_metrics(workdir)), moments.randrange(5)
    _until(lambda: "enough" * (len(writers.read_metrics(workdir)) >= before + more), process)
    seconds = moments.uniform(0.0, 0.5)
    time.sleep(seconds)
    return f"{seconds:.2f} s after {more} records"


def _in_a_checkpoint(workdir: Path, process: subprocess.Popen, moments: random.Random) -> str:
    def writing() -> str:
        return next((p.name for p in (workdir / "checkpoints").glob("*tmp*")), "")

    return _until(writing, process)


def _in_an_evaluation(workdir: Path, process: subprocess.Popen, moments: random.Random) -> str:
    every = _FIELDS["train.eval_every"]
    before = len(writers.read_metrics(workdir))

    def evaluating() -> str:
        # Cons and the averages are recorded before a step is evaluated, its score after it.
        steps = [r["step"] for r in writers.read_metrics(workdir)[before:]]
        reached = [step for step in steps if step % every >= every - 2]
        return f"near step {reached[-1]}" if reached else ""

    return _until(evaluating, process)


_KINDS: dict[str, Callable[[Path, subprocess.Popen, random.Random], str]] = {
    "random": _at_random,
    "in a checkpoint": _in_a_checkpoint,
    "in an evaluation": _in_an_evaluation,
}


def _until(condition: Callable[[], str], process: subprocess.Popen) -> str:
    while process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.002)
    return ""


def _start(root: Path, name: str, steps: int) -> subprocess.Popen:
    flags = [f"--config.{field}={value}" for field, value in _FIELDS.items()]
    command = [
        *(sys.executable, "-m", "csc_jax.main", f"--config={ROOT / 'configs' / 'synthetic.py'}"),
        *(f"--workdir={root / name}", f"--config.train.steps={steps}", *flags),
        f"--config.data.cache_dir={root / 'cache'}",
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(root / "xla")}
    with (root / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)


def compare(expected: Path, found: Path) -> list[str]:
    """Returns a line for everything in which two work directories differ."""
    (state_a, loop_a), (state_b, loop_b) = _last(expected), _last(found)
    differences = []
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(state_a), jax.tree.leaves(state_b), strict=True
    ):
        if not np.array_equal(a, b, equal_nan=True):
            differences.append(f"state{jax.tree_util.keystr(path)} differs")
    print(f"compared {len(jax.tree.leaves(state_a))} arrays of the last checkpoint", flush=True)
    if repr(loop_a) != repr(loop_b):
        differences.append(f"the loop's state differs: {loop_a} and {loop_b}")
    records_a, records_b = _records(expected), _records(found)
    print(f"compared {len(records_a)} records of metrics.jsonl", flush=True)
    if len(records_a) != len(records_b):
        differences.append(f"{len(records_a)} records became {len(records_b)}")
    for a, b in zip(records_a, records_b, strict=False):
        if a != b:
            differences.append(f"the record {a} became {b}")
    return differences


def _last(workdir: Path) -> tuple[Any, dict[str, Any]]:
    with Checkpointer(workdir, read_only=True) as checkpointer:
        run = checkpointer.describe()
        config = config_lib.from_plain(run["config"])
        names = tuple(run["class_names"])
        experiment = build(config, names, np.asarray(run["palette"], np.uint8))
        restored = checkpointer.restore(experiment.abstract_state())
    assert restored is not None  # `describe` has found it
    return jax.device_get(restored.state), restored.loop


def _records(workdir: Path) -> list[dict[str, Any]]:
    rate = "train/images_per_second"
    return [{k: v for k, v in r.items() if k != rate} for r in writers.read_metrics(workdir)]


if __name__ == "__main__":
    sys.exit(run())
