"""Checks a data set and stores it as ArrayRecord: the one TFDS builder that all of them share."""

import contextlib
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from csc_jax import paths
from csc_jax.data import census, codec, moments, transforms
from csc_jax.data.checked import Checked, Encoded
from csc_jax.data.example import BadExample, Example, Listing
from csc_jax.data.source import Dataset, Source
from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")

_NAMED = 10  # bad files spelt out in an error
_CHUNK = 64  # images in memory at a time while preparing


def prepare(
    name: str, listing: Listing, cache_dir: str, image_size: tuple[int, int], bands: int = 0
) -> Dataset:
    """Returns the data set from the cache, after storing it there if it is new or has changed.

    Args:
      name: letters, digits and underscores.
      cache_dir: parent of the prepared folders; "" = ~/.cache/csc_jax. A folder's name ends in a
        fingerprint of all that its content depends on, so that a changed file or field prepares
        anew, and it appears only when it is whole. A preparation that was cut off goes on where it
        stopped, and one that another process is at is waited for.
      image_size: (height, width) px that images and labels are stored at, or (0, 0) for their own
        size. Resizing here and not while training spares decoding large files over and over.
      bands: of images that keep their values, which are then measured; 0 for RGB of 8 bits.

    Raises:
      UserError: naming the first bad images and the number of all, or for a full or unwritable
        `cache_dir`, labels that hold no class at all, or images whose values are of several types.
    """
    root = paths.cache_folder("data.cache_dir", cache_dir)
    splits = listing.splits
    keys = {
        split: [_key(example, image_size) for example in examples]
        for split, examples in splits.items()
    }
    folder = root / f"{name}-{_fingerprint(keys)}"
    checked = Checked(root / f"{name}.checked")
    try:
        builder = Segmentation(splits, keys, image_size, bands, checked, data_dir=os.fspath(folder))
        if not builder.data_path.exists():
            root.mkdir(parents=True, exist_ok=True)
            with _alone(root / f"{name}.lock", name):
                if not builder.data_path.exists():  # the other process may have made it
                    _store(builder, root, name)
        # The stored folder describes itself; its reader can go to another process, `builder`
        # cannot.
        stored = tfds.builder_from_directory(builder.data_path)
    # ArrayRecord reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Preparing the data in {root} failed: {error}. Free or grant space there, or set "
            "data.cache_dir to another folder; what was checked so far is kept."
        ) from error
    raw = tfds.decode.SkipDecoding()
    metadata = stored.info.metadata
    sources = {
        split: Source(
            ids=tuple(example.id for example in examples),
            without_label=frozenset(example.id for example in examples if not example.has_label),
            max_size=tuple(metadata["max_size"][split]),
            records=stored.as_data_source(split=split, decoders={"image": raw, "label": raw}),
            digests=tuple(digest for digest, _ in metadata["images"][split]),
            classes=tuple(int(held, 16) for _, held in metadata["images"][split]),
        )
        for split, examples in splits.items()
    }
    counted = {
        split: census.read(kept, len(listing.class_names))
        for split, kept in metadata["census"].items()
    }
    census.check(counted, name)
    found = metadata["pixels"] if bands else None
    return Dataset(name, listing.class_names, listing.palette, sources, counted, found)


