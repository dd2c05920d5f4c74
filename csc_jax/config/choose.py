"""What a config leaves open, chosen from the data: crop, batch and length of a run.

A field is open where its value is one that no run can have: `data.crop_size` (0, 0),
`batch.labeled` and `batch.unlabeled` 0, `train.steps` and `train.epochs` both 0.
docs/own_images.md has the rules.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

LARGEST_CROP = 512  # px of a side
STEP_PIXELS = 4 * LARGEST_CROP**2  # of the labelled crops of a step, and of the unlabelled ones
BATCH = (2, 8)  # images: one alone gives BatchNorm little to measure
PASSES = 80  # over the unlabelled images, as in the paper (Sec. IV-B)
STEPS = (2_000, 40_000)


class Facts(NamedTuple):
    """What the choice depends on, the same on every machine."""

    size: tuple[int, int]  # (height, width) px, each the median of the train images
    labeled: int  # images of the run
    unlabeled: int  # images of the run
    multiple: int  # px that the sides of a crop are to be multiples of


class Choice(NamedTuple):
    """A value and why."""

    value: Any
    reason: str


def open_fields(config: ConfigDict) -> list[str]:
    """Returns the names of the fields that a config leaves open."""
    found = [] if any(config.data.crop_size) else ["data.crop_size"]
    found += [f"batch.{half}" for half in ("labeled", "unlabeled") if not config.batch[half]]
    if not config.train.steps and not config.train.epochs:
        found.append("train.steps")
    return found


def fill(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy that has `values`, {"section.field": value}, in its open fields alone."""
    config = config.copy_and_resolve_references()
    taken = {name: values[name] for name in open_fields(config)}
    config.update_from_flattened_dict(
        {name: tuple(v) if isinstance(v, list) else v for name, v in taken.items()}
    )
    return config


def choose(config: ConfigDict, facts: Facts) -> dict[str, Choice]:
    """Returns a value and its reason for each open field of a valid config."""
    chosen: dict[str, Choice] = {}
    is_open = open_fields(config)
    crop = tuple(config.data.crop_size)
    if "data.crop_size" in is_open:
        chosen["data.crop_size"] = _crop(facts)
        crop = chosen["data.crop_size"].value
    labeled = config.batch.labeled
    if "batch.labeled" in is_open:
        chosen["batch.labeled"] = _batch(crop, facts.labeled)
        labeled = chosen["batch.labeled"].value
    unlabeled = config.batch.unlabeled
    if "batch.unlabeled" in is_open:
        unlabeled = labeled
        chosen["batch.unlabeled"] = Choice(unlabeled, "as many as labelled ones")
    if "train.steps" in is_open:
        chosen["train.steps"] = _steps(facts, unlabeled)
    return chosen


def _crop(facts: Facts) -> Choice:
    height, width = (
        max(1, min(side, LARGEST_CROP) // facts.multiple) * facts.multiple for side in facts.size
    )
    reason = (
        f"the median train image is {facts.size[0]}x{facts.size[1]} px; a side is a multiple of "
        f"{facts.multiple} and at most {LARGEST_CROP}"
    )
    share = height * width / math.prod(facts.size)
    if share < 0.1:
        reason += f". That is {100 * share:.1g}% of an image: data.image_size=H,W shrinks all first"
    return Choice((height, width), reason)


def _batch(crop: tuple[int, ...], labeled: int) -> Choice:
    fit = STEP_PIXELS // math.prod(crop)
    images = max(BATCH[0], min(BATCH[1], fit, labeled))
    images = 1 << (images.bit_length() - 1)  # a power of 2, which several devices divide
    reason = f"{labeled} labelled images; {fit} crops are a step's {STEP_PIXELS / 1e6:.1f} million "
    return Choice(images, reason + f"px; a power of 2 from {BATCH[0]} to {BATCH[1]}")


def _steps(facts: Facts, batch: int) -> Choice:
    images = max(facts.unlabeled, facts.labeled)
    wanted = PASSES * images // batch
    steps = min(max(wanted, STEPS[0]), STEPS[1])
    reason = f"{PASSES} passes over {images} images are {wanted:,} steps of {batch}"
    if steps != wanted:
        reason += f"; at {'least' if steps > wanted else 'most'} {steps:,}"
    return Choice(steps, reason)
