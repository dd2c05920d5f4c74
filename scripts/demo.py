"""Trains `supervised`, then `csc`, on drawn street scenes, and compares them in a small table.

Command:    make demo, or python scripts/demo.py --workdir=runs/demo [--steps=N] [--seeds=3]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "configs"))

import synthetic  # noqa: E402 - the config file beside this folder

from csc_jax import main, writers  # noqa: E402
from csc_jax.errors import UserError  # noqa: E402
from csc_jax.train import train  # noqa: E402

METHODS = ("supervised", "csc")


def run() -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=0, help="0 = those of configs/synthetic.py")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method, seeds 0, 1, …")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    arguments = parser.parse_args()
    main.log_to_terminal()
    main.use_compilation_cache()
    miou: dict[str, list[float]] = {method: [] for method in arguments.methods}
    started = time.perf_counter()
    try:
        for seed in range(arguments.seeds):
            for method in arguments.methods:
                config = synthetic.get_config()
                config.method.name, config.seed = method, seed
                if arguments.steps:
                    config.train.steps = arguments.steps
                scores = train(config, _workdir(arguments.workdir, method, seed))
                miou[method].append(100 * scores.miou)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{_table(arguments.workdir, miou)}")
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes. To look at:")
    for method in arguments.methods:
        for path in sorted((_workdir(arguments.workdir, method, 0) / "plots").glob("*.png")):
            print(f"  {path}")
    return 0


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
    # Separ of a bank that still lacks classes is not comparable: start where the bank is ready.
    values = [
        record[key]
        for record in records
        if record.get(key) is not None and record.get("train/ready", 1.0) == 1.0
    ]
    return f"{values[0]:.3f} → {values[-1]:.3f}" if values else "-"


if __name__ == "__main__":
    sys.exit(run())
