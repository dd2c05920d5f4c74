"""Times parts of the project; each prints a table of medians, ratios and memory.

Command:    python scripts/benchmark.py contrast [--bank_size=2000 …]
            python scripts/benchmark.py step [--config=configs/camvid.py …]
            python scripts/benchmark.py data [--config=configs/cityscapes.py --root=DIR …]
            python scripts/benchmark.py model [--backbone=resnet50 --convolutions …]
            python scripts/benchmark.py methods [--config=configs/camvid.py …]
            python scripts/benchmark.py health [--config=configs/synthetic.py …]
Each takes --help. The candidates of a table take turns within one run, so that a machine which
slows down slows all of them down.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SUBJECTS = ("contrast", "step", "data", "model", "methods", "health")


def run() -> int:
    """Runs the benchmark that the first argument names; returns the exit status."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in SUBJECTS:
        print(f"usage: benchmark.py {{{','.join(SUBJECTS)}}} --flag=value …", file=sys.stderr)
        return 2
    subject = sys.argv.pop(1)
    importlib.import_module(f"benchmarks.{subject}").run()
    return 0


if __name__ == "__main__":
    sys.exit(run())
