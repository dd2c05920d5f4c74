"""Pascal VOC 2012 segmentation (Everingham et al., 2010), 21 classes with background.

Layout: `VOCdevkit/VOC2012` with JPEGImages, SegmentationClass and ImageSets/Segmentation, and the
augmented annotations (SBD, Hariharan et al., 2011) as PNGs in `SegmentationClassAug`, as the
`cls/*.mat` of SBD in `SBD` or `benchmark_RELEASE/dataset`, or both.
"""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from ml_collections import ConfigDict

from csc_jax.data import files
from csc_jax.data.example import Listing, Notes, Pair, check_splits, label_ids
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


def colormap() -> np.ndarray:
    """The official palette, (256, 3) uint8 RGB: the bits of the index dealt out to R, G and B."""
    index, channel = np.arange(256)[:, None], np.arange(3)
    bits = [((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)]
    return np.sum(bits, axis=0).astype(np.uint8)


PALETTE = colormap()[: len(CLASS_NAMES)]
_LABEL_IDS = label_ids({**{i: i for i in range(len(CLASS_NAMES))}, IGNORE: IGNORE})
_LONGEST_NAME = 200  # bytes; file systems take 255, suffix included
_SBD_FOLDERS = ("SBD", "benchmark_RELEASE/dataset")


def find(config: ConfigDict) -> Listing:
    """Lists the pairs of train in name order and of val in that of its list file.

    Ids are bare file stems. The train split is the pool that published work draws from, 10,582
    images: `train_aug.txt` or `trainaug.txt` if there is one, else VOC's own 1,464 and all that the
    augmented annotations hold, less those of val. With `data.pascal_voc.pool` "blender" all of them
    can be labelled ones, with "classic" VOC's own alone.

    Args:
      config: the `data` part of the configuration.

    Raises:
      UserError: if `data.root`, one of its parts or a list file is missing.
    """
    root = files.existing_root(config.root, "VOCdevkit/VOC2012, or that folder itself")
    inner = (root / name for name in ("VOCdevkit/VOC2012", "VOC2012"))
    folder = next((path for path in inner if files.is_folder(path, "data.root")), root)
    own, val = set(_list(folder, "train")), _list(folder, "val")
    augmented = _augmented(root, folder)
    blender = config.pascal_voc.pool == "blender"

    def train_label(name: str) -> Path | None:
        if name in own:  # the better ones, as in the field's conversion of SBD
            return folder / "SegmentationClass" / f"{name}.png"
        missing = folder / "SegmentationClassAug" / f"{name}.png"
        return augmented.get(name, missing) if blender else None

    def pair(name: str, label: Path | None) -> Pair:
        image = folder / "JPEGImages" / f"{name}.jpg"
        return Pair(name, image, label, _LABEL_IDS, notes=notes)

    notes = Notes()
    splits = {
        "train": [pair(name, train_label(name)) for name in _pool(folder, own, val, augmented)],
        "val": [pair(name, folder / "SegmentationClass" / f"{name}.png") for name in val],
    }
    check_splits(splits, config.root, "ids in ImageSets/Segmentation/<split>.txt")
    if blender and not augmented:
        raise UserError(
            f"data.root {root} lacks the augmented annotations: SegmentationClassAug/*.png in "
            f"{folder}, or cls/*.mat in {' or '.join(_SBD_FOLDERS)}. Add one of them, or have the "
            "labelled images drawn from VOC's own with --config.data.pascal_voc.pool=classic."
        )
    return Listing(CLASS_NAMES, PALETTE, splits, notes)


def _list_file(folder: Path, name: str) -> Path:
    return folder / "ImageSets" / "Segmentation" / f"{name}.txt"


def _list(folder: Path, name: str) -> list[str]:
    path = _list_file(folder, name)
    if not files.is_file(path, "data.root"):
        raise UserError(
            f"data.root {folder} lacks {path.relative_to(folder)}; it must be the VOC2012 "
            "folder of VOCdevkit with JPEGImages, SegmentationClass and ImageSets."
        )
    # Some lists of the pool write "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png". Without their
    # folders, entries cannot name a file elsewhere.
    lines = map(str.strip, files.read_text(path, "data.root").split("\n"))
    entries = [line.split()[0] for line in lines if line and not line.startswith("#")]
    names = [PurePosixPath(entry.replace("\\", "/")).stem for entry in entries]
    for name in names:
        if not name.isprintable() or not 0 < len(name.encode()) <= _LONGEST_NAME:
            raise UserError(
                f"{path} holds {name[:50]!r}, which can be no name of an image; it takes one id a "
                "line, such as 2007_000032."
            )
    return names


def _augmented(root: Path, folder: Path) -> dict[str, Path]:
    """Returns the augmented label of each image; a PNG goes before a .mat file."""
    found: dict[str, Path] = {}
    for base in (root, folder):
        for name in _SBD_FOLDERS:
            found |= _by_stem(base / name / "cls", ".mat")
    return found | _by_stem(folder / "SegmentationClassAug", ".png")


def _by_stem(folder: Path, suffix: str) -> dict[str, Path]:
    if not files.is_folder(folder, "data.root"):
        return {}
    found = files.walk(folder, (suffix,)).found
    return {path.stem: path for name, path in found.items() if "/" not in name}


def _pool(
    folder: Path, own: Iterable[str], val: Iterable[str], augmented: Iterable[str]
) -> list[str]:
    # In name order, so that one seed draws the same images however the pool is given.
    for name in ("train_aug", "trainaug"):
        if files.is_file(_list_file(folder, name), "data.root"):
            pool = sorted(_list(folder, name))
            break
    else:
        name, pool = "train", sorted({*own, *augmented} - set(val))
        pool = sorted({*pool, *own})
    shared = sorted(set(pool) & set(val))
    if shared:
        raise UserError(
            f"{_list_file(folder, name)} names {shared[0]}, which {_list_file(folder, 'val')} "
            f"names too ({len(shared)} images are on both); a val image is never trained on. Take "
            "the ids out of one of the lists."
        )
    return pool
