"""Trains `supervised`, then `csc`, on drawn street scenes, and compares them in a small table.

Command:    make demo, or python scripts/demo.py --workdir=runs/demo [--steps=N] [--seeds=3]
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "configs"))

import synthetic  # noqa: E402 - the config file beside this folder

from csc_jax import main  # noqa: E402
from csc_jax.errors import Interrupted, UserError  # noqa: E402
from csc_jax.reporting import writers  # noqa: E402
from csc_jax.text import printable  # noqa: E402
from csc_jax.training.loop import train  # noqa: E402

METHODS = ("supervised", "csc")
_INTRODUCTION = """\
The demo trains {methods}, {steps} steps each, on drawn street scenes of 64x64 px, 24 with
labels and 360 without, and compares them. 1,000 steps take 1 minute (supervised) and 3 (csc) on two
CPU cores; before the first of them nothing is printed for a while, as the step is compiled. No data
are downloaded. Ctrl-C stops the demo; the same command continues it.
"""


def run() -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=0, help="0 = those of configs/synthetic.py")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method, seeds 0, 1, …")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    arguments = parser.parse_args()
    steps = arguments.steps or synthetic.get_config().train.steps
    print(_INTRODUCTION.format(methods=", then ".join(arguments.methods), steps=steps))
    main.log_to_terminal()
    main.use_compilation_cache()
    miou: dict[str, list[float]] = {method: [] for method in arguments.methods}
    started = time.perf_counter()
    try:
        for seed in range(arguments.seeds):
            for method in arguments.methods:
                config = synthetic.get_config()
                config.method.name, config.seed = method, seed
                config.train.steps = steps
                scores = train(config, _workdir(arguments.workdir, method, seed))
                miou[method].append(100 * scores.miou)
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return error.exit_status
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_status
    print(f"\n{_table(arguments.workdir, miou)}")
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes. To look at:")
    for method in arguments.methods:
        for path in sorted((_workdir(arguments.workdir, method, 0) / "plots").glob("*.png")):
            print(f"  {path}")
    print(f"\n{_next_steps(_workdir(arguments.workdir, arguments.methods[-1], 0))}")
    return 0


def _next_steps(workdir: Path) -> str:
    """Returns commands to go on with, one of them on the run in `workdir`."""
    python, here = Path(sys.executable), Path.cwd()
    shown = python.relative_to(here) if python.is_relative_to(here) else python

    def command(*flags: str) -> str:
        return shlex.join([str(shown), "-m", "csc_jax.main", *flags])

    run = f"--workdir={workdir}"
    return f"""\
What to try next:
  score that run on all val images, and see its worst and best:
    {command("--mode=evaluate", run, "--checkpoint=best")}
  segment images, here those of DIR, with it:
    {command("--mode=predict", run, "--images=DIR", f"--out={workdir / 'predictions'}")}
  train on images of your own, laid out as in docs/data.md (better on a GPU):
    {command("--config=folder", "--config.data.root=DIR", "--workdir=runs/own")}
  see all modes and configs:
    {command("--help")}"""


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


if __name__ == "__main__":
    sys.exit(run())
