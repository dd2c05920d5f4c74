"""Cityscapes (Cordts et al., 2016), fine annotations, 19 classes.

Layout, as the official archives unpack: `leftImg8bit/<split>/<city>/*_leftImg8bit.png` and
`gtFine/<split>/<city>/*_gtFine_labelIds.png`, splits train and val, or the archives themselves.
`leftImg8bit/train_extra` holds 19,998 more images, used without label where the config asks for it.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from csc_jax.data import files
from csc_jax.data.example import Listing, Notes, Pair, check_splits, label_ids
from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError

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

_ARCHIVES = ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip")
_EXTRA_ARCHIVE = "leftImg8bit_trainextra.zip"
# A black frame, which the data set's download page asks to delete.
_BLACK = "leftImg8bit/train_extra/troisdorf/troisdorf_000000_000073_leftImg8bit.png"


def find(config: ConfigDict) -> Listing:
    """Lists the pairs of each split in name order, then the extra images in theirs.

    Ids are image paths relative to `data.root`, as published split lists write them:
    `leftImg8bit/train/hamburg/hamburg_000000_080169_leftImg8bit.png`.

    Args:
      config: the `data` part of the configuration.

    Raises:
      UserError: if `data.root` or the images of a split are missing, or an archive is unusable.
    """
    layout = f"the Cityscapes archives {' and '.join(_ARCHIVES)}, or leftImg8bit/ and gtFine/"
    folder = files.existing_root(config.root, layout)
    archives = files.open_archives(folder, _ARCHIVES)
    notes = Notes()
    splits = {split: _pairs(folder, split, archives, notes) for split in ("train", "val")}
    pattern = f"leftImg8bit/<split>/<city>/*_leftImg8bit.png or {_ARCHIVES[0]}"
    check_splits(splits, config.root, pattern)
    if config.cityscapes.extra:
        splits["train"] += _extra(folder, notes)
    return Listing(CLASS_NAMES, PALETTE, splits, notes)


def _pairs(
    folder: Path, split: str, archives: Sequence[zipfile.ZipFile], notes: Notes
) -> list[Pair]:
    images = files.find(folder, f"leftImg8bit/{split}/*/*_leftImg8bit.png", archives)
    labels = files.find(folder, f"gtFine/{split}/*/*_gtFine_labelIds.png", archives)
    pairs = []
    for path, image in images.items():
        label = path.replace("leftImg8bit/", "gtFine/", 1).replace(
            "_leftImg8bit.png", "_gtFine_labelIds.png"
        )
        found = labels.get(label, folder / label)
        pairs.append(Pair(path, image, found, _LABEL_IDS, notes=notes))
    return pairs


def _extra(folder: Path, notes: Notes) -> list[Pair]:
    archives = files.open_archives(folder, (_EXTRA_ARCHIVE,))
    images = files.find(folder, "leftImg8bit/train_extra/*/*_leftImg8bit.png", archives)
    images.pop(_BLACK, None)
    if not images:
        raise UserError(
            f"data.cityscapes.extra is on, but data.root {folder} holds neither "
            f"leftImg8bit/train_extra nor {_EXTRA_ARCHIVE}; add one of them or switch it off."
        )
    return [Pair(path, image, None, _LABEL_IDS, notes=notes) for path, image in images.items()]
