"""Class ids of images from a network's logits: the whole image at once or a sliding window."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from csc_jax.errors import UserError
from csc_jax.models import resize_aligned
from csc_jax.sharding import batch_sharding


def window_starts(length: int, window: int) -> list[int]:
    """Returns the first pixel of each window along one axis (decisions.md 25).

    Windows are two thirds of their size apart (rounded up, as in the lineage) and the last one is
    flush with the border. `window` is at most `length`.
    """
    stride = math.ceil(window * 2 / 3)
    steps = math.ceil((length - window) / stride)
    return [min(i * stride, length - window) for i in range(steps + 1)]


def make_predictor(
    logits_fn: Callable[[Any, jax.Array], jax.Array],
    *,
    num_classes: int,
    mode: str,
    window: tuple[int, int],
    mesh: Mesh,
) -> Callable[[Any, np.ndarray], jax.Array]:
    """Builds `predict(variables, images)`, compiled once for each shape of `images`.

    Args:
      logits_fn: (variables, images (B, h, w, 3) uint8) -> (B, h', w', C) float logits, at any
        stride; normalises the images itself.
      num_classes: C, at most 255.
      mode: `whole`, the image in one piece, or `sliding`, windows whose logits are averaged where
        they overlap (decisions.md 25).
      window: (height, width) px of the sliding window, cut to the image where that is smaller;
        not read in mode `whole`.
      mesh: has an axis `data`, over which the batch is split.

    Returns:
      predict: (variables, images (B, H, W, 3) uint8) -> (B, H, W) uint8 class ids, split over
      `data`. `variables` are replicated on the mesh or lie on the host. Raises UserError where B
      does not divide by the number of devices.

    Raises:
      UserError: an unknown mode, or a window without area.
    """
    if mode == "whole":

        def logits_of(variables: Any, images: jax.Array) -> jax.Array:
            return _at_size(logits_fn, variables, images)

    elif mode == "sliding":
        if min(window) < 1:
            raise UserError(
                f"eval.window is {tuple(window)}; a sliding window needs a height and a width of "
                "at least 1 px. Set --config.eval.window=H,W, or (0, 0) to take data.crop_size."
            )

        def logits_of(variables: Any, images: jax.Array) -> jax.Array:
            return _sliding_sum(logits_fn, variables, images, window, num_classes)

    else:
        raise UserError(f"eval.mode is '{mode}'. Set it to 'whole' or 'sliding'.")

    sharding = batch_sharding(mesh)

    @functools.partial(jax.jit, out_shardings=sharding)
    def class_ids(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(logits_of(variables, images), axis=-1).astype(jnp.uint8)

    def predict(variables: Any, images: np.ndarray) -> jax.Array:
        if len(images) % mesh.size:
            raise UserError(
                f"A batch of {len(images)} images does not divide by the {mesh.size} devices of "
                "the mesh. Set batch.eval to a multiple of their number, or use fewer with "
                "--config.parallel.devices=N."
            )
        return class_ids(variables, jax.device_put(images, sharding))

    return predict


def _at_size(logits_fn: Callable, variables: Any, images: jax.Array) -> jax.Array:
    """(B, h, w, 3) images -> (B, h, w, C) logits at the images' own size."""
    _, height, width, _ = images.shape
    return resize_aligned(logits_fn(variables, images), (height, width))


def _sliding_sum(
    logits_fn: Callable,
    variables: Any,
    images: jax.Array,
    window: tuple[int, int],
    num_classes: int,
) -> jax.Array:
    """(B, H, W, 3) images -> (B, H, W, C) logits summed over the windows that cover a pixel.

    The sum does for the average here: a pixel's number of windows is the same for every class.
    """
    b, height, width, _ = images.shape
    size = (min(window[0], height), min(window[1], width))
    corners = [
        (top, left)
        for top in window_starts(height, size[0])
        for left in window_starts(width, size[1])
    ]

    def add_window(total: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
        start = (0, corner[0], corner[1], 0)
        piece = jax.lax.dynamic_slice(images, start, (b, *size, 3))
        logits = _at_size(logits_fn, variables, piece)
        covered = jax.lax.dynamic_slice(total, start, logits.shape)
        return jax.lax.dynamic_update_slice(total, covered + logits, start), None

    # A scan holds the network once in the program and one window's activations in memory, where
    # an unrolled loop compiles it per window and one large batch holds them all. Convolutions in
    # a scan are slow on CPU in the backward pass only.
    total = jnp.zeros((b, height, width, num_classes), jnp.float32)
    return jax.lax.scan(add_window, total, jnp.asarray(corners))[0]
