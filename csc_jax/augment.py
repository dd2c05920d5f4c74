"""What happens to a batch on the device, inside the step: normalisation and the strong view A_s.

The weak view A_w (resize, crop, flip) is made on the host, in `csc_jax/data`.
"""

from collections.abc import Callable

import dm_pix as pix
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict


def normalize_images(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Maps RGB images (B, H, W, 3) on 0..255 to zero mean and unit deviation."""
    pixels = images.astype(jnp.float32)
    return (pixels - jnp.asarray(mean)[None, None, None]) / jnp.asarray(std)[None, None, None]


def photometric(key: Array, images: Array, config: ConfigDict) -> Array:
    """Colour jitter, grey-scale and blur, each with its own probability (decisions.md 23).

    Args:
      key: random key.
      images: (B, H, W, 3) uint8 or float on 0..255.
      config: of the strong view; an operation with probability 0 is not traced at all.

    Returns:
      (B, H, W, 3) float32 on 0..255.
    """
    images = images.astype(jnp.float32)
    operations = [
        (config.color_jitter, _color_jitter),
        (config.grayscale, lambda _, image: pix.rgb_to_grayscale(image, keep_dims=True)),
        (config.blur, _blur),
    ]
    for i, (probability, operation) in enumerate(operations):
        if probability > 0:
            images = _sometimes(jax.random.fold_in(key, i), images, probability, operation)
    return images


def _sometimes(
    key: Array, images: Array, probability: float, operation: Callable[[Array, Array], Array]
) -> Array:
    draw_key, operation_key = jax.random.split(key)
    chosen = jax.random.bernoulli(draw_key, probability, (images.shape[0],))
    keys = jax.random.split(operation_key, images.shape[0])
    changed = jax.vmap(operation)(keys, images / 255.0) * 255.0  # dm-pix works on [0, 1]
    return jnp.where(chosen[:, None, None, None], jnp.clip(changed, 0.0, 255.0), images)


def _color_jitter(key: Array, image: Array) -> Array:
    # Strengths of the strong view in UniMatch and of SimCLR's half-strength setting.
    brightness, contrast, saturation, hue = jax.random.split(key, 4)
    image = pix.random_brightness(brightness, image, 0.5)
    image = pix.random_contrast(contrast, image, 0.5, 1.5)
    image = pix.random_saturation(saturation, _stored(jnp.clip(image, 0.0, 1.0)), 0.5, 1.5)
    return pix.random_hue(hue, _stored(jnp.clip(image, 0.0, 1.0)), 0.25)


def _stored(image: Array) -> Array:
    # dm-pix finds a pixel's largest channel by comparing floats. A compiler that computes them once
    # more for the comparison, rounded otherwise, gives up to a tenth of the pixels another hue.
    return jax.lax.optimization_barrier(image)


def _blur(key: Array, image: Array) -> Array:
    sigma = jax.random.uniform(key, (), minval=0.1, maxval=2.0)  # px, as in UniMatch
    return pix.gaussian_blur(image, sigma, kernel_size=9)


def cutmix_mask(key: Array, batch: int, size: tuple[int, int], probability: float) -> Array:
    """Draws one rectangle of half the image's area per image (decisions.md 23).

    Args:
      key: random key.
      batch: B.
      size: (H, W) px.
      probability: of having a rectangle at all, per image.

    Returns:
      (B, H, W) bool, True where the next image of the batch shows.
    """
    height, width = size
    use_key, shape_key, x_key, y_key = jax.random.split(key, 4)
    # Width uniform in [W/2, W] and height = area / width: both sides stay inside the image.
    box_w = jax.random.uniform(shape_key, (batch,), minval=0.5, maxval=1.0) * width
    box_h = 0.5 * height * width / box_w
    left = jax.random.uniform(x_key, (batch,)) * (width - box_w)
    top = jax.random.uniform(y_key, (batch,)) * (height - box_h)
    x = jnp.arange(width)[None, :] + 0.5
    y = jnp.arange(height)[None, :] + 0.5
    inside_x = (x >= left[:, None]) & (x < (left + box_w)[:, None])  # (B, W)
    inside_y = (y >= top[:, None]) & (y < (top + box_h)[:, None])  # (B, H)
    used = jax.random.bernoulli(use_key, probability, (batch,))
    return inside_y[:, :, None] & inside_x[:, None, :] & used[:, None, None]


def mix(mask: Array, x: Array) -> Array:
    """Pastes the next image of the batch (the last one's next is the first) where `mask` is True.

    Args:
      mask: (B, H, W) bool.
      x: (B, H, W) or (B, H, W, K): images, labels, masks and features are mixed alike.
    """
    wide = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.where(wide, jnp.roll(x, -1, axis=0), x)


def nearest(x: Array, size: tuple[int, int]) -> Array:
    """Samples labels or masks (B, H, W) down to (B, h, w), nearest neighbour as in the lineage."""
    rows = (jnp.arange(size[0]) * x.shape[1]) // size[0]
    columns = (jnp.arange(size[1]) * x.shape[2]) // size[1]
    return x[:, rows][:, :, columns]
