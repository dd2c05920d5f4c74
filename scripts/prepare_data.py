"""Checks every image of a data set and stores it for training, which else does that by itself.

Command:    python scripts/prepare_data.py --config=configs/cityscapes.py --config.data.root=DIR
Bad files are reported all at once. A call that was cut off goes on where it stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from csc_jax import command_help, data, main
from csc_jax.errors import UserError
from csc_jax.text import name, printable


def run(argv: Sequence[str]) -> int:
    """Prepares one data set; returns the exit status: 0, or 2 for bad input."""
    if command_help.asked(argv):
        print(__doc__)
        return 0
    main.log_to_terminal()
    try:
        config = main.parse(argv)
        dataset = data.load(config.data)
        lists = data.partition(config.data, dataset, config.seed)
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    for split, source in dataset.sources.items():
        labeled = len(source) - len(source.without_label)
        some = f", {labeled} with a label" if source.without_label else ""
        height, width = source.max_size
        print(f"{split:<5} {len(source):>5} images{some}, up to {height}x{width} px")
    print(f"{len(dataset.class_names)} classes: {', '.join(map(name, dataset.class_names))}")
    print(
        f"A run with this config has {len(lists.labeled)} labelled and {len(lists.unlabeled)} "
        "unlabelled images."
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv))
