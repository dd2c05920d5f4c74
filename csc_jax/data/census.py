"""What the labels hold: pixels by class and by stored value, and what about that should be said.

Counted while the data are prepared, from the labels that are decoded anyway, and kept with them.
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError
from csc_jax.text import name as printable

_MOST_ROWS = 40  # of a table
_MOST_NAMES = 10  # of classes in a message
_EXACT = 1 << 24  # px that OpenCV's histogram, of float32, counts without loss


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of one image and its label.

    Attributes:
      digest: of both as the user has them (`digest`).
      ids: pixels of each of the 256 class ids in the label as it is stored; 255 = ignored.
      values: pixels of each value of the user's label; {} for one that is in colours or computed.
    """

    digest: str
    ids: tuple[int, ...]
    values: Mapping[int, int]

    @property
    def classes(self) -> int:
        """The classes that the label holds, as the bits of a number."""
        return sum(1 << i for i, pixels in enumerate(self.ids[:IGNORE]) if pixels)


def facts(content: str, label: np.ndarray, values: np.ndarray | None) -> Facts:
    """Counts one image.

    Args:
      content: its digest, of `digest`.
      label: (H, W) uint8 class ids, as they will be stored.
      values: the user's label, (H, W) of an integer type; None where there is none or in colours.
    """
    stored = {} if values is None or values.ndim != 2 else _count_values(values)
    return Facts(content, tuple(histogram(label, 256).tolist()), stored)


def digest(image: bytes, label: bytes | np.ndarray) -> str:
    """Returns 24 hexadecimal digits, 16 of them of the image alone.

    They are to be the same on any machine. Therefore both are taken before anything is resized: an
    image as its own file has it, a label as class ids, (H, W) uint8.
    """
    # Against accidents, not against anybody: checksums take a quarter of the time of a hash.
    middle = len(image) // 2
    whole = memoryview(image)
    ids = label if isinstance(label, bytes) else np.ascontiguousarray(label).reshape(-1).data
    parts = zlib.crc32(whole[:middle]), zlib.crc32(whole[middle:]), zlib.crc32(ids)
    return "".join(f"{part:08x}" for part in parts)


@dataclasses.dataclass(frozen=True)
class Counts:
    """The census of a split.

    Attributes:
      labeled: images that have a label.
      pixels: of each class.
      images: that hold each class.
      ignored: pixels of these labels that are of no class.
      values: pixels of each value in the user's label files, as far as those have one channel.
    """

    labeled: int
    pixels: tuple[int, ...]
    images: tuple[int, ...]
    ignored: int
    values: Mapping[int, int]

    @property
    def absent(self) -> tuple[int, ...]:
        """Ids of the classes that no label holds."""
        return tuple(i for i, images in enumerate(self.images) if not images)

    @property
    def are_masks(self) -> bool:
        """Whether the labels are 0 and 255 throughout, and 255 was taken for "ignore"."""
        return self.values.keys() == {0, IGNORE} and self.ignored == self.values[IGNORE]


class Tally:
    """Adds up a split."""

    def __init__(self) -> None:
        self._labeled = 0
        self._pixels, self._images = np.zeros(256, np.int64), np.zeros(256, np.int64)
        self._values: Counter[int] = Counter()

    def add(self, of_image: Facts) -> None:
        """Adds an image that has a label."""
        self._labeled += 1
        ids = np.array(of_image.ids)
        self._pixels += ids
        self._images += ids > 0
        self._values.update(of_image.values)

    def as_json(self) -> dict[str, Any]:
        """Returns what `read` takes."""
        return {
            "labeled": self._labeled,
            "pixels": self._pixels.tolist(),
            "images": self._images.tolist(),
            "values": {str(value): count for value, count in sorted(self._values.items())},
        }


def read(stored: Mapping[str, Any], num_classes: int) -> Counts:
    """Returns what `Tally.as_json` kept."""
    return Counts(
        labeled=stored["labeled"],
        pixels=tuple(stored["pixels"][:num_classes]),
        images=tuple(stored["images"][:num_classes]),
        ignored=stored["pixels"][IGNORE],
        values={int(value): count for value, count in stored["values"].items()},
    )


def check(census: Mapping[str, Counts], data_set: str) -> None:
    """Raises UserError if no label of train, or of val, has a pixel of any class."""
    for split in ("train", "val"):
        counts = census[split]
        if counts.labeled and not any(counts.pixels):
            held = ", ".join(map(str, list(counts.values)[:_MOST_NAMES])) or "nothing else"
            raise UserError(
                f"All {counts.labeled} {split} labels of the data set {data_set} hold pixels to "
                f"ignore and no class (values in the files: {held}). Write class ids from 0 into "
                f"them{_way_out(data_set, counts)}."
            )


