"""Confusion matrix over a whole split and the scores that follow from it.

Pixels are counted over the set first and the mean over classes is taken at the very end, as
mmsegmentation and the Cityscapes evaluator do; a mean of per-image scores is another number.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csc_jax.parallel.sharding import fetch, place_whole
from csc_jax.text import name as printable


def confusion_matrix(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Counts the pixels of every (true class, predicted class) pair.

    Args:
      labels: (...) integers; a value outside [0, num_classes) is ignored.
      predictions: (...) integers, same shape as `labels`; a value outside [0, num_classes) is
        ignored too, as what was not predicted.
      num_classes: C, static under jit.

    Returns:
      (C, C) int32, rows are the truth and columns the prediction. Fewer than 2^31 pixels a call.
    """
    truth, found = labels.astype(jnp.int32), predictions.astype(jnp.int32)
    counted = (truth >= 0) & (truth < num_classes) & (found >= 0) & (found < num_classes)
    ignored = num_classes * num_classes  # one bin past the end, cut off below
    pair = jnp.where(counted, truth * num_classes + found, ignored)
    counts = jnp.bincount(pair.reshape(-1), length=ignored + 1)[:-1]
    return counts.reshape(num_classes, num_classes).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one network on one split, all ratios in [0, 1].

    Attributes:
      confusion: (C, C) int64 pixels, rows are the truth and columns the prediction.
      per_image: id -> mean IoU over the classes that occur in this image or in its prediction; nan
        if every pixel was ignored.
      note: printed beside mean IoU where it is not what the field reports (decisions.md 25).
    """

    confusion: np.ndarray
    per_image: Mapping[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def iou(self) -> np.ndarray:
        """(C,) float64 intersection over union; nan where a class occurs nowhere.

        A class that is missing from the labels but was predicted somewhere has IoU 0 and counts
        in the mean, as in mmsegmentation and the Cityscapes evaluator.
        """
        hits = np.diagonal(self.confusion)
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - hits
        return _ratio(hits, union)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur; nan if every pixel was ignored."""
        present = self.iou[~np.isnan(self.iou)]
        return float(present.mean()) if present.size else math.nan

    @property
    def precision(self) -> np.ndarray:
        """(C,) float64 share of the pixels predicted as a class that are of it; nan for none."""
        return _ratio(np.diagonal(self.confusion), self.confusion.sum(axis=0))

    @property
    def recall(self) -> np.ndarray:
        """(C,) float64 share of a class's pixels that were predicted as it; nan for none."""
        return _ratio(np.diagonal(self.confusion), self.confusion.sum(axis=1))

    @property
    def f1(self) -> np.ndarray:
        """(C,) float64 harmonic mean of precision and recall (Dice); nan as `iou` is."""
        predicted, true = self.confusion.sum(axis=0), self.confusion.sum(axis=1)
        return _ratio(2 * np.diagonal(self.confusion), predicted + true)

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels with a label that were predicted right; nan if there is none."""
        pixels = self.confusion.sum()
        return float(np.trace(self.confusion) / pixels) if pixels else math.nan

    def absent(self, class_names: Sequence[str]) -> list[str]:
        """Returns the names of the classes that occur nowhere and so are left out of the mean."""
        pairs = zip(class_names, self.iou, strict=True)
        return [name for name, iou in pairs if math.isnan(iou)]

    @property
    def occurring(self) -> str:
        """Says where the mean is not over all classes: "1 of 2 classes"; else ""."""
        total, found = len(self.confusion), int((~np.isnan(self.iou)).sum())
        return f"{found} of {total} classes" if found < total else ""

    def as_dict(self, class_names: Sequence[str]) -> dict[str, float | None]:
        """Returns `miou`, `pixel_accuracy` and `iou/<class>`; None stands for nan, as in JSON."""
        values = {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy}
        for name, iou in zip(class_names, self.iou, strict=True):
            values[f"iou/{name}"] = float(iou)
        return {key: None if math.isnan(value) else value for key, value in values.items()}

    def table(self, class_names: Sequence[str]) -> str:
        """Returns an aligned text table in percent: one line a class, the mean, absent classes."""
        rows = list(zip(map(printable, class_names), self.iou, strict=True))
        mean = f"mean IoU ({self.note})" if self.note else "mean IoU"
        summary = [(mean, self.miou), ("pixel accuracy", self.pixel_accuracy)]
        width = max(len(name) for name, _ in [*rows, *summary])
        rule = "-" * (width + 8)
        lines = [f"{'class':<{width}}   IoU %", rule]
        lines += [f"{name:<{width}}  {_percent(value):>6}" for name, value in rows]
        lines += [rule]
        lines += [f"{name:<{width}}  {_percent(value):>6}" for name, value in summary]
        if absent := self.absent(class_names):
            left_out = ", ".join(map(printable, absent))
            lines.append(f"only {self.occurring} occurred, left out of the mean: {left_out}")
        return "\n".join(lines)


_MOST_PIXELS = 2**31 - 1  # that int32 can count

# Called with an image's id, its class ids (H, W) uint8, and its own mean IoU.
OnImage = Callable[[str, np.ndarray, float], None]


def evaluate(
    predict: Callable[[Any, np.ndarray], jax.Array],
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    num_classes: int,
    *,
    on_image: Sequence[OnImage] = (),
    note: str = "",
) -> Scores:
    """Scores a network over all batches.

    Of several processes each goes through all batches and has in the end the scores of all: it
    reads every image, and its devices predict and count their rows of each batch.

    Args:
      predict: as returned by `make_predictor`.
      variables: passed to `predict`.
      batches: dicts with `image` (B, H, W, K), `label` (B, H, W) uint8 (outside
        [0, num_classes) = ignored), `valid` (B,) bool and `ids`, B strings; rows that are not valid
        are not counted.
      num_classes: C, at most 255.
      on_image: each is called once an image, in the order of the batches.
      note: see `Scores`.

    Returns:
      The scores of the whole set.
    """
    counter = _Counter(num_classes)
    per_image: dict[str, float] = {}

    def finish(batch: Mapping[str, Any], predictions: jax.Array, mious: jax.Array) -> None:
        height, width = batch["label"].shape[1:]
        # Class ids stay on the device unless somebody wants them.
        classes = fetch(predictions)[:, :height, :width] if on_image else None
        rows = zip(batch["ids"], batch["valid"], fetch(mious), strict=True)
        for i, (name, valid, miou) in enumerate(rows):
            if not valid:
                continue
            per_image[name] = float(miou)
            for call in on_image:
                assert classes is not None
                call(name, classes[i], float(miou))

    pending = None
    for batch in batches:
        predictions = predict(variables, batch["image"])
        mious = counter.add(_masked_labels(batch, predictions.shape), predictions)
        # One batch late, so that the host decodes the next images while the device works, yet
        # never runs far ahead.
        if pending is not None:
            finish(*pending)
        pending = batch, predictions, mious
    if pending is not None:
        finish(*pending)
    return Scores(counter.total(), per_image, note)


def _masked_labels(batch: Mapping[str, Any], shape: Sequence[int]) -> np.ndarray:
    """Returns the labels of the valid rows, padded to `shape` (B, H', W') with 255."""
    labels = np.full(shape, 255, np.uint8)
    _, height, width = batch["label"].shape
    labels[:, :height, :width] = np.where(batch["valid"][:, None, None], batch["label"], 255)
    return labels


class _Counter:
    """The confusion matrix of a set, summed on the device in int32 and now and then on the host."""

    def __init__(self, num_classes: int):
        self._num_classes = num_classes
        self._on_host = np.zeros((num_classes, num_classes), np.int64)
        self._on_device: jax.Array | None = None
        self._pixels = 0  # that the sum on the device may hold

    def add(self, labels: np.ndarray, predictions: jax.Array) -> jax.Array:
        """Counts a batch, both (B, H, W), and returns each image's own mean IoU, (B,) float32."""
        if self._pixels + labels.size > _MOST_PIXELS:
            self._fetch()
        self._pixels += labels.size
        on_device = place_whole(labels, predictions.sharding)
        counts, mious = _count(on_device, predictions, self._num_classes)
        self._on_device = counts if self._on_device is None else self._on_device + counts
        return mious

    def total(self) -> np.ndarray:
        """Returns the sum so far, (C, C) int64."""
        self._fetch()
        return self._on_host

    def _fetch(self) -> None:
        if self._on_device is not None:
            self._on_host += fetch(self._on_device)
        self._on_device, self._pixels = None, 0


@functools.partial(jax.jit, static_argnames="num_classes")
def _count(
    labels: jax.Array, predictions: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    # One matrix an image, summed afterwards: the batch axis stays a batch axis, so that a sharded
    # batch is counted where it lies and only (C, C) numbers cross devices.
    per_image = jax.vmap(functools.partial(confusion_matrix, num_classes=num_classes))
    counts = per_image(labels, predictions)  # (B, C, C)
    hits = jnp.diagonal(counts, axis1=1, axis2=2)
    union = counts.sum(axis=1) + counts.sum(axis=2) - hits
    present = union > 0  # (B, C)
    iou = jnp.where(present, hits / jnp.maximum(union, 1), 0)
    return counts.sum(axis=0), iou.sum(axis=1) / present.sum(axis=1)  # 0 / 0 = nan


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole, nan where there is nothing."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _percent(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{100 * ratio:.2f}"
