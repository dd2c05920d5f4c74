"""`benchmark.py startup`: seconds from the command to the first finished step.

Each config is trained as a user would, in a process of its own, twice: with an empty compilation
cache and with what the first left there, stopped after its first step. The data are prepared
before, as that happens once. The time ends with the record of the first step, which waits for its
result.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import machine
from csc_jax.reporting import writers

ROOT = Path(__file__).parents[2]
LIMIT = 600.0  # seconds after which a run is given up


def run() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="benchmark.py startup", description=__doc__)
    parser.add_argument("--config", type=Path, nargs="+", default=[ROOT / "configs/synthetic.py"])
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--set", nargs="*", default=[], help="further fields: data.root=DIR …")
    options = parser.parse_args()
    print(machine())
    print(f"seconds from the command to the end of the first step, {options.backbone}:")
    for path in options.config:
        fields = [f"model.backbone={options.backbone}", "train.log_every=1", *options.set]
        with tempfile.TemporaryDirectory() as folder:
            _prepare(path, fields)
            cold = _first_step(path, fields, Path(folder), "cold")
            warm = _first_step(path, fields, Path(folder), "warm")
        print(f"{path.name:<16} {cold:6.1f} cold  {warm:6.1f} with the compilation cache")


def _flags(path: Path, fields: list[str]) -> list[str]:
    return [f"--config={path}", *(f"--config.{field}" for field in fields)]


def _prepare(path: Path, fields: list[str]) -> None:
    command = [sys.executable, ROOT / "scripts" / "prepare_data.py", *_flags(path, fields)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _first_step(path: Path, fields: list[str], folder: Path, name: str) -> float:
    """Trains until there is a record, and returns the seconds that it took."""
    workdir = folder / name
    command = [sys.executable, "-m", "csc_jax.main", f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    with (folder / "errors.txt").open("w+") as errors:
        started = time.perf_counter()
        with subprocess.Popen(
            [*command, *_flags(path, fields)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        ) as process:
            try:
                while not writers.read_metrics(workdir):
                    if process.poll() is not None or time.perf_counter() - started > LIMIT:
                        errors.seek(0)
                        raise SystemExit(f"{path.name}: no step in {LIMIT:.0f} s.\n{errors.read()}")
                    time.sleep(0.05)
                taken = time.perf_counter() - started
                process.terminate()  # it ends in order: part of the cache is yet to be written
                process.wait(LIMIT)
                return taken
            finally:
                process.kill()
