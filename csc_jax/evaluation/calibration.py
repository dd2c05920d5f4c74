"""Whether a network's confidence is worth what it says: reliability curve and ECE.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017: pixels are sorted by their top
probability into bins of equal width; in each, the mean confidence is held against the share of
pixels that are right.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

BINS = 15  # as in their experiments


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Sums over the pixels whose confidence lies in each bin, (m / 15, (m + 1) / 15] for m = 0, ….

    Attributes:
      count: (15,) float64, whole numbers, pixels.
      confidence: (15,) float64, their top probabilities added up.
      right: (15,) float64, whole numbers, how many of them are right.
    """

    count: np.ndarray
    confidence: np.ndarray
    right: np.ndarray

    @classmethod
    def nothing(cls) -> "Calibration":
        """Returns that of no pixels."""
        return cls(np.zeros(BINS), np.zeros(BINS), np.zeros(BINS))

    def __add__(self, other: "Calibration") -> "Calibration":
        return Calibration(
            self.count + other.count,
            self.confidence + other.confidence,
            self.right + other.right,
        )

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1] (their Eq. 3); nan without pixels."""
        pixels = self.count.sum()
        gaps = np.abs(self.right - self.confidence).sum()
        return float(gaps / pixels) if pixels else float("nan")

    @property
    def accuracy(self) -> np.ndarray:
        """(15,) float64 share of right pixels in each bin; nan of an empty one."""
        return np.where(self.count > 0, self.right / np.maximum(self.count, 1), np.nan)


def calibration_of(rows: np.ndarray) -> Calibration:
    """Returns what the rows of `sort_into_bins` add up to, in double precision."""
    count, confidence, right = rows.astype(np.float64).sum(axis=(2, 3))
    return Calibration(count, confidence, right)


def sort_into_bins(confidence: jax.Array, right: jax.Array, counted: jax.Array) -> jax.Array:
    """Adds up pixels by their confidence, row by row.

    A sum in float32 is exact enough over a row of pixels, not over an image.

    Args:
      confidence: (B, H, W) float32 in [0, 1].
      right: (B, H, W) bool.
      counted: (B, H, W) bool; other pixels have no label.

    Returns:
      (3, 15, B, H) float32: pixels, sum of their confidence, right ones.
    """
    # The bins are open below; a confidence of 0 can only be that of one class among infinitely
    # many, so the first bin may take it.
    index = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)

    def of_bin(m: jax.Array) -> jax.Array:
        inside = counted & (index == m)
        values = (inside, jnp.where(inside, confidence, 0.0), inside & right)
        return jnp.stack([jnp.sum(v.astype(jnp.float32), axis=-1) for v in values])

    # One bin after the other: all at once would need 15 maps of the image's size.
    return jnp.moveaxis(jax.lax.map(of_bin, jnp.arange(BINS)), 0, 1)
