"""`csc-jax import-annotations` of this checkout: python scripts/import_annotations.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from csc_jax import main

if __name__ == "__main__":
    sys.exit(main.main(["csc-jax", "import-annotations", *sys.argv[1:]]))
