"""Checks a data set and stores it as ArrayRecord: the one TFDS builder that all of them share."""

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from csc_jax.data import codec, transforms
from csc_jax.data.source import Dataset, Source
from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")

_NAMED = 10  # bad files spelt out in an error
_CHUNK = 64  # images in memory at a time while preparing


class BadExample(Exception):
    """One image or label that cannot be used; the message names the file and the fault."""


class Example(Protocol):
    """One image before it is stored."""

    @property
    def id(self) -> str: ...

    def fingerprint(self) -> str:
        """Returns a text that changes whenever what `read` returns may change."""
        ...

    def read(self) -> tuple[np.ndarray, np.ndarray, bytes | None]:
        """Returns image (H, W, 3) uint8 RGB, label (H, W) uint8, and the image's own encoding.

        Raises:
          BadExample: if the two cannot be used.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """An image file and its label file.

    Attributes:
      id: how split lists name the image.
      label_ids: (256,) uint8, class id of every stored label value, 255 = ignore, or `INVALID`.
      colors: (256, 3) uint8 RGB of the stored values, for labels saved with a palette; or None.
    """

    INVALID = 254

    id: str
    image: Path
    label: Path
    label_ids: np.ndarray
    colors: np.ndarray | None = None

    def fingerprint(self) -> str:
        return "\n".join(map(_file_stamp, (self.image, self.label)))

    def read(self) -> tuple[np.ndarray, np.ndarray, bytes]:
        if not self.label.is_file():
            raise BadExample(f"{self.image} has no label {self.label}")
        try:
            encoded, encoded_label = self.image.read_bytes(), self.label.read_bytes()
        except OSError as error:
            raise BadExample(f"{error.filename} cannot be read: {error.strerror}") from error
        image = codec.decode_image(encoded)
        if image is None:
            raise BadExample(f"{self.image} is corrupt or truncated")
        stored = codec.decode_label(encoded_label)
        if stored is None:
            raise BadExample(f"{self.label} is corrupt or truncated")
        if stored.shape[:2] != image.shape[:2]:
            raise BadExample(
                f"{self.label} is {_by(stored.shape)} but its image {self.image} is "
                f"{_by(image.shape)} (height x width)"
            )
        return image, self._class_ids(stored), encoded

    def _class_ids(self, stored: np.ndarray) -> np.ndarray:
        if stored.ndim == 3:
            stored = self._values_of_colors(stored[..., 2::-1])
        if stored.max() < len(self.label_ids):
            label = self.label_ids[stored]
            wrong = stored[label == self.INVALID]
        else:
            wrong = stored[stored >= len(self.label_ids)]
        if wrong.size:
            raise BadExample(
                f"{self.label} holds the label id {wrong.flat[0]} ({wrong.size} px), outside the "
                f"classes 0..{np.max(self.label_ids[self.label_ids < self.INVALID])}"
            )
        return label

    def _values_of_colors(self, rgb: np.ndarray) -> np.ndarray:
        """Maps (H, W, 3) colours to the values that a palette PNG stored for them."""
        if self.colors is None:
            raise BadExample(f"{self.label} is a colour image; expected one channel of label ids")
        weights = np.array([1 << 16, 1 << 8, 1], np.int32)
        known, codes = self.colors @ weights, rgb @ weights
        order = np.argsort(known)
        found = order[np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)]
        if (known[found] != codes).any():
            y, x = np.argwhere(known[found] != codes)[0]
            raise BadExample(
                f"{self.label} holds the colour {tuple(rgb[y, x].tolist())}, which is no class's"
            )
        return found


def label_ids(classes: Mapping[int, int]) -> np.ndarray:
    """Builds `Pair.label_ids` from {stored value: class id}; any other value is an error."""
    table = np.full(256, Pair.INVALID, np.uint8)
    for stored, class_id in classes.items():
        table[stored] = class_id
    return table


def prepare(
    name: str,
    class_names: tuple[str, ...],
    palette: np.ndarray,
    splits: Mapping[str, Sequence[Example]],
    cache_dir: str,
    image_size: tuple[int, int],
) -> Dataset:
    """Returns the data set from the cache, after storing it there if it is new or has changed.

    Args:
      cache_dir: parent of the prepared folders; "" = ~/.cache/csc_jax. A folder's name ends in a
        fingerprint of all that its content depends on, so that a changed file or field prepares
        anew, and it appears only when it is whole.
      image_size: (height, width) px that images and labels are stored at, or (0, 0) for their own
        size. Resizing here and not while training spares decoding large files over and over.

    Raises:
      UserError: naming the first bad images and the number of all, or for a full or unwritable
        `cache_dir`.
    """
    root = Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "csc_jax"
    folder = root / f"{name}-{_fingerprint(splits, image_size)}"
    builder = Segmentation(splits, image_size, data_dir=os.fspath(folder))
    if not builder.data_path.exists():
        count = sum(map(len, splits.values()))
        log.info("Preparing %s: checking %d images and storing them in %s", name, count, folder)
        _store(builder, root)
    # The stored folder describes itself; its reader can go to another process, `builder` cannot.
    stored = tfds.builder_from_directory(builder.data_path)
    raw = tfds.decode.SkipDecoding()
    sources = {
        split: Source(
            ids=tuple(example.id for example in examples),
            max_size=tuple(stored.info.metadata["max_size"][split]),
            records=stored.as_data_source(split=split, decoders={"image": raw, "label": raw}),
        )
        for split, examples in splits.items()
    }
    return Dataset(name, class_names, palette, sources)


class Segmentation(tfds.core.GeneratorBasedBuilder):
    """Stores id, encoded image and PNG label of every example; fails as a whole on any bad one."""

    VERSION = tfds.core.Version("1.0.0")  # raise when what is stored for an example changes

    def __init__(
        self, splits: Mapping[str, Sequence[Example]], image_size: tuple[int, int], **kwargs: Any
    ):
        self._splits = splits
        self._image_size = image_size
        self._problems: list[str] = []
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image, label = (
            tfds.features.Image(shape=(None, None, 3)),
            tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"id": tfds.features.Text(), "image": image, "label": label}
            ),
            # The order of the records is that of the ids; Grain shuffles while training.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(max_size={}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the user downloads; nothing is fetched
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        examples, max_size = self._splits[split], (0, 0)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(examples), _CHUNK):
                chunk = examples[start : start + _CHUNK]
                for offset, (record, size) in enumerate(pool.map(self._encode, chunk)):
                    max_size = max(max_size[0], size[0]), max(max_size[1], size[1])
                    yield start + offset, record
        self.info.metadata["max_size"][split] = max_size
        # Only after the last split, so that one error names the bad files of all. Raised in here
        # it makes TFDS drop the folder, which has a temporary name until all splits are done.
        if self._problems and split == list(self._splits)[-1]:
            raise UserError(_describe(self._problems))

    def _encode(self, example: Example) -> tuple[dict[str, Any], tuple[int, int]]:
        """Returns the record and its (height, width); notes a bad example and returns a stub."""
        try:
            image, label, encoded = example.read()
        except BadExample as problem:
            self._problems.append(str(problem))
            return {"id": example.id, "image": b"", "label": b""}, (0, 0)
        if any(self._image_size):
            image, label = transforms.resize(image, label, self._image_size)
            encoded = None
        record = {
            "id": example.id,
            "image": encoded or codec.encode_png(image),
            "label": codec.encode_png(label),
        }
        return record, label.shape


def _store(builder: Segmentation, root: Path) -> None:
    # Progress bars and notes about downloads; `prepare` has said in one line what happens.
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    except OSError as error:
        # A second process may have prepared the same folder meanwhile: then it is there, whole.
        if not builder.data_path.exists():
            raise UserError(
                f"Preparing the data in {root} failed: {error}. Free or grant space there, or set "
                "data.cache_dir to another folder."
            ) from error


def _describe(problems: Sequence[str]) -> str:
    shown = "; ".join(sorted(problems)[:_NAMED])
    more = len(problems) - _NAMED
    rest = f"; and {more} more" if more > 0 else ""
    return (
        f"data.root holds {len(problems)} images that cannot be used: {shown}{rest}. Repair or "
        "remove them (an image and its label go together), then run again."
    )


def _fingerprint(splits: Mapping[str, Sequence[Example]], image_size: tuple[int, int]) -> str:
    digest = hashlib.sha256(f"{Segmentation.VERSION} {tuple(image_size)}".encode())
    for split, examples in splits.items():
        digest.update(f"\n{split} {len(examples)}".encode())
        for example in examples:
            digest.update(f"\n{example.id}\n{example.fingerprint()}".encode())
    return digest.hexdigest()[:12]


def _file_stamp(path: Path) -> str:
    try:
        status = path.stat()
    except FileNotFoundError:
        return f"{path} missing"
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _by(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"
