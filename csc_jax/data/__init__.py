"""Data sets: prepared once through TFDS (ArrayRecord), streamed through Grain.

`load` gives a `Dataset` of random-access splits, `partition` decides which train images are
labelled, `train_iterator` and `eval_batches` make batches of them.
"""

import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from csc_jax.config import bands
from csc_jax.data import (
    ade20k,
    builder,
    camvid,
    census,
    cityscapes,
    coco,
    folder,
    moments,
    pascal_voc,
    synthetic,
)
from csc_jax.data.codec import cpu_count, read_image
from csc_jax.data.example import Listing
from csc_jax.data.partition import Partition, partition, write_partition
from csc_jax.data.pipeline import (
    TrainIterator,
    abstract_batch,
    check_crop,
    eval_batches,
    steps_per_epoch,
    train_iterator,
)
from csc_jax.data.source import Dataset, Source
from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")

__all__ = [
    "Dataset",
    "Partition",
    "Source",
    "TrainIterator",
    "abstract_batch",
    "check_crop",
    "cpu_count",
    "eval_batches",
    "find",
    "load",
    "partition",
    "read_image",
    "steps_per_epoch",
    "train_iterator",
    "write_partition",
]

log = logging.getLogger("csc_jax")

# What each name finds at `data.root`.
_FINDERS: dict[str, Callable[[ConfigDict], Listing]] = {
    "synthetic": synthetic.find,
    "camvid": camvid.find,
    "cityscapes": cityscapes.find,
    "pascal_voc": pascal_voc.find,
    "ade20k": ade20k.find,
    "coco": coco.find,
    "folder": folder.find,
}


def load(config: ConfigDict) -> Dataset:
    """Returns the data set `config.name`, which it checks and stores in `cache_dir` if it is new.

    Logs the census of its labels, and a warning for what is odd about it.

    Args:
      config: the `data` part of the configuration.

    Raises:
      UserError: for an unknown name, or a folder or files that cannot be used.
    """
    size = tuple(config.image_size)
    if min(size) < 0 or (min(size) == 0 and max(size) > 0):
        raise UserError(
            f"data.image_size is {size}; give height and width in px, or (0, 0) for own size."
        )
    listing = find(config)
    kept = config.bands if bands.keeps_values(config) else 0
    dataset = builder.prepare(config.name, listing, config.cache_dir, size, kept)
    if dataset.pixels is not None:
        _look_at_values(dataset.pixels, config)
    for line in listing.notes.lines() if listing.notes else ():
        log.warning("%s: %s", config.name, line)
    log.info("%s", census.table(dataset.census, dataset.class_names))
    for warning in census.warnings(dataset.census, dataset.class_names, dataset.name):
        log.warning("%s", warning)
    return dataset


def find(config: ConfigDict) -> Listing:
    """Returns the images of the data set `config.name` as they are at `config.root`.

    Args:
      config: the `data` part of the configuration.

    Raises:
      UserError: for an unknown name, or a folder that cannot be used.
    """
    if config.name not in _FINDERS:
        near = difflib.get_close_matches(config.name, _FINDERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"data.name is {config.name!r}, which is no known data set; {hint}There are "
            f"{', '.join(_FINDERS)}."
        )
    return _FINDERS[config.name](config)


def _look_at_values(found: Mapping[str, Any], config: ConfigDict) -> None:
    """Says what images that keep their values hold.

    Raises:
      UserError: they are not of `data.pixel_type`, or a band that is to be normalised by what was
        measured holds one value alone.
    """
    numbers = ", ".join(
        f"{mean:.6g} ± {std:.6g}" for mean, std in zip(found["mean"], found["std"], strict=True)
    )
    log.info(
        "Images keep their values, %s of %d band%s; mean and deviation over the train images: %s",
        *(found["pixel_type"], config.bands, "s" * (config.bands > 1), numbers),
    )
    if config.pixel_type and config.pixel_type != found["pixel_type"]:
        raise UserError(
            f"data.pixel_type is {config.pixel_type!r}, but the images of data.root are of "
            f"{found['pixel_type']}. Values of another type are on another scale; give images of "
            "that type."
        )
    constant = moments.constant(found["std"])
    if constant and bands.to_be_measured(config):
        raise UserError(
            f"Band {constant[0]} of the {config.bands} holds one value in all train images, so it "
            "tells nothing and has no deviation to divide by. Leave it out of the images, or give "
            "data.mean and data.std."
        )
