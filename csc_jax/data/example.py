"""One image of a data set before it is stored, and the pair of files that most images are."""

import dataclasses
import functools
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from csc_jax.data import codec, files, raster
from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError


class BadExample(Exception):
    """One image or label that cannot be used; the message names the file and the fault."""


# Called with a label as the user stored it, (H, W) of an integer type, before it becomes class ids.
OnValues = Callable[[np.ndarray], None]


def nothing(values: np.ndarray) -> None:
    """An `OnValues` that counts nothing."""


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

    def read(self, on_values: OnValues = nothing) -> tuple[np.ndarray, np.ndarray, bytes | None]:
        """Returns image (H, W, K), label (H, W) uint8, and what `original` returns.

        The image is uint8 RGB, or bands of other values where `data` asks for them.

        The label is 255 throughout where there is none. `on_values` is called where there is a
        label file, unless that holds colours. The last one is None for an image that is to be
        stored in another way than its own: one whose bytes do not decode to what it shows (turned
        by EXIF, of more than 8 bits), or of a format that takes much room.

        Raises:
          BadExample: if the two cannot be used.
        """
        ...


class Notes:
    """Counts what the user should know of images that can be used all the same."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, note: str, file: object) -> None:
        """Counts one; images are read by several threads at once."""
        with self._lock:
            self._counts[note] += 1
            self._first[note] = min(self._first.get(note, str(file)), str(file))

    def lines(self) -> list[str]:
        """Returns "3 images NOTE (the first is FILE)" for each kind of note."""
        return [
            f"{count} image{'s' * (count > 1)} {note} (the first is {self._first[note]})"
            for note, count in sorted(self._counts.items())
        ]


class Listing(NamedTuple):
    """What is found at `data.root`, before anything is read."""

    class_names: tuple[str, ...]
    palette: np.ndarray  # (C, 3) uint8 RGB
    splits: Mapping[str, Sequence[Example]]
    notes: Notes | None = None  # on the images, as far as they have been read


@dataclasses.dataclass(frozen=True, eq=False)
class LabelIds:
    """What the values of a label file mean; shared by all pairs of a data set.

    Attributes:
      table: (N,) uint8, class id of every stored value, 255 = ignore, or `Pair.INVALID`.
      colors: class id or 255 of every colour (R, G, B) that a label in colour may hold.
      palette: (R, G, B) that the data set gives a class id; a label's palette may not differ.
      equal_channels: whether colours whose channels are all equal are values of one channel.
      mapped: whether `data.folder.label_values` made the table.
      unclear: why values cannot be told from the class list, "" if they can.
      source: the class list, for messages.
    """

    table: np.ndarray
    colors: Mapping[tuple[int, int, int], int] = dataclasses.field(default_factory=dict)
    palette: Mapping[int, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    equal_channels: bool = False
    mapped: bool = False
    unclear: str = ""
    source: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes whenever a label may come to mean something else."""
        meaning = (sorted(self.colors.items()), sorted(self.palette.items()), self.equal_channels)
        return f"{zlib.crc32(self.table.tobytes())} {zlib.crc32(repr(meaning).encode())}"

    @functools.cached_property
    def color_table(self) -> np.ndarray:
        """(2^24,) uint8, class id of every colour; sorting the pixels of a label takes longer."""
        table = np.full(1 << 24, Pair.INVALID, np.uint8)
        for (red, green, blue), class_id in self.colors.items():
            table[red << 16 | green << 8 | blue] = class_id
        return table


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """An image file and its label file.

    Attributes:
      id: how split lists name the image.
      label: None for an image that is only ever an unlabelled one.
      label_ids: what the label's values mean.
      bits: `data.image_bits`.
      bands: K of an image that keeps its values (`raster.decode`); 0 for RGB of 8 bits.
    """

    INVALID = 254

    id: str
    image: files.File
    label: files.File | None
    label_ids: LabelIds
    bits: int = 0
    notes: Notes = dataclasses.field(default_factory=Notes)
    bands: int = 0

    @property
    def has_label(self) -> bool:
        return self.label is not None

    def fingerprint(self) -> str:
        label = "none" if self.label is None else files.stamp(self.label)
        image = f"{self.bits}" + (f" {self.bands} bands" if self.bands else "")
        return f"{files.stamp(self.image)} {image}\n{label}\n{self.label_ids.fingerprint}"

    def original(self) -> bytes:
        return _read(self.image)

    def read(self, on_values: OnValues = nothing) -> tuple[np.ndarray, np.ndarray, bytes | None]:
        stored = None if self.label is None else self._stored_label()
        encoded = self.original()
        try:
            if self.bands:
                photo = raster.decode(encoded, self.bands)
            else:
                photo = codec.decode_photo(encoded, self.bits)
        except codec.Unusable as error:
            raise BadExample(f"{self.image} {error}") from error
        if photo.turned:
            self.notes.add("were turned upright, as their EXIF orientation says", self.image)
        image = photo.pixels
        if stored is None:
            label = np.full(image.shape[:2], IGNORE, np.uint8)
        elif stored.values.shape[:2] != image.shape[:2]:
            raise BadExample(
                f"{self.label} is {_by(stored.values.shape)} but its image {self.image} is "
                f"{_by(image.shape)} (height x width{_turned(photo, stored.values.shape)})"
            )
        else:
            label = self._class_ids(stored, on_values)
        return image, label, encoded if photo.as_stored else None

    def _stored_label(self) -> codec.Mask:
        assert self.label is not None
        try:
            return codec.decode_mask(self.label.read_bytes(), self.label.suffix)
        except FileNotFoundError as error:
            raise BadExample(f"{self.image} has no label {self.label}") from error
        except (OSError, ValueError) as error:
            raise BadExample(_unreadable(self.label, error)) from error
        except codec.Unusable as error:
            raise BadExample(f"{self.label} {error}") from error

    def _class_ids(self, stored: codec.Mask, on_values: OnValues) -> np.ndarray:
        values, ids = stored.values, self.label_ids
        if values.ndim == 3:
            if not ids.equal_channels or (values != values[..., :1]).any():
                return self._ids_of_colors(values)
            values = values[..., 0]
        on_values(values)
        if ids.unclear:
            raise BadExample(f"{self.label} holds class ids, but {ids.unclear}")
        wrong = values[(values < 0) | (values >= len(ids.table))]
        if not wrong.size:
            label = ids.table[values]
            wrong = values[label == self.INVALID]
        if wrong.size:
            last = np.max(ids.table[ids.table < self.INVALID])
            raise BadExample(
                f"{self.label} holds the label id {wrong.flat[0]} ({wrong.size} px), "
                + (
                    "which data.folder.label_values does not map"
                    if ids.mapped
                    else f"outside the classes 0..{last}"
                    + "; data.folder.label_values maps other values" * bool(ids.source)
                )
            )
        if stored.palette is not None and ids.palette:
            self._check_palette(stored.palette, values)
        return label

    def _ids_of_colors(self, values: np.ndarray) -> np.ndarray:
        if not self.label_ids.colors:
            # Only data sets with a class list have colours.
            way_out = (
                "Colours are read where classes.txt gives every class its own, as in road 128 64 "
                "128"
                if self.label_ids.source
                else "Take the file as its authors publish it, or turn its colours into ids"
            )
            raise BadExample(
                f"{self.label} is a colour image; expected one channel, or a palette, of label "
                f"ids. {way_out}"
            )
        red, green, blue = np.moveaxis(values.astype(np.uint32), -1, 0)
        packed = red << 16 | green << 8 | blue
        label = self.label_ids.color_table[packed]
        unknown, counts = np.unique(packed[label == self.INVALID], return_counts=True)
        if unknown.size:
            most = int(unknown[counts.argmax()])
            others = f", and {unknown.size - 1} more such colours" if unknown.size > 1 else ""
            raise BadExample(
                f"{self.label} holds the colour {most >> 16} {most >> 8 & 255} {most & 255} "
                f"({counts.max()} px), which {self.label_ids.source or 'the class list'} gives to "
                f"no class{others}. Pixels to ignore need a line void R G B there"
            )
        return label

    def _check_palette(self, palette: np.ndarray, values: np.ndarray) -> None:
        ramp = np.arange(len(palette), dtype=np.uint8)[:, None]
        if (palette == ramp).all():  # as some programs write grey
            return
        for value in np.flatnonzero(np.bincount(values.ravel(), minlength=1)):
            wanted = self.label_ids.palette.get(int(self.label_ids.table[value]))
            if wanted and value < len(palette) and tuple(palette[value]) != wanted:
                own = " ".join(map(str, palette[value]))
                raise BadExample(
                    f"{self.label} has a palette that shows the value {value} as {own}, but "
                    f"{self.label_ids.source or 'the class list'} gives that class the colour "
                    f"{' '.join(map(str, wanted))}; the two may count the classes in different "
                    "orders. Put the lines in the order of the values, or take the colours out"
                )


def label_ids(classes: Mapping[int, int]) -> LabelIds:
    """Returns the meaning of labels from {stored value: class id}; any other value is an error."""
    table = np.full(max(256, max(classes, default=0) + 1), Pair.INVALID, np.uint8)
    for stored, class_id in classes.items():
        table[stored] = class_id
    return LabelIds(table)


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
    except (OSError, ValueError) as error:
        raise BadExample(_unreadable(file, error)) from error


def _unreadable(file: files.File, error: Exception) -> str:
    return f"{file} cannot be read: {getattr(error, 'strerror', None) or error}"


def _by(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _turned(photo: codec.Photo, label: Sequence[int]) -> str:
    if tuple(label[1::-1]) != photo.pixels.shape[:2]:
        return ""
    if photo.turned:
        return (
            "; its EXIF orientation turns it upright, and the label was drawn on the image as it is"
            " stored: turn the label, or save the image without that tag"
        )
    return "; one of them is turned"