class Segmentation(tfds.core.GeneratorBasedBuilder):
    """Stores id, encoded image and PNG label of every example; fails as a whole on any bad one."""

    VERSION = tfds.core.Version("2.0.0")  # raise when what is stored for an example changes

    def __init__(
        self,
        splits: Mapping[str, Sequence[Example]],
        keys: Mapping[str, Sequence[str]],
        image_size: tuple[int, int],
        bands: int,
        checked: Checked,
        **kwargs: Any,
    ):
        self.splits = splits
        self.keys = keys
        self.checked = checked
        self.problems: list[str] = []
        self.on_image: Callable[[], Any] = lambda: None  # called after each image
        self._image_size = image_size
        self._bands = bands
        self._types: dict[str, str] = {}  # type of an image -> the first such image
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image, label = (
            tfds.features.Image(shape=(None, None, 3)),
            tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        )
        return _Info(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"id": tfds.features.Text(), "image": image, "label": label}
            ),
            # The order of the records is that of the ids; Grain shuffles while training.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(max_size={}, images={}, census={}, pixels={}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the user downloads; nothing is fetched
        return {split: self._generate_examples(split) for split in self.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        items, max_size = list(zip(self.splits[split], self.keys[split], strict=True)), (0, 0)
        images, tally = list[tuple[str, str]](), census.Tally()
        total = moments.nothing(self._bands)
        with ThreadPoolExecutor(codec.cpu_count()) as pool:
            for start in range(0, len(items), _CHUNK):
                chunk = items[start : start + _CHUNK]
                for offset, (record, encoded) in enumerate(pool.map(self._record, chunk)):
                    if encoded is not None:
                        size, facts = encoded.size, encoded.facts
                        max_size = max(max_size[0], size[0]), max(max_size[1], size[1])
                        images.append((facts.digest, f"{facts.classes:x}"))
                        if chunk[offset][0].has_label:
                            tally.add(facts)
                        if encoded.moments is not None:
                            total = total.joined(encoded.moments)
                            self._types.setdefault(encoded.pixel_type, record["id"])
                    self.on_image()
                    yield start + offset, record
        self.info.metadata["max_size"][split] = max_size
        self.info.metadata["images"][split] = images
        self.info.metadata["census"][split] = tally.as_json()
        if split == "train" and self._bands and total.pixels:
            self.info.metadata["pixels"] |= {
                "mean": total.mean.tolist(),
                "std": total.deviation.tolist(),
            }
        if self._bands and len(self._types) == 1:
            (self.info.metadata["pixels"]["pixel_type"],) = self._types
        if len(self._types) > 1 and not self.problems:
            raise UserError(
                f"data.root holds images of {_types(self._types)}. Their values are on different "
                "scales: save all of them in one type."
            )
        # Only after the last split, so that one error names the bad files of all. Raised in here it
        # makes TFDS drop the folder, which has a temporary name until all splits are done.
        if self.problems and split == list(self.splits)[-1]:
            raise _Unusable

    def _record(self, item: tuple[Example, str]) -> tuple[dict[str, Any], Encoded | None]:
        """Returns the record and what it is made of; notes a bad example and returns a stub."""
        example, key = item
        try:
            encoded = self.checked.load(key)
            if encoded is None:
                encoded = self._encode(example)
                self.checked.save(key, encoded)
            image = encoded.image or example.original()
        except BadExample as problem:
            self.problems.append(str(problem))
            return {"id": example.id, "image": b"", "label": b""}, None
        return {"id": example.id, "image": image, "label": encoded.label}, encoded

    def _encode(self, example: Example) -> Encoded:
        values: list[np.ndarray] = []
        image, label, original = example.read(values.append)
        content = _digest(example, label, original)
        if any(self._image_size):
            image, label = transforms.resize(image, label, self._image_size)
            original = None
        return Encoded(
            image=None if original else codec.encode_image(image),
            label=codec.encode_png(label),
            size=(label.shape[0], label.shape[1]),
            facts=census.facts(content, label, values[0] if values else None),
            pixel_type=image.dtype.name,
            moments=moments.of_image(image) if self._bands else None,
        )


class _Info(tfds.core.DatasetInfo):
    """Does not look for what TFDS may know of the data set; that leaves a folder in /tmp."""

    def initialize_from_bucket(self) -> None:
        """Does nothing."""


class _Unusable(Exception):
    """Some examples are bad; the builder's `problems` say which."""


@contextlib.contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Holds a lock, which the system releases if the process is killed."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("Waiting for another process, which is preparing %s (%s)", name, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _store(builder: Segmentation, root: Path, name: str) -> None:
    count = sum(map(len, builder.splits.values()))
    done = sum(key in builder.checked for keys in builder.keys.values() for key in keys)
    log.info(
        "Preparing %s: checking %d images%s and storing them in %s",
        name,
        count,
        f" ({done} of them were checked before)" if done else "",
        builder.data_path.parents[1],
    )
    for leftover in root.glob(f"{name}-*/*/incomplete*"):  # nobody else is at work on this name
        shutil.rmtree(leftover, ignore_errors=True)
    bad_files = root / f"{name}_bad_files.txt"
    # TFDS has bars of its own, and notes about downloads.
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with (
            tqdm.tqdm(total=count, unit="image", disable=None) as bar,  # on a terminal only
            contextlib.redirect_stdout(io.StringIO()),
        ):
            builder.on_image = bar.update
            builder.download_and_prepare(download_config=config)
    except _Unusable:
        problems = sorted(builder.problems)
        bad_files.write_text("".join(f"{line}\n" for line in problems), encoding="utf-8")
        raise UserError(_describe(problems, bad_files)) from None
    bad_files.unlink(missing_ok=True)
    builder.checked.clear()


def _describe(problems: Sequence[str], bad_files: Path) -> str:
    more = len(problems) - _NAMED
    rest = f"; and {more} more, all listed in {bad_files}" if more > 0 else ""
    return (
        f"data.root holds {len(problems)} images that cannot be used: "
        f"{'; '.join(problems[:_NAMED])}{rest}. Repair or remove them (an image and its label go "
        "together), then run again."
    )


def _types(types: Mapping[str, str]) -> str:
    return " and of ".join(f"{name} (the first is {first})" for name, first in types.items())


def _key(example: Example, image_size: tuple[int, int]) -> str:
    try:
        fingerprint = example.fingerprint()
    except OSError as error:  # reading it fails too, and names it together with all that do
        fingerprint = f"unreadable {error}"
    content = f"{Segmentation.VERSION} {tuple(image_size)}\n{example.id}\n{fingerprint}"
    return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()[:24]


def _digest(example: Example, label: np.ndarray, original: bytes | None) -> str:
    own = original or example.original()
    if own is not None:
        return census.digest(own, label)
    # Drawn, and so told by its name and how it is drawn; pixels may differ from machine to machine.
    drawn = f"{example.id}\n{example.fingerprint()}".encode()
    return census.digest(drawn, drawn)


def _fingerprint(keys: Mapping[str, Sequence[str]]) -> str:
    digest = hashlib.sha256()
    for split, of_split in keys.items():
        digest.update("\n".join((split, *of_split, "")).encode())
    return digest.hexdigest()[:12]
