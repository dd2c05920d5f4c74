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


def confusion_matrix(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Counts the pixels of every (true class, predicted class) pair.

    Args:
      labels: (...) integers; a value outside [0, num_classes) is ignored.
      predictions: (...) integers in [0, num_classes), same shape as `labels`.
      num_classes: C, static under jit.

    Returns:
      (C, C) int32, rows are the truth and columns the prediction. Fewer than 2^31 pixels a call.
    """
    truth = labels.astype(jnp.int32)
    pair = truth * num_classes + predictions.astype(jnp.int32)
    ignored = num_classes * num_classes  # one bin past the end, cut off below
    pair = jnp.where((truth >= 0) & (truth < num_classes), pair, ignored)
    counts = jnp.bincount(pair.reshape(-1), length=ignored + 1)[:-1]
    return counts.reshape(num_classes, num_classes).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one network on one split, all ratios in [0, 1].

    Attributes:
      confusion: (C, C) int64 pixels, rows are the truth and columns the prediction.
    """

    confusion: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        """(C,) float64 intersection over union; nan where a class occurs nowhere.

        A class that is missing from the labels but was predicted somewhere has IoU 0 and counts
        in the mean, as in mmsegmentation and the Cityscapes evaluator.
        """
        hits = np.diagonal(self.confusion)
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - hits
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur; nan if every pixel was ignored."""
        present = self.iou[~np.isnan(self.iou)]
        return float(present.mean()) if present.size else math.nan

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels with a label that were predicted right; nan if there is none."""
        pixels = self.confusion.sum()
        return float(np.trace(self.confusion) / pixels) if pixels else math.nan

    def as_dict(self, class_names: Sequence[str]) -> dict[str, float | None]:
        """Returns `miou`, `pixel_accuracy` and `iou/<class>`; None stands for nan, as in JSON."""
        values = {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy}
        for name, iou in zip(class_names, self.iou, strict=True):
            values[f"iou/{name}"] = float(iou)
        return {key: None if math.isnan(value) else value for key, value in values.items()}

    def table(self, class_names: Sequence[str]) -> str:
        """Returns an aligned text table in percent: one line a class, the mean, absent classes."""
        rows = list(zip(class_names, self.iou, strict=True))
        summary = [("mean IoU", self.miou), ("pixel accuracy", self.pixel_accuracy)]
        width = max(len(name) for name, _ in [*rows, *summary])
        rule = "-" * (width + 8)
        lines = [f"{'class':<{width}}   IoU %", rule]
        lines += [f"{name:<{width}}  {_percent(value):>6}" for name, value in rows]
        lines += [rule]
        lines += [f"{name:<{width}}  {_percent(value):>6}" for name, value in summary]
        if absent := [name for name, value in rows if math.isnan(value)]:
            lines.append(f"not in labels or predictions, left out of the mean: {', '.join(absent)}")
        return "\n".join(lines)


def _percent(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{100 * ratio:.2f}"


@functools.partial(jax.jit, static_argnames="num_classes")
def _count(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    # One matrix an image, summed afterwards: the batch axis stays a batch axis, so that a sharded
    # batch is counted where it lies and only (C, C) numbers cross devices.
    per_image = jax.vmap(functools.partial(confusion_matrix, num_classes=num_classes))
    return per_image(labels, predictions).sum(axis=0)


def evaluate(
    predict: Callable[[Any, np.ndarray], jax.Array],
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    num_classes: int,
) -> Scores:
    """Scores a network over all batches.

    Args:
      predict: as returned by `make_predictor`.
      variables: passed to `predict`.
      batches: dicts with `image` (B, H, W, 3) uint8, `label` (B, H, W) uint8 (outside
        [0, num_classes) = ignored) and `valid` (B,) bool; rows that are not valid are not counted.
      num_classes: C, at most 255.

    Returns:
      The scores of the whole set.
    """
    confusion = np.zeros((num_classes, num_classes), np.int64)
    pending = None
    for batch in batches:
        labels = np.where(batch["valid"][:, None, None], batch["label"], np.uint8(255))
        predictions = predict(variables, batch["image"])
        counts = _count(jax.device_put(labels, predictions.sharding), predictions, num_classes)
        # int64 on the host, because int32 overflows at 2^31 pixels of a set; one batch late, so
        # that the host decodes the next images while the device works, yet never runs far ahead.
        if pending is not None:
            confusion += np.asarray(pending)
        pending = counts
    if pending is not None:
        confusion += np.asarray(pending)
    return Scores(confusion)
