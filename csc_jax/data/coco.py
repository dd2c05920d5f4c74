"""COCO 2017 (Lin et al., 2014) as semantic segmentation: 80 thing classes and background.

Layout: `train2017/*.jpg`, `val2017/*.jpg`, and in `masks/` one PNG of class ids for each image of
either split, 0 for background, 1..80 for the categories in the order of their official ids, 255 for
pixels to ignore: the masks that UniMatch publishes.
"""

from pathlib import PurePosixPath

from ml_collections import ConfigDict

from csc_jax.data import files
from csc_jax.data.example import Listing, Notes, Pair, check_splits, label_ids
from csc_jax.data.pascal_voc import colormap
from csc_jax.data.transforms import IGNORE

_NAMES = """
    background person bicycle car motorcycle airplane bus train truck boat traffic_light
    fire_hydrant stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear
    zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball
    kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass
    cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza
    donut cake chair couch potted_plant bed dining_table toilet tv laptop mouse remote
    keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors
    teddy_bear hair_drier toothbrush
"""
CLASS_NAMES = tuple(name.replace("_", " ") for name in _NAMES.split())
PALETTE = colormap()[: len(CLASS_NAMES)]  # Pascal VOC's; COCO has none of its own
_LABEL_IDS = label_ids({**{i: i for i in range(len(CLASS_NAMES))}, IGNORE: IGNORE})


def find(config: ConfigDict) -> Listing:
    """Lists the pairs of train and val in name order.

    Ids are bare file stems: `000000177254`. A train image without mask is an unlabelled one.

    Args:
      config: the `data` part of the configuration.

    Raises:
      UserError: if `data.root` or the images of a split are missing.
    """
    root = files.existing_root(config.root, "train2017/, val2017/ and masks/ of COCO 2017")
    masks, notes = files.find(root, "masks/*.png", ()), Notes()

    def pairs(split: str) -> list[Pair]:
        listed = []
        for path, image in files.find(root, f"{split}2017/*.jpg", ()).items():
            stem = PurePosixPath(path).stem
            mask = f"masks/{stem}.png"
            # Preparing names a val image whose mask is missing, with all other bad files.
            absent = root / mask if split == "val" else None
            listed.append(Pair(stem, image, masks.get(mask, absent), _LABEL_IDS, notes=notes))
        return listed

    splits = {split: pairs(split) for split in ("train", "val")}
    check_splits(splits, config.root, "{train,val}2017/*.jpg with masks/*.png")
    return Listing(CLASS_NAMES, PALETTE, splits, notes)
