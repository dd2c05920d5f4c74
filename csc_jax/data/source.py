"""Prepared data sets: random access to decoded images and labels."""

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from csc_jax.data import codec
from csc_jax.data.census import Counts, histogram
from csc_jax.errors import UserError


class Unreadable(UserError):
    """A prepared image has been damaged, or its file is gone."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split, read record by record from ArrayRecord files; can be pickled.

    Attributes:
      ids: one per image, in the order of the data set.
      max_size: (height, width) px, each the largest of any image of the split.
      records: encoded `image` and `label` bytes of each id.
      without_label: ids whose label is 255 throughout, as the data set has none for them.
      digests: of each image and its label (`census.Facts`), or none at all.
      classes: that each label holds, as the bits of a number, or none at all.
    """

    ids: tuple[str, ...]
    max_size: tuple[int, int]
    records: Sequence[Mapping[str, bytes]]
    without_label: frozenset[str] = frozenset()
    digests: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def spread(self, count: int) -> list[int]:
        """Returns up to `count` indices, equally far apart: neighbours may be frames of a video."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self)))
        return indices.round().astype(int).tolist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"id": str, "image": (H, W, K), "label": (H, W) uint8}.

        The image is uint8 RGB, or bands that keep their values: uint8, uint16 or float32.

        Raises:
          Unreadable: the record cannot be read any more; it has a checksum.
        """
        record = self._record(index)
        image, label = codec.decode_image(record["image"]), codec.decode_label(record["label"])
        if image is None or label is None:
            raise self._unreadable(index, "it is corrupt")
        return {"id": self.ids[index], "image": image, "label": label}

    def label(self, index: int) -> np.ndarray:
        """Returns the label alone, (H, W) uint8; `Unreadable` as above."""
        label = codec.decode_label(self._record(index)["label"])
        if label is None:
            raise self._unreadable(index, "it is corrupt")
        return label

    def count_pixels(self, ids: Sequence[str], num_classes: int) -> tuple[int, ...]:
        """Returns how many pixels of each class the labels of some images hold.

        Raises:
          Unreadable: one of them cannot be read any more.
        """
        position = {name: index for index, name in enumerate(self.ids)}
        with ThreadPoolExecutor(codec.cpu_count()) as pool:
            counts = pool.map(
                lambda name: histogram(self.label(position[name]), 256)[:num_classes], ids
            )
            return tuple(sum(counts, np.zeros(num_classes, np.int64)).tolist())

    def _record(self, index: int) -> Mapping[str, bytes]:
        try:
            return self.records[index]
        # ArrayRecord reports damage as RuntimeError, and so a file that is gone.
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unreadable(index, str(error)) from error

    def _unreadable(self, index: int, reason: str) -> Unreadable:
        return Unreadable(
            f"The image {self.ids[index]} can no longer be read from the prepared data: {reason}. "
            "Remove the prepared folder of this data set in data.cache_dir (default "
            "~/.cache/csc_jax) and give the same command again; it prepares the data anew."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set.

    Attributes:
      name: as in `data.name`.
      class_names: C names; the index is the class id.
      palette: (C, 3) uint8 RGB, for drawing.
      sources: by split, "train" and "val" at least.
      census: of the labels, by split.
      pixels: of images that keep their values: {"mean", "std"} of each band of the train images,
        and their {"pixel_type"}; None for RGB images of 8 bits.
    """

    name: str
    class_names: tuple[str, ...]
    palette: np.ndarray
    sources: Mapping[str, Source]
    census: Mapping[str, Counts] = dataclasses.field(default_factory=dict)
    pixels: Mapping[str, Any] | None = None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def source(self, split: str) -> Source:
        """Returns a split, or several as one for a name such as "val+test".

        Raises:
          UserError: there is no such split; it names those there are. Or two share an id.
        """
        names = split.split("+")
        for name in names:
            if name not in self.sources:
                raise UserError(
                    f"The data set {self.name} has no split {name!r}; it has "
                    f"{', '.join(self.sources)} (config field eval.split, {split!r})."
                )
        parts = [self.sources[name] for name in names]
        if len(parts) == 1:
            return parts[0]
        ids = tuple(itertools.chain.from_iterable(part.ids for part in parts))
        if len(set(ids)) < len(ids):
            twice = next(name for name, count in Counter(ids).items() if count > 1)
            raise UserError(
                f"The image {twice} is in more than one of the splits of eval.split, {split!r}. "
                "Score them one by one."
            )
        return Source(
            ids=ids,
            max_size=(max(p.max_size[0] for p in parts), max(p.max_size[1] for p in parts)),
            records=_Chain([part.records for part in parts]),
            without_label=frozenset().union(*(part.without_label for part in parts)),
            digests=tuple(itertools.chain.from_iterable(part.digests for part in parts)),
            classes=tuple(itertools.chain.from_iterable(part.classes for part in parts)),
        )


class _Chain(Sequence):
    """Sequences one after the other, read in place."""

    def __init__(self, parts: list[Sequence]):
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - self._ends[part] + len(self._parts[part])]
