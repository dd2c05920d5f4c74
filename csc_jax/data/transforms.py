"""Image and label transforms of the host: pure functions of arrays and a NumPy generator.

Everywhere `image` is (H, W, K), uint8 RGB or bands of uint8, uint16 or float32, and `label` (H, W)
uint8 with 255 = ignore. Both go through the same geometry; labels are only ever copied (nearest
neighbour), never interpolated.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

IGNORE = 255
# Channels that OpenCV interpolates at once, and exactly: with others it rounds places to 1/32 px.
_CHANNELS = (1, 3, 4)


def resize(
    image: np.ndarray, label: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes both to `size` = (height, width) px: the image as `resize_image`."""
    if size == label.shape:
        return image, label
    return resize_image(image, size), _nearest(label, size)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes to `size` = (height, width) px: bilinear, or by area where it shrinks."""
    height, width = size
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return _of_channels(
        image, lambda part: cv2.resize(part, (width, height), interpolation=interpolation)
    )


def random_resized_crop(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    scale_range: tuple[float, float],
    size: tuple[int, int],
    fill: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales by a random ratio, up or down with probability 1/2 each, and cuts a random window.

    Where the scaled image is smaller than the window it lies at a random place inside it, on `fill`
    (a value a band), and the label on 255.

    Args:
      scale_range: (low, high) with low <= 1 <= high; the ratio is uniform in [low, 1] or [1, high]
        (decisions.md 22).
      size: (height, width) px of the window.

    Returns:
      Image and label of that size, and a (height, width) bool mask, False on the padding.
    """
    low, high = scale_range
    scale = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    scaled = [max(1, round(side * scale)) for side in label.shape]
    visible, margins = [], list[int]()
    for have, want in zip(scaled, size, strict=True):
        # The window's start in the scaled image; below 0 where that is the smaller one.
        start = int(rng.integers(min(0, have - want), max(0, have - want) + 1))
        first, end = max(start, 0), min(start + want, have)
        visible.append(np.arange(first, end))
        margins += [first - start, start + want - end]
    # Only what shows is scaled: at twice the size that is a small part of the image.
    rows, columns = visible
    image = _bilinear(image, scaled, rows, columns)
    source_rows = _source_index(rows, label.shape[0], scaled[0])
    source_columns = _source_index(columns, label.shape[1], scaled[1])
    label = label.take(source_rows, axis=0).take(source_columns, axis=1)
    inside = np.ones(label.shape, np.uint8)
    if any(margins):
        image = _pad(image, margins, fill)
        label, inside = _pad(label, margins, IGNORE), _pad(inside, margins, 0)
    return image, label, inside.view(bool)


def random_flip(maps: tuple[np.ndarray, ...], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Mirrors maps (H, W, …) of one image left and right with probability 1/2."""
    if rng.random() < 0.5:
        return tuple(_mirrored(x) for x in maps)
    return maps


def _bilinear(
    image: np.ndarray, scaled: Sequence[int], rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Returns these rows and columns of the image resized to `scaled` = (height, width)."""
    if tuple(scaled) == image.shape[:2]:
        return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    y, x = image.shape[0] / scaled[0], image.shape[1] / scaled[1]  # source px per px
    # Pixel centres lie at halves, as in cv2.resize; the border is repeated, as there.
    to_source = np.array([
        [x, 0, (columns[0] + 0.5) * x - 0.5],
        [0, y, (rows[0] + 0.5) * y - 0.5],
    ])  # fmt: skip
    return _of_channels(
        image,
        lambda part: cv2.warpAffine(
            part,
            to_source,
            (len(columns), len(rows)),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        ),
    )


def _of_channels(image: np.ndarray, act: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Returns what OpenCV makes of (H, W, K); it drops an axis of one channel."""
    together = image.shape[-1] if image.shape[-1] in _CHANNELS else 1
    parts = [
        act(np.ascontiguousarray(image[..., first : first + together]))
        for first in range(0, image.shape[-1], together)
    ]
    parts = [part if part.ndim == 3 else part[..., None] for part in parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _mirrored(x: np.ndarray) -> np.ndarray:
    values = x.view(np.uint8) if x.dtype == bool else x
    return cv2.flip(values, 1).reshape(x.shape).view(x.dtype)


def _pad(x: np.ndarray, margins: Sequence[int], value: int | tuple[float, ...]) -> np.ndarray:
    """Adds (top, bottom, left, right) px of `value` around a map."""
    top, bottom, left, right = margins
    if x.ndim == 2 or x.shape[-1] == 3:
        return cv2.copyMakeBorder(x, top, bottom, left, right, cv2.BORDER_CONSTANT, value=value)
    height, width, bands = x.shape
    padded = np.empty((top + height + bottom, left + width + right, bands), x.dtype)
    padded[:] = value
    padded[top : top + height, left : left + width] = x
    return padded


def _source_index(index: np.ndarray, have: int, scaled: int) -> np.ndarray:
    """Returns which of `have` pixels is nearest to each of these pixels, of `scaled`."""
    return (2 * index + 1) * have // (2 * scaled)


def _nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # Plain INTER_NEAREST samples the corner of a pixel and so moves the label half a pixel
    # against the image, which is sampled at pixel centres; the exact one does not.
    return cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
