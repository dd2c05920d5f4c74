"""What the tests of the data have in common."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from csc_jax import data
from csc_jax.config import default_config


def data_config(tmp_path: Path, **fields: object) -> ConfigDict:
    """Returns a whole config of a CamVid tree in tmp_path/root; `fields` of `data` are changed."""
    c = default_config()
    c.data.name, c.data.root = "camvid", str(tmp_path / "root")
    c.data.cache_dir = str(tmp_path / "cache")
    c.data.crop_size, c.data.labeled_fraction = (16, 16), "1/4"
    c.batch.labeled, c.batch.unlabeled = 2, 3
    return changed(c, **fields)


def changed(config: ConfigDict, **fields: object) -> ConfigDict:
    """Returns a copy with fields of `data` changed, given with "__" for each dot."""
    copy = config.copy_and_resolve_references()
    copy.data.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return copy


def prepared(tmp_path: Path) -> list[Path]:
    """Returns the folders of the cache that a run would take for whole."""
    return sorted((tmp_path / "cache").glob("*/*/2.0.0"))


def take(iterator, count: int) -> list:
    return [next(iterator) for _ in range(count)]


def assert_same_batches(first: list, second: list) -> None:
    for one, other in zip(first, second, strict=True):
        for half in ("labeled", "unlabeled"):
            for key in ("image", "label", "inside"):
                np.testing.assert_array_equal(one[half][key], other[half][key])


def counted_dataset(ids, without_label=()) -> data.Dataset:
    """Returns a data set that has ids and no images."""
    source = data.Source(tuple(ids), (24, 32), (), frozenset(without_label))
    return data.Dataset("fake", ("a",), np.zeros((1, 3), np.uint8), {"train": source})
