"""Cityscapes (Cordts et al., 2016), fine annotations, 19 classes.

Layout, as the official archives unpack: `leftImg8bit/<split>/<city>/*_leftImg8bit.png` and
`gtFine/<split>/<city>/*_gtFine_labelIds.png`, splits train and val.
"""

from pathlib import Path

import numpy as np

from csc_jax.data.builder import Pair, label_ids
from csc_jax.data.folders import checked, existing_root
from csc_jax.data.transforms import IGNORE

# name, label id in the PNG files, colour; the order is that of the official train ids.
_CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
CLASS_NAMES = tuple(name for name, _, _ in _CLASSES)
PALETTE = np.array([color for _, _, color in _CLASSES], np.uint8)
# Label ids 0..33 and -1 (license plate, stored as 255) that are no train class are not scored.
_LABEL_IDS = label_ids(
    dict.fromkeys((*range(34), 255), IGNORE)
    | {label_id: train_id for train_id, (_, label_id, _) in enumerate(_CLASSES)}
)


def find(root: str) -> dict[str, list[Pair]]:
    """Returns the pairs of each split in name order.

    Ids are image paths relative to `root`, as published split lists write them:
    `leftImg8bit/train/hamburg/hamburg_000000_080169_leftImg8bit.png`.

    Raises:
      UserError: if `root` or the images of a split are missing.
    """
    folder = existing_root(root, "the unpacked Cityscapes archives: leftImg8bit/ and gtFine/")
    splits = {split: _pairs(folder, split) for split in ("train", "val")}
    return checked(splits, folder, "leftImg8bit/<split>/<city>/*_leftImg8bit.png")


def _pairs(folder: Path, split: str) -> list[Pair]:
    pairs = []
    for image in sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")):
        stem = image.name.removesuffix("_leftImg8bit.png")
        label = folder / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"
        pairs.append(Pair(image.relative_to(folder).as_posix(), image, label, _LABEL_IDS))
    return pairs
