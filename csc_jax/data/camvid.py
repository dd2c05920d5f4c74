"""CamVid, the 11-class 480x360 edition of the SegNet authors (Brostow et al., 2008).

Layout: `images/<split>/<name>.jpg` (or .png) and `labels/<split>/<name>.png`, splits train, val
and test (optional); a label holds the class ids 0..10, and 11 for void.
"""

from pathlib import Path

import numpy as np

from csc_jax.data.builder import Pair, label_ids
from csc_jax.data.folders import checked, existing_root
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
_SUFFIXES = (".jpg", ".jpeg", ".png")


def find(root: str) -> dict[str, list[Pair]]:
    """Returns the pairs of each split in name order; ids are bare file stems.

    Raises:
      UserError: if `root` or the images of train or val are missing.
    """
    folder = existing_root(root, "CamVid: images/{train,val} and labels/{train,val}")
    splits = {split: _pairs(folder, split) for split in ("train", "val", "test")}
    if not splits["test"]:
        del splits["test"]
    return checked(splits, folder, "images/<split>/*.jpg")


def _pairs(folder: Path, split: str) -> list[Pair]:
    images = (p for p in (folder / "images" / split).glob("*") if p.suffix.lower() in _SUFFIXES)
    return [
        Pair(path.stem, path, folder / "labels" / split / f"{path.stem}.png", _LABEL_IDS)
        for path in sorted(images)
    ]
