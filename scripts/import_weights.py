"""`csc-jax import-weights` of this checkout: python scripts/import_weights.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from csc_jax import main

if __name__ == "__main__":
    sys.exit(main.main(["csc-jax", "import-weights", *sys.argv[1:]]))
