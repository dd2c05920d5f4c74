"""What `scripts/benchmark.py` can time, one file each."""
