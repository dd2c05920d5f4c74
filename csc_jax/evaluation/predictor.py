"""Class ids of images from a network's logits: whole, sliding window, centre crop; flips, scales.

An image may lie in the upper left of a padded batch, so that images of many sizes need few compiled
programs. `size` is then its own (height, width), a traced value, and every resize, flip, window and
crop is placed by that size and not by the padded one.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from csc_jax.errors import UserError
from csc_jax.models.resize import nearest_multiple
from csc_jax.parallel.sharding import batch_sharding, place_whole

log = logging.getLogger("csc_jax")

NOT_PREDICTED = 255  # class id of padding, and of what lies outside the centre crop
_MANY_SHAPES = 8  # compiled programs after which the user hears of eval.size_multiple

LogitsFn = Callable[[Any, jax.Array], jax.Array]
SizeFn = Callable[[jax.Array], jax.Array]


def window_starts(length: int, window: int) -> list[int]:
    """Returns the first pixel of each window along one axis (decisions.md 25).

    Windows are two thirds of their size apart (rounded up, as in the lineage) and the last one is
    flush with the border. `window` is at most `length`.
    """
    stride = _stride(window)
    steps = math.ceil((length - window) / stride)
    return [min(i * stride, length - window) for i in range(steps + 1)]


def make_predictor(
    logits_fn: LogitsFn,
    logits_size: SizeFn,
    *,
    num_classes: int,
    mode: str,
    window: tuple[int, int],
    mesh: Mesh,
    size_multiple: int = 1,
    patch: int = 1,
    fill: Sequence[float] = (0.0, 0.0, 0.0),
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    as_logits: bool = False,
) -> Callable[[Any, np.ndarray], jax.Array]:
    """Builds `predict(variables, images)`, compiled once for each padded shape of `images`.

    With several scales or flips, the softmax probabilities of all views are averaged at the size of
    the image, as mmsegmentation does in test-time augmentation.

    Args:
      logits_fn: (variables, images (B, h, w, K), of any type) -> (B, h', w', C) float
        logits at any stride; normalises the images itself.
      logits_size: (2,) int32 sides (h, w) of any image -> those (h', w') of its logits.
      num_classes: C, at most 255.
      mode: `whole`, the image in one piece; `sliding`, windows whose logits are averaged where they
        overlap (decisions.md 25); or `center_crop`, one window in the middle and nothing around it.
      window: (height, width) px of the window, cut to the image where that is smaller; not read in
        mode `whole`.
      mesh: has an axis `data`, over which the batch is split.
      size_multiple: px; the sides of images are padded, below and on the right, to the next
        multiple. 1 pads nothing.
      patch: px; what the network sees is resized to sides that are the nearest multiples of it, and
        its logits back. 1 resizes nothing.
      fill: a value a band, of the padding.
      scales: ratios to which the images are resized; at least one.
      flip: whether each scale is seen mirrored, too.
      as_logits: whether `predict` returns what it takes the largest of in place of class ids, for
        `enlarge`: (B, H', W', C) float32 logits, or sums of probabilities with flips or scales.
        Not for mode `center_crop`.

    Returns:
      predict: (variables, images (B, H, W, K)) -> (B, H', W') uint8 class ids, split over
      `data`, where H' >= H and W' >= W are the padded sides. It is 255 (`NOT_PREDICTED`) on the
      padding and around the centre crop. `variables` are replicated on the mesh or lie on the host.
      Raises UserError where B does not divide by the number of devices.

    Raises:
      UserError: an unknown mode, or a window without area.
    """
    if mode not in ("whole", "sliding", "center_crop"):
        raise UserError(f"eval.mode is '{mode}'. Set it to 'whole', 'sliding' or 'center_crop'.")
    if mode != "whole" and min(window) < 1:
        raise UserError(
            f"eval.window is {tuple(window)}; a window needs a height and a width of at least 1 "
            "px. Set --config.eval.window=H,W, or (0, 0) to take data.crop_size."
        )
    logits = functools.partial(_at_size, logits_fn, logits_size)
    if patch > 1:
        logits = functools.partial(_in_patches, logits, patch, fill)
    if mode == "sliding":
        logits = functools.partial(_sliding, logits, window, num_classes)
    if flip or tuple(scales) != (1.0,):
        logits = functools.partial(_averaged, logits, num_classes, fill, scales, flip)
    sharding = batch_sharding(mesh)

    @functools.partial(jax.jit, out_shardings=sharding)
    def compute(variables: Any, images: jax.Array, size: jax.Array) -> jax.Array:
        if as_logits:
            return logits(variables, images, size)
        if mode == "center_crop":
            return _in_the_middle(logits, variables, images, size, window)
        return _class_ids(logits, variables, images, size)

    shapes: set[tuple[int, ...]] = set()

    def predict(variables: Any, images: np.ndarray) -> jax.Array:
        if len(images) % mesh.size:
            raise UserError(
                f"A batch of {len(images)} images does not divide by the {mesh.size} devices of "
                "the mesh. Set batch.eval to a multiple of their number, or use fewer with "
                "--config.parallel.devices=N."
            )
        size = np.array(images.shape[1:3], np.int32)
        images = pad_to_multiple(images, size_multiple, fill)
        if images.shape not in shapes:
            shapes.add(images.shape)
            if len(shapes) == _MANY_SHAPES:
                log.warning(
                    "The network has been compiled for %d sizes of images, one after the other; "
                    "--config.eval.size_multiple=64 pads them to fewer.",
                    _MANY_SHAPES,
                )
        return compute(variables, place_whole(images, sharding), size)

    return predict


def enlarge(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the class ids of an image that was resized for the network, at its own size.

    Borders between classes come out as smooth as the logits are; enlarged class ids have steps.

    Args:
      logits: (h, w, C) float32, C at most 255; what is resized bilinearly.
      size: (height, width) px of the image.

    Returns:
      `size` uint8 class ids.
    """
    ids = np.zeros(size, np.uint8)
    best = np.full(size, -np.inf, np.float32)
    for index, plane in enumerate(enlarge_planes(logits, size)):
        ids[plane > best] = index
        np.maximum(best, plane, out=best)
    return ids


