"""CamVid, the 11-class 480x360 edition of the SegNet authors (Brostow et al., 2008).

Layout: `images/<split>/<name>.jpg` (or .png) and `labels/<split>/<name>.png`, splits train, val
and test (optional); a label holds the class ids 0..10, and 11 for void.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from csc_jax.data import files
from csc_jax.data.example import Listing, Pair, check_splits, label_ids
from csc_jax.data.transforms import IGNORE

CLASS_NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
PALETTE = np.array(
    [
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ],
    np.uint8,
)
_LABEL_IDS = label_ids({**{i: i for i in range(len(CLASS_NAMES))}, 11: IGNORE, IGNORE: IGNORE})


def find(config: ConfigDict) -> Listing:
    """Lists the pairs of each split in name order; ids are bare file stems.

    Args:
      config: the `data` part of the configuration.

    Raises:
      UserError: if `data.root` or the images of train or val are missing.
    """
    folder = files.existing_root(config.root, "CamVid: images/{train,val} and labels/{train,val}")
    splits = {split: _pairs(folder, split) for split in ("train", "val", "test")}
    if not splits["test"]:
        del splits["test"]
    check_splits(splits, config.root, "images/<split>/*.jpg")
    return Listing(CLASS_NAMES, PALETTE, splits)


def _pairs(folder: Path, split: str) -> list[Pair]:
    images = sorted(
        path
        for path in (folder / "images" / split).glob("*")
        if path.suffix.lower() in files.IMAGE_SUFFIXES
    )
    return [
        Pair(path.stem, path, folder / "labels" / split / f"{path.stem}.png", _LABEL_IDS)
        for path in images
    ]
