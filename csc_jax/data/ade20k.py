"""ADE20K, the scene parsing benchmark of 2016 (Zhou et al., 2017): 150 classes.

Layout, as `ADEChallengeData2016` unpacks: `images/{training,validation}/*.jpg` and
`annotations/{training,validation}/*.png`. The official annotations hold 0 for unlabelled pixels
and 1..150 for the classes. Those that UniMatch V2 publishes hold 0..149, and 255 for unlabelled.
"""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from ml_collections import ConfigDict

from csc_jax.data import codec, files
from csc_jax.data.example import Listing, Notes, Pair, check_splits, label_ids
from csc_jax.data.pascal_voc import colormap
from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError

# The first synonym of each entry of objectInfo150.txt, in its order.
_NAMES = """
    wall building sky floor tree ceiling road bed windowpane grass cabinet sidewalk person
    earth door table mountain plant curtain chair car water painting sofa shelf house sea
    mirror rug field armchair seat fence desk rock wardrobe lamp bathtub railing cushion
    base box column signboard chest_of_drawers counter sand sink skyscraper fireplace
    refrigerator grandstand path stairs runway case pool_table pillow screen_door stairway
    river bridge bookcase blind coffee_table toilet flower book hill bench countertop stove
    palm kitchen_island computer swivel_chair boat bar arcade_machine hovel bus towel light
    truck tower chandelier awning streetlight booth television_receiver airplane dirt_track
    apparel pole land bannister escalator ottoman bottle buffet poster stage van ship
    fountain conveyer_belt canopy washer plaything swimming_pool stool barrel basket
    waterfall tent bag minibike cradle oven ball food step tank trade_name microwave pot
    animal bicycle lake dishwasher screen blanket sculpture hood sconce vase traffic_light
    tray ashcan fan pier crt_screen plate monitor bulletin_board shower radiator glass clock
    flag
"""
CLASS_NAMES = tuple(name.replace("_", " ") for name in _NAMES.split())
_COUNT = len(CLASS_NAMES)
PALETTE = colormap()[1 : _COUNT + 1]  # Pascal VOC's; the benchmark has none of its own

_LABEL_IDS = {
    "official": label_ids({0: IGNORE} | {i + 1: i for i in range(_COUNT)}),
    "shifted": label_ids({i: i for i in range(_COUNT)} | {IGNORE: IGNORE}),
}
_LOOKED_AT = 200  # annotations of a split; nearly every image has unlabelled pixels


def find(config: ConfigDict) -> Listing:
    """Lists the pairs of train and val in name order.

    Ids are bare file stems: `ADE_train_00001609`.

    Args:
      config: the `data` part of the configuration. `ade20k.labels` names the coding of the
        annotations: "official", "shifted", or "auto" to tell it by the values that only one of the
        two has.

    Raises:
      UserError: if `data.root` or the images of a split are missing, or the coding cannot be told.
    """
    layout = "images/ and annotations/ of ADEChallengeData2016"
    root = files.existing_root(config.root, layout)
    found = {"train": _files(root, "training"), "val": _files(root, "validation")}
    coding = config.ade20k.labels
    if coding == "auto":
        ends = [label for listed in found.values() for _, label in listed[:_LOOKED_AT]]
        coding = _coding(ends, root) if ends else "official"
    table, notes = _LABEL_IDS[coding], Notes()
    splits = {
        split: [Pair(label.stem, image, label, table, notes=notes) for image, label in listed]
        for split, listed in found.items()
    }
    check_splits(splits, config.root, "images/{training,validation}/*.jpg")
    return Listing(CLASS_NAMES, PALETTE, splits, notes)


def _files(root: Path, split: str) -> list[tuple[files.File, Path]]:
    """Returns each image with the place of its annotation, which may be missing."""
    images = files.find(root, f"images/{split}/*.jpg", ())
    folder = root / "annotations" / split
    return [(image, folder / f"{PurePosixPath(path).stem}.png") for path, image in images.items()]


def _coding(labels: Iterable[Path], root: Path) -> str:
    """Tells the coding: 150 is only in official annotations, 255 only in shifted ones."""
    for path in labels:
        try:
            stored = codec.decode_mask(path.read_bytes(), path.suffix).values
        except (OSError, codec.Unusable):  # preparing names it, with all others
            continue
        official, shifted = np.any(stored == _COUNT), np.any(stored == IGNORE)
        if official != shifted:
            return "official" if official else "shifted"
        if official:
            fault = f"{path} holds both {_COUNT} and {IGNORE}"
            break
    else:
        fault = f"its first annotations hold neither {_COUNT} nor {IGNORE}"
    raise UserError(
        f"data.root {root}: {fault}, so the coding of the annotations cannot be told. Name it: "
        "--config.data.ade20k.labels=official (0 is unlabelled, classes from 1) or =shifted "
        "(classes from 0, 255 is unlabelled)."
    )
