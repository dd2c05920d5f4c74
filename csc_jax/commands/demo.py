"""Trains `supervised`, then `csc`, on drawn street scenes, and compares them.

Command:    csc-jax demo --workdir=runs/demo [--steps=N] [--seeds=3]
Hardware:   2 CPU cores; 5 minutes. No data are downloaded.
Prints:     a small table of mIoU, Separ and Cons, the paths of the pictures,
            and what to try next
"""

import argparse
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from csc_jax import compilation_cache
from csc_jax.commands import at_least_one
from csc_jax.config import files as config_files
from csc_jax.methods import available
from csc_jax.reporting import writers
from csc_jax.training.loop import train

METHODS = ("supervised", "csc")
_INTRODUCTION = """\
The demo trains {methods}, {steps} steps each, on drawn street scenes of 64x64 px, 24 with
labels and 360 without, and compares them. 1,000 steps take 1 minute (supervised) and 3 (csc) on two
CPU cores; before the first of them nothing is printed for a while, as the step is compiled. No data
are downloaded. Ctrl-C stops the demo; the same command continues it.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the demo; returns 0."""
    parser = argparse.ArgumentParser(
        prog="csc-jax demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=at_least_one, help="default: those of the config synthetic")
    parser.add_argument(
        "--seeds", type=at_least_one, default=1, help="runs of each method, seeds 0, 1, …"
    )
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, choices=available(), metavar="METHOD"
    )
    options = parser.parse_args(arguments)
    steps = options.steps or _config().train.steps
    print(_INTRODUCTION.format(methods=", then ".join(options.methods), steps=steps))
    compilation_cache.use()
    miou: dict[str, list[float]] = {method: [] for method in options.methods}
    started = time.perf_counter()
    for seed in range(options.seeds):
        for method in options.methods:
            config = _config()
            config.method.name, config.seed = method, seed
            config.train.steps = steps
            scores = train(config, _workdir(options.workdir, method, seed))
            miou[method].append(100 * scores.miou)
    print(f"\n{_table(options.workdir, miou)}")
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes. To look at:")
    for method in options.methods:
        workdir = _workdir(options.workdir, method, 0)
        for path in (workdir / "report.html", *sorted((workdir / "plots").glob("*.png"))):
            print(f"  {path}")
    print(f"\n{_next_steps(_workdir(options.workdir, options.methods[-1], 0))}")
    return 0


def _config() -> ConfigDict:
    config: ConfigDict = runpy.run_path(str(config_files.folder() / "synthetic.py"))["get_config"]()
    return config


def _next_steps(workdir: Path) -> str:
    """Returns commands to go on with, one of them on the run in `workdir`."""

    def command(*words: str) -> str:
        return shlex.join([*_program(), *words])

    run = f"--workdir={workdir}"
    return f"""\
What to try next:
  score that run on all val images, and see its worst and best:
    {command("evaluate", run, "--checkpoint=best")}
  segment images, here those of DIR, with it:
    {command("predict", run, "--images=DIR", f"--out={workdir / 'predictions'}")}
  train on images of your own, laid out as in docs/own_images.md (better on a GPU):
    {command("train", "--config=folder", "--config.data.root=DIR", "--workdir=runs/own")}
  see all commands and configs:
    {command("--help")}"""


def _program() -> list[str]:
    """Returns what calls this package from here: by name where that is on the path."""
    python, here = Path(sys.executable), Path.cwd()
    if shutil.which("csc-jax") == str(python.with_name("csc-jax")):
        return ["csc-jax"]
    shown = python.relative_to(here) if python.is_relative_to(here) else python
    return [str(shown), "-m", "csc_jax.main"]


def _workdir(root: Path, method: str, seed: int) -> Path:
    return root / f"{method}_seed{seed}"


def _table(root: Path, miou: dict[str, list[float]]) -> str:
    """mIoU of each method, and Separ and Cons (Eq. 9, 7) at the first and last record of seed 0."""
    lines = [f"{'method':<14}{'mIoU %':>16}   {'Separ first → last':<22}{'Cons first → last'}"]
    for method, values in miou.items():
        score = f"{np.mean(values):.2f}"
        if len(values) > 1:
            score += f" ± {np.std(values, ddof=1):.2f}"
        records = writers.read_metrics(_workdir(root, method, 0))
        measures = [
            _first_and_last(records, key) for key in ("train/separation", "train/consistency")
        ]
        lines.append(f"{method:<14}{score:>16}   {measures[0]:<22}{measures[1]}")
    return "\n".join(lines)


def _first_and_last(records: list[dict[str, float]], key: str) -> str:
    ready = filter(writers.bank_was_ready, records)
    values = [record[key] for record in ready if record.get(key) is not None]
    return f"{values[0]:.3f} → {values[-1]:.3f}" if values else "-"
