"""Batches: an endless, resumable train stream (Grain) and one pass for evaluation."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from csc_jax.data import transforms
from csc_jax.data.partition import Partition
from csc_jax.data.source import Dataset, Source
from csc_jax.errors import UserError

# Each stream and each use of randomness in it draws from a seed of its own.
_LABELED, _UNLABELED = 0, 1


@dataclasses.dataclass(frozen=True)
class WeakAugmentation(grain.transforms.RandomMap):
    """Random resize, crop and flip (decisions.md 22).

    Attributes:
      fill: RGB, 0..255, around an image smaller than the crop.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]
    flip: bool
    fill: tuple[int, int, int]

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, label = element["image"], element["label"]
        image, label = transforms.random_resize(image, label, rng, self.scale_range)
        maps: tuple[np.ndarray, ...] = transforms.random_crop(
            image, label, rng, self.crop_size, self.fill
        )
        if self.flip:
            maps = transforms.random_flip(maps, rng)
        return dict(zip(("image", "label", "inside"), maps, strict=True))


def train_iterator(
    config: ConfigDict, dataset: Dataset, partition: Partition
) -> grain.DatasetIterator:
    """Returns the endless train stream.

    Each element is {"labeled": {...}, "unlabeled": {...}}, each half with image (B, h, w, 3)
    uint8 RGB, label (B, h, w) uint8, 255 = ignore, and inside (B, h, w) bool, False on padding.
    The unlabelled half carries its labels for the metric of pseudo-label accuracy alone. Both
    lists repeat without end, each reshuffled at every pass; an image's place and its augmentation
    depend on (seed, pass, place in the pass) only, not on timing, threads or what was read before,
    so `get_state` is one number.

    Raises:
      UserError: if the crop is larger than the images, or a field of `config.data` is out of range.
    """
    check_crop(config.data, dataset)
    low, high = config.data.scale_range
    if not 0 < low <= 1 <= high:
        raise UserError(
            f"data.scale_range is ({low}, {high}); it must hold a ratio in (0, 1] and one of at "
            "least 1, and (1, 1) switches the random resize off."
        )
    red, green, blue = (round(value) for value in config.data.mean)
    augment = WeakAugmentation(
        crop_size=tuple(config.data.crop_size),
        scale_range=(low, high),
        flip=config.data.flip,
        fill=(red, green, blue),
    )
    source = dataset.sources["train"]
    labeled, unlabeled = (
        _stream(source, ids, augment, batch, np.random.SeedSequence([config.seed, stream]))
        for ids, batch, stream in (
            (partition.labeled, config.batch.labeled, _LABELED),
            (partition.unlabeled, config.batch.unlabeled, _UNLABELED),
        )
    )
    steps = min(len(labeled), len(unlabeled))  # both as good as endless; zip wants equal lengths
    zipped = grain.experimental.ZipMapDataset([labeled[:steps], unlabeled[:steps]])
    batches = zipped.map(_name_halves).to_iter_dataset(
        grain.ReadOptions(
            num_threads=config.data.threads, prefetch_buffer_size=config.data.prefetch
        )
    )
    if config.data.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.data.workers))
    return iter(batches)


def steps_per_epoch(config: ConfigDict, partition: Partition) -> int:
    """Steps in one pass over the unlabelled list (decisions.md 20), at least 1."""
    return max(1, len(partition.unlabeled) // config.batch.unlabeled)


def check_crop(config: ConfigDict, dataset: Dataset) -> None:
    """Raises UserError if no train image is as large as `crop_size` before the random resize."""
    crop, largest = tuple(config.crop_size), dataset.sources["train"].max_size
    if min(crop) < 1:
        raise UserError(f"data.crop_size is {crop}; both sides must be at least 1 px.")
    if crop[0] > largest[0] or crop[1] > largest[1]:
        sized = any(config.image_size)
        raise UserError(
            f"data.crop_size is {crop[0]}x{crop[1]} but the largest train image of "
            f"{dataset.name} is {largest[0]}x{largest[1]} (height x width"
            f"{', set by data.image_size' if sized else ''}); make the crop smaller"
            f"{' or data.image_size larger' if sized else ' or set data.image_size'}."
        )


def eval_batches(source: Source, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yields the whole split once, in order.

    Each batch is {"image": (B, H, W, 3) uint8 RGB, "label": (B, H, W) uint8, "valid": (B,) bool,
    "ids": list of B str}. Images keep their stored size and a batch holds one size only. Where a
    batch runs short its last image fills it up, with valid False and label 255 throughout.
    """
    pending: list[dict[str, Any]] = []
    for index in range(len(source)):
        element = source[index]
        if pending and element["label"].shape != pending[0]["label"].shape:
            yield _collate(pending, batch_size)
            pending = []
        pending.append(element)
        if len(pending) == batch_size:
            yield _collate(pending, batch_size)
            pending = []
    if pending:
        yield _collate(pending, batch_size)


def _stream(
    source: Source,
    ids: Sequence[str],
    augment: WeakAugmentation,
    batch_size: int,
    seeds: np.random.SeedSequence,
) -> grain.MapDataset:
    positions = {name: index for index, name in enumerate(source.ids)}
    shuffle_seed, augment_seed = (int(word) for word in seeds.generate_state(2))
    return (
        grain.MapDataset.source([positions[name] for name in ids])
        .shuffle(seed=shuffle_seed)
        .repeat()  # before `batch`, so that a list shorter than the batch still fills it
        .map(source.__getitem__)
        .random_map(augment, seed=augment_seed)
        .batch(batch_size, drop_remainder=True)
    )


def _name_halves(pair: tuple[Any, Any]) -> dict[str, Any]:
    return dict(zip(("labeled", "unlabeled"), pair, strict=True))


def _collate(elements: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    missing = batch_size - len(elements)
    filler = dict(elements[-1], label=np.full_like(elements[-1]["label"], transforms.IGNORE))
    padded = elements + [filler] * missing
    return {
        "image": np.stack([element["image"] for element in padded]),
        "label": np.stack([element["label"] for element in padded]),
        "valid": np.arange(batch_size) < len(elements),
        "ids": [element["id"] for element in padded],
    }
