"""Image and label transforms of the host: pure functions of arrays and a NumPy generator.

Everywhere `image` is (H, W, 3) uint8 RGB and `label` (H, W) uint8 with 255 = ignore. Both go
through the same geometry; labels are only ever copied (nearest neighbour), never interpolated.
"""

import cv2
import numpy as np

IGNORE = 255


def resize(
    image: np.ndarray, label: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes to `size` = (height, width) px: image bilinear, or by area where it shrinks."""
    height, width = size
    if (height, width) == label.shape:
        return image, label
    shrinks = height <= label.shape[0] and width <= label.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation), _nearest(label, size)


def random_resize(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    scale_range: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Scales by a random ratio, up or down with probability 1/2 each (decisions.md 22).

    Args:
      scale_range: (low, high) with low <= 1 <= high; the ratio is uniform in [low, 1] or [1, high].
    """
    low, high = scale_range
    scale = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    size = (max(1, round(label.shape[0] * scale)), max(1, round(label.shape[1] * scale)))
    if size == label.shape:
        return image, label
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return image, _nearest(label, size)


def random_crop(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    fill: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a random `size` = (height, width) px window.

    Where the image is smaller than the window it lies at a random place inside it, on `fill`
    (RGB), and the label on 255.

    Returns:
      Image and label of that size, and a (height, width) bool mask, False on the padding.
    """
    window_image = np.empty((*size, 3), np.uint8)
    window_image[:] = fill
    window_label = np.full(size, IGNORE, np.uint8)
    inside, window = [], []
    for have, want in zip(label.shape, size, strict=True):
        # The window's start in image coordinates; below 0 where the image is the smaller one.
        start = int(rng.integers(min(0, have - want), max(0, have - want) + 1))
        low, high = max(start, 0), min(start + want, have)
        inside.append(slice(low, high))
        window.append(slice(low - start, high - start))
    window_image[tuple(window)] = image[tuple(inside)]
    window_label[tuple(window)] = label[tuple(inside)]
    mask = np.zeros(size, bool)
    mask[tuple(window)] = True
    return window_image, window_label, mask


def random_flip(maps: tuple[np.ndarray, ...], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Mirrors maps (H, W, …) of one image left and right together, with probability 1/2."""
    if rng.random() < 0.5:
        return tuple(np.ascontiguousarray(x[:, ::-1]) for x in maps)
    return maps


def _nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # Plain INTER_NEAREST samples the corner of a pixel and so moves the label half a pixel
    # against the image, which is sampled at pixel centres; the exact one does not.
    return cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
