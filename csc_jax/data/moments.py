"""Mean and standard deviation of each band, over images that are seen one by one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_AT_ONCE = 1 << 20  # values in float64 at a time


class Moments(NamedTuple):
    """Of the pixels seen so far, one number a band, as float64.

    Attributes:
      pixels: how many.
      mean: (K,).
      squares: (K,) sum of the squared differences from the mean.
    """

    pixels: int
    mean: np.ndarray
    squares: np.ndarray

    def joined(self, other: "Moments") -> "Moments":
        """Returns those of both together (Chan et al., 1979)."""
        count = self.pixels + other.pixels
        if not count:
            return self
        shift, share = other.mean - self.mean, other.pixels / count
        mean = self.mean + shift * share
        squares = self.squares + other.squares + shift**2 * (self.pixels * share)
        return Moments(count, mean, squares)

    @property
    def deviation(self) -> np.ndarray:
        """(K,) standard deviation."""
        return np.sqrt(self.squares / max(self.pixels, 1))


def nothing(bands: int) -> Moments:
    """Returns the moments before any image."""
    return Moments(0, np.zeros(bands), np.zeros(bands))


def of_image(image: np.ndarray) -> Moments:
    """Returns the moments of one image (H, W, K), in parts, so that memory stays small."""
    pixels = image.reshape(-1, image.shape[-1])
    rows = max(1, _AT_ONCE // image.shape[-1])
    total = nothing(image.shape[-1])
    for start in range(0, len(pixels), rows):
        part = pixels[start : start + rows].astype(np.float64)
        mean = part.mean(axis=0)
        total = total.joined(Moments(len(part), mean, ((part - mean) ** 2).sum(axis=0)))
    return total


def constant(deviation: Sequence[float]) -> list[int]:
    """Returns the numbers, from 1, of the bands that hold one value throughout."""
    return [index for index, each in enumerate(deviation, start=1) if not each > 0]
