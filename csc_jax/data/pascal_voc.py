"""Pascal VOC 2012 segmentation (Everingham et al., 2010), 21 classes with background.

Layout: `VOCdevkit/VOC2012` with JPEGImages, SegmentationClass and ImageSets/Segmentation. Where
`SegmentationClassAug` and `train_aug.txt` are there too, the train split is the pool of 10,582
images that the field calls blender, else the classic 1,464.
"""

from pathlib import Path

import numpy as np

from csc_jax.data.builder import Pair, label_ids
from csc_jax.data.folders import checked, existing_root
from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError

CLASS_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def _colormap() -> np.ndarray:
    """The official palette, (256, 3) uint8 RGB: the bits of the index dealt out to R, G and B."""
    index, channel = np.arange(256)[:, None], np.arange(3)
    bits = [((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)]
    return np.sum(bits, axis=0).astype(np.uint8)


_COLORMAP = _colormap()
PALETTE = _COLORMAP[: len(CLASS_NAMES)]
_LABEL_IDS = label_ids({**{i: i for i in range(len(CLASS_NAMES))}, IGNORE: IGNORE})


def find(root: str) -> dict[str, list[Pair]]:
    """Returns the pairs of each split in the order of its list file; ids are bare file stems.

    Raises:
      UserError: if `root`, one of its parts or the list file of a split is missing.
    """
    folder = existing_root(root, "VOCdevkit/VOC2012, or that folder itself")
    for inner in ("VOCdevkit/VOC2012", "VOC2012"):
        if (folder / inner).is_dir():
            folder = folder / inner
            break
    augmented = folder / "SegmentationClassAug"
    has_pool = augmented.is_dir() and _list_file(folder, "train_aug").is_file()
    splits = {
        "train": _pairs(folder, "train_aug", augmented)
        if has_pool
        else _pairs(folder, "train", folder / "SegmentationClass"),
        "val": _pairs(folder, "val", folder / "SegmentationClass"),
    }
    return checked(splits, folder, "ids in ImageSets/Segmentation/<split>.txt")


def _list_file(folder: Path, name: str) -> Path:
    return folder / "ImageSets" / "Segmentation" / f"{name}.txt"


def _pairs(folder: Path, name: str, labels: Path) -> list[Pair]:
    listing = _list_file(folder, name)
    if not listing.is_file():
        raise UserError(
            f"data.root {folder} lacks {listing.relative_to(folder)}; it must be the VOC2012 "
            "folder of VOCdevkit with JPEGImages, SegmentationClass and ImageSets."
        )
    return [
        Pair(
            i, folder / "JPEGImages" / f"{i}.jpg", labels / f"{i}.png", _LABEL_IDS, colors=_COLORMAP
        )
        for i in listing.read_text(encoding="utf-8").split()
    ]
