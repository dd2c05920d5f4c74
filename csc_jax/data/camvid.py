"""CamVid, the 11-class 480x360 edition of the SegNet authors (Brostow et al., 2008).

Layout: `images/<split>/<name>.jpg` (or .png) and `labels/<split>/<name>.png`, splits train, val
and test (optional); a label holds the class ids 0..10, and 11 for void.
"""

from pathlib import Path, PurePosixPath

import numpy as np
from ml_collections import ConfigDict

from csc_jax.data import files
from csc_jax.data.example import Listing, Notes, Pair, check_splits, label_ids
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
_SPLITS = ("train", "val", "test")
_LABEL_IDS = label_ids({**{i: i for i in range(len(CLASS_NAMES))}, 11: IGNORE, IGNORE: IGNORE})


def find(config: ConfigDict) -> Listing:
    """Lists the pairs of each split in name order; ids are bare file stems.

    Args:
      config: the `data` part of the configuration.

    Raises:
      UserError: if `data.root` or the images of train or val are missing.
    """
    root = files.existing_root(config.root, "CamVid: images/{train,val} and labels/{train,val}")
    notes = Notes()
    splits = {split: _pairs(root, split, config.image_bits, notes) for split in _SPLITS}
    if not splits["test"]:
        del splits["test"]
    check_splits(splits, config.root, "images/<split>/*.jpg")
    return Listing(CLASS_NAMES, PALETTE, splits, notes)


def _pairs(root: Path, split: str, bits: int, notes: Notes) -> list[Pair]:
    folders = {kind: root / kind / split for kind in ("images", "labels")}
    images, labels = (
        files.walk(folder, suffixes).found if files.is_folder(folder, "data.root") else {}
        for folder, suffixes in (
            (folders["images"], files.IMAGE_SUFFIXES),
            (folders["labels"], (".png",)),
        )
    )
    label_of = {PurePosixPath(name).with_suffix(""): path for name, path in labels.items()}
    pairs = []
    for name, image in images.items():
        stem = PurePosixPath(name).with_suffix("")
        label = label_of.get(stem, folders["labels"] / f"{stem}.png")
        pairs.append(Pair(stem.name, image, label, _LABEL_IDS, bits, notes))
    return pairs
