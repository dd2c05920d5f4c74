"""Data sets: prepared once through TFDS (ArrayRecord), streamed through Grain.

`load` gives a `Dataset` of random-access splits, `partition` decides which train images are
labelled, `train_iterator` and `eval_batches` make batches of them.
"""

import difflib
from collections.abc import Mapping, Sequence
from types import ModuleType

from ml_collections import ConfigDict

from csc_jax.data import builder, camvid, cityscapes, pascal_voc, synthetic
from csc_jax.data.codec import read_image
from csc_jax.data.partition import Partition, partition, write_partition
from csc_jax.data.pipeline import check_crop, eval_batches, steps_per_epoch, train_iterator
from csc_jax.data.source import Dataset, Source
from csc_jax.errors import UserError

__all__ = [
    "Dataset",
    "Partition",
    "Source",
    "check_crop",
    "eval_batches",
    "load",
    "partition",
    "read_image",
    "steps_per_epoch",
    "train_iterator",
    "write_partition",
]

_FOLDERS: dict[str, ModuleType] = {
    "camvid": camvid,
    "cityscapes": cityscapes,
    "pascal_voc": pascal_voc,
}


def load(config: ConfigDict) -> Dataset:
    """Returns the data set `config.name`, which it checks and stores in `cache_dir` if it is new.

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
    module: ModuleType
    splits: Mapping[str, Sequence[builder.Example]]
    if config.name == "synthetic":
        module, splits = synthetic, synthetic.scenes(config.synthetic)
    elif config.name in _FOLDERS:
        module = _FOLDERS[config.name]
        splits = module.find(config.root)
    else:
        names = ["synthetic", *_FOLDERS]
        near = difflib.get_close_matches(config.name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"data.name is {config.name!r}, which is no known data set; {hint}There are "
            f"{', '.join(names)}."
        )
    return builder.prepare(
        config.name, module.CLASS_NAMES, module.PALETTE, splits, config.cache_dir, size
    )
