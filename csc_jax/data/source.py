"""Prepared data sets: random access to decoded images and labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csc_jax.data import codec
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
    """

    ids: tuple[str, ...]
    max_size: tuple[int, int]
    records: Sequence[Mapping[str, bytes]]
    without_label: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"id": str, "image": (H, W, 3) uint8 RGB, "label": (H, W) uint8}.

        Raises:
          Unreadable: the record cannot be read any more; it has a checksum.
        """
        try:
            record = self.records[index]
        # ArrayRecord reports damage as RuntimeError, and so a file that is gone.
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unreadable(index, str(error)) from error
        image, label = codec.decode_image(record["image"]), codec.decode_label(record["label"])
        if image is None or label is None:
            raise self._unreadable(index, "it is corrupt")
        return {"id": self.ids[index], "image": image, "label": label}

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
      class_names: C names; the index is the class id.
      palette: (C, 3) uint8 RGB, for drawing.
      sources: by split, "train" and "val" at least.
    """

    name: str
    class_names: tuple[str, ...]
    palette: np.ndarray
    sources: Mapping[str, Source]

    def source(self, split: str) -> Source:
        """Returns the split, or a UserError that names those there are."""
        if split not in self.sources:
            raise UserError(
                f"The data set {self.name} has no split {split!r}; it has "
                f"{', '.join(self.sources)} (config field eval.split)."
            )
        return self.sources[split]
