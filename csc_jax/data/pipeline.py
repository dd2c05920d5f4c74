"""Batches: an endless, resumable train stream (Grain) and one pass for evaluation."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from csc_jax.config import bands
from csc_jax.data import codec, transforms
from csc_jax.data.partition import Partition
from csc_jax.data.source import Dataset, Source, Unreadable
from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")

_SHARED_MEMORY = Path("/dev/shm")
# In Grain's queues and in the hands of both processes; measured with 2 workers: 7 of these 8.
_BATCHES_OF_A_WORKER = 4

# Each stream and each use of randomness in it draws from a seed of its own.
_LABELED, _UNLABELED = 0, 1


@dataclasses.dataclass(frozen=True)
class WeakAugmentation(grain.transforms.RandomMap):
    """Random resize, crop and flip (decisions.md 22).

    Attributes:
      fill: a value a band, around an image smaller than the crop.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]
    flip: bool
    fill: tuple[float, ...]

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        maps: tuple[np.ndarray, ...] = transforms.random_resized_crop(
            element["image"], element["label"], rng, self.scale_range, self.crop_size, self.fill
        )
        if self.flip:
            maps = transforms.random_flip(maps, rng)
        return element | dict(zip(("image", "label", "inside"), maps, strict=True))


class TrainIterator:
    """The endless train stream, and a record of which images it gave.

    Attributes:
      images: ids of the newest batch, by half, without those in the place of which others came.
    """

    def __init__(self, batches: grain.DatasetIterator, ids: Sequence[str], max_unreadable: int):
        self.images: dict[str, list[str]] = {}
        self._batches = batches
        self._ids = ids
        self._max_unreadable = max_unreadable
        self._unreadable: set[str] = set()

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> dict[str, Any]:
        """Returns the next batch, see `train_iterator`.

        Raises:
          UserError: more images than `data.max_unreadable` cannot be read any more.
        """
        batch = {half: dict(values) for half, values in next(self._batches).items()}
        self.images = {}
        for half, values in batch.items():
            drawn, read = ([self._ids[i] for i in values.pop(key)] for key in ("drawn", "read"))
            self.images[half] = read
            for wanted, given in zip(drawn, read, strict=True):
                if wanted != given:
                    self._note(wanted, given)
        return batch

    def get_state(self) -> Any:
        """Returns the place in the stream."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Goes to a place that `get_state` gave."""
        self._batches.set_state(state)

    def _note(self, wanted: str, given: str) -> None:
        if wanted in self._unreadable:
            return
        self._unreadable.add(wanted)
        count, most = len(self._unreadable), self._max_unreadable
        log.warning(
            "The image %s can no longer be read; %s takes its place (number %d, of at most %d)",
            *(wanted, given, count, most),
        )
        if count > most:
            raise UserError(
                f"{count} train images can no longer be read from the prepared data, more than "
                f"data.max_unreadable = {most}: {', '.join(sorted(self._unreadable))}. The last "
                "checkpoint is kept. Remove the prepared folder of this data set in data.cache_dir "
                "(default ~/.cache/csc_jax) and give the same command again; it prepares the data "
                "anew and continues."
            )


def train_iterator(
    config: ConfigDict,
    dataset: Dataset,
    partition: Partition,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainIterator:
    """Returns the endless train stream of one JAX process.

    Each element is {"labeled": {...}, "unlabeled": {...}}, each half with image (B, h, w, K),
    uint8 RGB or bands of `data.pixel_type`, label (B, h, w) uint8, 255 = ignore, and inside
    (B, h, w) bool, False on padding. The unlabelled half carries its labels for the metric of
    pseudo-label accuracy alone. Both lists repeat without end, each reshuffled at every pass; an
    image's place and its augmentation depend on (seed, pass, place in the pass) only, not on
    timing, threads, processes or what was read before, so `get_state` is one number (one for each
    of `data.workers`). In the place of an image that can no longer be read comes the next one of
    its list that can.

    Of `process_count` processes each reads its own share: rows number `process_index` * B on of the
    whole batch, B being the size in `config.batch` by the number of processes.

    Raises:
      UserError: if the crop is larger than the images, a batch does not divide by the processes,
        shared memory is too small for the workers, or a field of `config.data` is out of range.
    """
    check_crop(config.data, dataset)
    source = dataset.sources["train"]
    augment = weak_augmentation(config.data)
    labeled, unlabeled = (
        _stream(source, ids, augment, np.random.SeedSequence([config.seed, stream]))
        for ids, stream in ((partition.labeled, _LABELED), (partition.unlabeled, _UNLABELED))
    )
    halves = [
        _batches(stream, f"batch.{half}", config.batch[half], process_index, process_count)
        for half, stream in (("labeled", labeled), ("unlabeled", unlabeled))
    ]
    steps = min(map(len, halves))  # both as good as endless; zip wants equal lengths
    zipped = grain.experimental.ZipMapDataset([half[:steps] for half in halves])
    batches = zipped.map(_name_halves).to_iter_dataset(read_options(config.data))
    if config.data.workers:
        _check_shared_memory(config, process_count)
        if not flags.FLAGS.is_parsed():  # by a program without absl flags; Grain asks for its own
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.data.workers))
    return TrainIterator(iter(batches), source.ids, config.data.max_unreadable)