def warnings(census: Mapping[str, Counts], class_names: Sequence[str], data_set: str) -> list[str]:
    """Returns what a user should know of the labels, a line each."""
    lines = []
    for split in ("train", "val"):
        counts = census[split]
        if not any(counts.pixels):
            continue
        if counts.are_masks:
            lines.append(
                f"The {split} labels hold the values 0 and 255 alone. 255 means pixels to ignore, "
                f"so that every other pixel is {printable(class_names[0])!r}, and a network that "
                f"says so everywhere reaches 100%{_way_out(data_set, counts)}."
            )
        elif counts.absent:
            held = len(class_names) - len(counts.absent)
            lines.append(
                f"No {split} label holds {names(class_names, counts.absent)}; {held} of "
                f"{len(class_names)} classes occur."
            )
    return lines


def names(class_names: Sequence[str], class_ids: Collection[int]) -> str:
    """Returns the names of some classes for a message."""
    shown = [printable(class_names[i]) for i in list(class_ids)[:_MOST_NAMES]]
    more = len(class_ids) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def table(census: Mapping[str, Counts], class_names: Sequence[str]) -> str:
    """Returns the census as text: a line a class, with its share of pixels and its images."""
    splits = [split for split, counts in census.items() if any(counts.pixels)]
    labels = ", ".join(f"{census[split].labeled} {split}" for split in splits)
    rows = [printable(n) for n in class_names[:_MOST_ROWS]]
    width = max(map(len, [*rows, "to ignore"]))
    head = "".join(f"{f'{split} px %':>14}{'images':>8}" for split in splits)
    lines = [f"Labels: {labels}", f"{'class':<{width}}{head}"]
    for i, row in enumerate(rows):
        cells = [(census[split].pixels[i], census[split]) for split in splits]
        lines.append(
            f"{row:<{width}}"
            + "".join(f"{_share(n, counts):>14}{counts.images[i]:>8}" for n, counts in cells)
        )
    if more := len(class_names) - len(rows):
        lines.append(f"and {more} more classes")
    ignored = "".join(f"{_share(census[s].ignored, census[s]):>14}{'':>8}" for s in splits)
    return "\n".join([*lines, f"{'to ignore':<{width}}{ignored}".rstrip()])


def as_json(
    census: Mapping[str, Counts],
    class_names: Sequence[str],
    largest: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Returns the census as W/data.json has it.

    Args:
      census: of each split.
      class_names: C names.
      largest: (height, width) px of each split, each the largest of its images.
    """
    return {
        split: {
            "labeled_images": counts.labeled,
            "largest_image": list(largest[split]),
            "pixels": dict(zip(class_names, counts.pixels, strict=True)),
            "images": dict(zip(class_names, counts.images, strict=True)),
            "ignored_pixels": counts.ignored,
            "values": {str(value): count for value, count in counts.values.items()},
        }
        for split, counts in census.items()
    }


def _way_out(data_set: str, counts: Counts) -> str:
    if data_set != "folder" or IGNORE not in counts.values:
        return ""
    return (
        ". Where 255 is a class, as in masks that most tools write, map the values to ids: "
        "--config.data.folder.label_values=0:0,255:1"
    )


def _share(pixels: int, counts: Counts) -> str:
    """Returns a share of all pixels, in percent; what is rare does not look like what is absent."""
    whole = sum(counts.pixels) + counts.ignored
    if not pixels:
        return "-"
    share = 100 * pixels / whole
    return f"{share:.2f}" if share >= 0.01 else "<0.01"


def histogram(values: np.ndarray, bins: int) -> np.ndarray:
    """Returns (bins,) int64, pixels of each value of (H, W) uint8 or uint16."""
    total = np.zeros(bins, np.int64)
    rows = max(1, _EXACT // max(1, values.shape[1]))
    for start in range(0, len(values), rows):
        part = np.ascontiguousarray(values[start : start + rows])
        total += cv2.calcHist([part], [0], None, [bins], [0, bins]).ravel().astype(np.int64)
    return total


def _count_values(values: np.ndarray) -> dict[int, int]:
    if values.dtype in (np.uint8, np.uint16):
        counts = histogram(values, 1 << (8 * values.itemsize))
        held = np.flatnonzero(counts)
        return dict(zip(held.tolist(), counts[held].tolist(), strict=True))
    held, counts = np.unique(values, return_counts=True)
    return dict(zip(held.tolist(), counts.tolist(), strict=True))
