"""Checks every image of a data set and stores it for training.

Command:    csc-jax prepare --config=cityscapes --config.data.root=DIR
            … --config.SECTION.FIELD=VALUE     any field, as for training
Prints:     the images of each split, the classes, what the labels hold, and
            how many labelled and unlabelled images a run with this config has
Training does the same by itself. Bad files are reported all at once. A call
that was cut off goes on where it stopped.
"""

from collections.abc import Sequence

from csc_jax import command_help, command_line
from csc_jax.text import name


def main(arguments: Sequence[str]) -> int:
    """Prepares one data set; returns 0."""
    if command_help.asked(["csc-jax", *arguments]):
        print(__doc__)
        return 0
    from csc_jax import data
    from csc_jax.training.choice import fill_open

    config = command_line.parse(["csc-jax", *arguments])
    dataset = data.load(config.data)
    lists = data.partition(config.data, dataset, config.seed)
    fill_open(config, dataset, lists, before=None)  # which says what a run would have
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