def abstract_batch(config: ConfigDict) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes of a batch of `train_iterator`, of all processes together."""
    size = tuple(config.data.crop_size)
    maps = {
        "image": ((*size, config.data.bands), np.dtype(bands.dtype(config.data))),
        "label": (size, np.dtype(np.uint8)),
        "inside": (size, np.dtype(np.bool_)),
    }
    return {
        half: {
            name: jax.ShapeDtypeStruct((config.batch[half], *shape), dtype)
            for name, (shape, dtype) in maps.items()
        }
        for half in ("labeled", "unlabeled")
    }


def weak_augmentation(config: ConfigDict) -> WeakAugmentation:
    """Returns what `config`, the `data` part, asks for; UserError for a field out of range."""
    low, high = config.scale_range
    if not 0 < low <= 1 <= high:
        raise UserError(
            f"data.scale_range is ({low}, {high}); it must hold a ratio in (0, 1] and one of at "
            "least 1, and (1, 1) switches the random resize off."
        )
    whole = bands.dtype(config) != "float32"
    return WeakAugmentation(
        crop_size=tuple(config.crop_size),
        scale_range=(low, high),
        flip=config.flip,
        fill=tuple(round(value) if whole else value for value in config.mean),
    )


def read_options(config: ConfigDict) -> grain.ReadOptions:
    """Returns threads and buffer, those left at 0 set for this machine; `config` is `data`."""
    threads = config.threads or max(1, codec.cpu_count() // max(1, config.workers))
    return grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=config.prefetch or 2 * threads
    )


def steps_per_epoch(config: ConfigDict, partition: Partition) -> int:
    """Steps in one pass over the unlabelled list (decisions.md 20), at least 1."""
    return max(1, len(partition.unlabeled) // config.batch.unlabeled)


def check_crop(config: ConfigDict, dataset: Dataset) -> None:
    """Raises UserError if no train image is as large as `crop_size` before the random resize."""
    crop, largest = tuple(config.crop_size), dataset.sources["train"].max_size
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

    Each batch is {"image": (B, H, W, K) as in `Source`, "label": (B, H, W) uint8, "valid": (B,)
    bool, "ids": list of B str}. Images keep their stored size and a batch holds one size only.
    Where a batch runs short its last image fills it up, with valid False and label 255 throughout.
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


def _check_shared_memory(config: ConfigDict, process_count: int) -> None:
    """Raises UserError where workers would find no room for their batches, and be killed for it."""
    if not _SHARED_MEMORY.is_dir():  # a system that has none of a fixed size
        return
    images = sum(
        math.prod(array.shape) * array.dtype.itemsize
        for half in abstract_batch(config).values()
        for array in half.values()
    )
    needed = _BATCHES_OF_A_WORKER * config.data.workers * images // process_count
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"data.workers is {config.data.workers}, whose batches take up to {_mb(needed)} MB of "
            f"shared memory, but {_SHARED_MEMORY} has {_mb(free)} MB left. Give the container more "
            f"(docker run --shm-size={_mb(needed)}m), or set --config.data.workers=0, which needs "
            "none."
        )


def _mb(size: int) -> int:
    return -(-size // 10**6)


def _stream(
    source: Source, ids: Sequence[str], augment: WeakAugmentation, seeds: np.random.SeedSequence
) -> grain.MapDataset:
    """Returns the endless stream of augmented images."""
    positions = {name: index for index, name in enumerate(source.ids)}
    read = _Reader(source, [positions[name] for name in ids])
    shuffle_seed, augment_seed = (int(word) for word in seeds.generate_state(2))
    return (
        grain.MapDataset.range(len(ids))
        .shuffle(seed=shuffle_seed)
        .repeat()  # before `batch`, so that a list shorter than the batch still fills it
        .map(read)
        .random_map(augment, seed=augment_seed)
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads an image by its place in a list; the next readable one takes an unreadable one's place.

    Each element also has `drawn` and `read`, the indices of both in the source.
    """

    source: Source
    indices: list[int]  # of the images on the list

    def __call__(self, place: int) -> dict[str, Any]:
        drawn = self.indices[place]
        for offset in range(len(self.indices)):
            index = self.indices[(place + offset) % len(self.indices)]
            try:
                element = self.source[index]
            except Unreadable as error:
                reason = error
                continue
            maps = {"image": element["image"], "label": element["label"]}
            return maps | {"drawn": np.int32(drawn), "read": np.int32(index)}
        raise reason  # not one of them is left


@dataclasses.dataclass(frozen=True)
class _Share:
    """Those elements of a stream that belong to one process's rows of each batch."""

    stream: grain.MapDataset
    batch_size: int  # of all processes together
    rows: int  # of this process
    first_row: int

    def __len__(self) -> int:
        return len(self.stream) // self.batch_size * self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, row = divmod(int(index), self.rows)
        return self.stream[step * self.batch_size + self.first_row + row]


def _batches(
    stream: grain.MapDataset, field: str, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
    rows, rest = divmod(batch_size, process_count)
    if rest:
        raise UserError(
            f"{field} is {batch_size}, which does not divide by the {process_count} processes of "
            f"this run; choose a multiple of {process_count}."
        )
    if process_count > 1:
        share = _Share(stream, batch_size, rows, first_row=process_index * rows)
        stream = grain.MapDataset.source(share)
    return stream.batch(rows, drop_remainder=True)


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