def enlarge_planes(logits: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yields what `enlarge` compares, `size` float32 for each class; all would be C such maps."""
    height, width = size
    for index in range(logits.shape[-1]):
        plane = np.ascontiguousarray(logits[..., index])
        yield cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)


def pad_to_multiple(images: np.ndarray, multiple: int, fill: Sequence[float]) -> np.ndarray:
    """Pads images (B, H, W, K) below and on the right with `fill`, a value a band."""
    b, height, width, bands = images.shape
    shape = (b, -(-height // multiple) * multiple, -(-width // multiple) * multiple, bands)
    if shape == images.shape:
        return images
    padded = np.empty(shape, images.dtype)
    padded[:] = np.round(fill) if images.dtype.kind == "u" else fill
    padded[:, :height, :width] = images
    return padded


# Below, `images` are (B, H, W, K) of which the upper left `size` is the picture, and a `Logits` is
# a function (variables, images, size) -> (B, H, W, C) float32 logits, right within `size`.
Logits = Callable[[Any, jax.Array, jax.Array], jax.Array]


def _class_ids(logits: Logits, variables: Any, images: jax.Array, size: jax.Array) -> jax.Array:
    """(B, H, W, K) images -> (B, H, W) uint8 class ids, 255 on the padding."""
    ids = jnp.argmax(logits(variables, images, size), axis=-1).astype(jnp.uint8)
    return jnp.where(_inside(size, images.shape[1:3])[None], ids, NOT_PREDICTED)


def _in_the_middle(
    logits: Logits, variables: Any, images: jax.Array, size: jax.Array, window: tuple[int, int]
) -> jax.Array:
    """(B, H, W, K) images -> (B, H, W) uint8 class ids, 255 around the window in the middle."""
    b, height, width, channels = images.shape
    shape = (min(window[0], height), min(window[1], width))
    top, left = jnp.maximum(size - jnp.array(shape), 0) // 2
    piece = jax.lax.dynamic_slice(images, (0, top, left, 0), (b, *shape, channels))
    ids = _class_ids(logits, variables, piece, jnp.minimum(size, jnp.array(shape)))
    nothing = jnp.full((b, height, width), NOT_PREDICTED, jnp.uint8)
    return jax.lax.dynamic_update_slice(nothing, ids, (0, top, left))


def _at_size(
    logits_fn: LogitsFn,
    logits_size: SizeFn,
    variables: Any,
    images: jax.Array,
    size: jax.Array,
) -> jax.Array:
    """(B, H, W, K) images -> (B, H, W, C) logits of the image in one piece."""
    # Where there is padding, its logits follow those of the image.
    return _resize(logits_fn(variables, images), logits_size(size), size, images.shape[1:3])


def _in_patches(
    logits: Logits,
    patch: int,
    fill: Sequence[float],
    variables: Any,
    images: jax.Array,
    size: jax.Array,
) -> jax.Array:
    """(B, H, W, K) images -> (B, H, W, C) logits of the image at a size of whole patches."""
    shape = images.shape[1:3]
    whole_shape = tuple(nearest_multiple(length, patch) for length in shape)
    whole = nearest_multiple(size, patch)
    seen = _resized(images, size, whole, whole_shape, fill)
    return _resize(logits(variables, seen, whole), whole, size, shape)


def _resized(
    images: jax.Array,
    size: jax.Array,
    new_size: jax.Array,
    new_shape: Sequence[int],
    fill: Sequence[float],
) -> jax.Array:
    """Resizes the picture in (B, H, W, K) as `_resize` does; `fill` is around it."""
    resized = _resize(images.astype(jnp.float32), size, new_size, new_shape)
    inside = _inside(new_size, new_shape)[None, :, :, None]
    return jnp.where(inside, resized, jnp.array(fill, jnp.float32)[None, None, None])


def _sliding(
    of_window: Logits,
    window: tuple[int, int],
    num_classes: int,
    variables: Any,
    images: jax.Array,
    size: jax.Array,
) -> jax.Array:
    """(B, H, W, K) images -> (B, H, W, C) logits, the mean over the windows that cover a pixel."""
    b, height, width, channels = images.shape
    shape = (min(window[0], height), min(window[1], width))
    tops, rows = _windows(size[0], height, shape[0])
    lefts, columns = _windows(size[1], width, shape[1])
    inner_size = jnp.minimum(size, jnp.array(shape))

    def add_window(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        row, column = i // len(lefts), i % len(lefts)
        start = (0, tops[row], lefts[column], 0)
        piece = jax.lax.dynamic_slice(images, start, (b, *shape, channels))
        logits = of_window(variables, piece, inner_size)
        logits *= (rows[row].any() & columns[column].any()).astype(logits.dtype)
        covered = jax.lax.dynamic_slice(total, start, logits.shape)
        return jax.lax.dynamic_update_slice(total, covered + logits, start), None

    # A scan holds the network once in the program and one window's activations in memory, where
    # an unrolled loop compiles it per window and one large batch holds them all. Convolutions in
    # a scan are slow on CPU in the backward pass only.
    total = jnp.zeros((b, height, width, num_classes), jnp.float32)
    total, _ = jax.lax.scan(add_window, total, jnp.arange(len(tops) * len(lefts)))
    times = rows.sum(axis=0)[:, None] * columns.sum(axis=0)[None]  # (H, W)
    return total / jnp.maximum(times, 1)[None, :, :, None]


def _windows(length: jax.Array, padded: int, window: int) -> tuple[jax.Array, jax.Array]:
    """Places the windows of one axis; see `window_starts`.

    Args:
      length: px of the image, up to `padded`.
      padded: px of the array.
      window: px, at most `padded`.

    Returns:
      (K,) int32 first pixels, and (K, padded) bool, the pixels that a window covers: none for a
      window that only the padding would need.
    """
    index = jnp.arange(len(window_starts(padded, window)))
    stride, last = _stride(window), jnp.maximum(length - window, 0)
    starts = jnp.minimum(index * stride, last)
    needed = (index - 1) * stride < last
    pixel = jnp.arange(padded)[None]
    covers = (starts[:, None] <= pixel) & (pixel < starts[:, None] + window) & needed[:, None]
    return starts, covers


def _averaged(
    logits: Logits,
    num_classes: int,
    fill: Sequence[float],
    scales: Sequence[float],
    flip: bool,
    variables: Any,
    images: jax.Array,
    size: jax.Array,
) -> jax.Array:
    """(B, H, W, K) images -> (B, H, W, C), sum over the views of their softmax probabilities."""
    shape = images.shape[1:3]
    mirrorings = jnp.array([False, True] if flip else [False])
    total = jnp.zeros((*images.shape[:3], num_classes), jnp.float32)

    def add_view(
        view: jax.Array, view_size: jax.Array, total: jax.Array, mirrored: jax.Array
    ) -> tuple[jax.Array, None]:
        view = jnp.where(mirrored, _mirror(view, view_size), view)
        found = logits(variables, view, view_size)
        found = jnp.where(mirrored, _mirror(found, view_size), found)
        return total + jax.nn.softmax(_resize(found, view_size, size, shape)), None

    for scale in scales:
        view, view_size = images, size
        if scale != 1:
            view_size = _scaled(size, scale)
            view_shape = tuple(int(n) for n in _scaled(np.array(shape), scale))
            view = _resized(images, size, view_size, view_shape, fill)
        # A scan, so that the network is in the program once for each scale.
        add = functools.partial(add_view, view, view_size)
        total, _ = jax.lax.scan(add, total, mirrorings)
    return total


def _scaled(size: Any, scale: float) -> Any:
    """Returns a size in px, array or traced, times a ratio: rounded, at least 1."""
    return (size * np.float32(scale) + np.float32(0.5)).astype(np.int32).clip(1)


def _mirror(x: jax.Array, size: jax.Array) -> jax.Array:
    """Mirrors the picture in (B, H, W, K) left and right; what is padding stays on the right."""
    return jnp.roll(x[:, :, ::-1], size[1] - x.shape[2], axis=2)


def _inside(size: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns (H, W) bool, True on the picture; `shape` is (H, W)."""
    return (jnp.arange(shape[0]) < size[0])[:, None] & (jnp.arange(shape[1]) < size[1])[None]


def _resize(
    x: jax.Array, size: jax.Array, new_size: jax.Array, new_shape: Sequence[int]
) -> jax.Array:
    """Resizes the picture in (B, h, w, K) bilinearly with aligned corners; see `resize_aligned`.

    Returns:
      (B, H, W, K), `new_shape` being (H, W), of which the upper left `new_size` is the picture.
    """
    rows = _weights(size[0], new_size[0], x.shape[1], new_shape[0])
    columns = _weights(size[1], new_size[1], x.shape[2], new_shape[1])
    y = jnp.einsum("Hh,bhwk->bHwk", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("Ww,bhwk->bhWk", columns, y, precision="highest").astype(x.dtype)


def _weights(n_in: jax.Array, n_out: jax.Array, length_in: int, length_out: int) -> jax.Array:
    """Interpolation matrix (length_out, length_in) from n_in to n_out px, float32."""
    # Whole pixels in integers: a division of floats is inexact on some devices, and then even a
    # resize to the same size would blend neighbours.
    below, rest = jnp.divmod(jnp.arange(length_out) * (n_in - 1), jnp.maximum(n_out - 1, 1))
    offset = below[:, None] - jnp.arange(length_in)[None]  # px, to each input pixel
    distance = jnp.abs(offset + (rest / jnp.maximum(n_out - 1, 1))[:, None])
    return jnp.maximum(0.0, 1.0 - distance).astype(jnp.float32)


def _stride(window: int) -> int:
    return math.ceil(window * 2 / 3)
