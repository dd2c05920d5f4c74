"""One image of a data set before it is stored, and the pair of files that most images are."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from csc_jax.data import codec, files
from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError


class BadExample(Exception):
    """One image or label that cannot be used; the message names the file and the fault."""


class Example(Protocol):
    """One image before it is stored."""

    @property
    def id(self) -> str: ...

    @property
    def has_label(self) -> bool:
        """Whether it may be drawn as a labelled image."""
        ...

    def fingerprint(self) -> str:
        """Returns a text that changes whenever what `read` returns may change."""
        ...

    def original(self) -> bytes | None:
        """Returns the image's own encoding, unchecked; None if it has none."""
        ...

    def read(self) -> tuple[np.ndarray, np.ndarray, bytes | None]:
        """Returns image (H, W, 3) uint8 RGB, label (H, W) uint8, and what `original` returns.

        The label is 255 throughout where there is none.

        Raises:
          BadExample: if the two cannot be used.
        """
        ...


class Listing(NamedTuple):
    """What is found at `data.root`, before anything is read."""

    class_names: tuple[str, ...]
    palette: np.ndarray  # (C, 3) uint8 RGB
    splits: Mapping[str, Sequence[Example]]


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """An image file and its label file.

    Attributes:
      id: how split lists name the image.
      label: None for an image that is only ever an unlabelled one.
      label_ids: (256,) uint8, class id of every stored label value, 255 = ignore, or `INVALID`.
    """

    INVALID = 254

    id: str
    image: files.File
    label: files.File | None
    label_ids: np.ndarray

    @property
    def has_label(self) -> bool:
        return self.label is not None

    def fingerprint(self) -> str:
        label = "none" if self.label is None else files.stamp(self.label)
        return f"{files.stamp(self.image)}\n{label}\n{zlib.crc32(self.label_ids.tobytes())}"

    def original(self) -> bytes:
        return _read(self.image)

    def read(self) -> tuple[np.ndarray, np.ndarray, bytes]:
        if self.label is not None and not self.label.is_file():
            raise BadExample(f"{self.image} has no label {self.label}")
        encoded = self.original()
        image = codec.decode_image(encoded)
        if image is None:
            raise BadExample(f"{self.image} is corrupt or truncated")
        if self.label is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8), encoded
        stored = codec.decode_stored_values(_read(self.label), self.label.suffix)
        if stored is None:
            raise BadExample(f"{self.label} is corrupt or truncated")
        if stored.ndim == 3:
            raise BadExample(
                f"{self.label} is a colour image; expected one channel, or a palette, of label ids"
            )
        if stored.shape != image.shape[:2]:
            raise BadExample(
                f"{self.label} is {_by(stored.shape)} but its image {self.image} is "
                f"{_by(image.shape)} (height x width{_turned(stored.shape, image.shape)})"
            )
        return image, self._class_ids(stored), encoded

    def _class_ids(self, stored: np.ndarray) -> np.ndarray:
        wrong = stored[(stored < 0) | (stored >= len(self.label_ids))]
        if not wrong.size:
            label = self.label_ids[stored]
            wrong = stored[label == self.INVALID]
        if wrong.size:
            raise BadExample(
                f"{self.label} holds the label id {wrong.flat[0]} ({wrong.size} px), outside the "
                f"classes 0..{np.max(self.label_ids[self.label_ids < self.INVALID])}"
            )
        return label


def label_ids(classes: Mapping[int, int]) -> np.ndarray:
    """Builds `Pair.label_ids` from {stored value: class id}; any other value is an error."""
    table = np.full(256, Pair.INVALID, np.uint8)
    for stored, class_id in classes.items():
        table[stored] = class_id
    return table


def check_splits(splits: Mapping[str, Sequence[Pair]], root: str, pattern: str) -> None:
    """Raises UserError if a split has no image, or two images under one id."""
    empty = [split for split, pairs in splits.items() if not pairs]
    if empty:
        raise UserError(
            f"data.root {root} has no images for {', '.join(empty)}; expected {pattern} there."
        )
    for split, pairs in splits.items():
        seen: dict[str, files.File] = {}
        for pair in pairs:
            if pair.id in seen:
                raise UserError(
                    f"data.root {root} has two images {pair.id} in {split}, {seen[pair.id]} and "
                    f"{pair.image}; keep one of them."
                )
            seen[pair.id] = pair.image


def _read(file: files.File) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadExample(f"{file} cannot be read: {error.strerror}") from error


def _by(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _turned(label: Sequence[int], image: Sequence[int]) -> str:
    if tuple(label[::-1]) != tuple(image[:2]):
        return ""
    return "; one of them is turned, and an EXIF rotation is not applied"
