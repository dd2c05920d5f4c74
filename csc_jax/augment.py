"""What happens to a batch on the device, inside the step: normalisation and the strong view A_s.

The weak view A_w (resize, crop, flip) is made on the host, in `csc_jax/data`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict


def normalize_images(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Maps images (B, H, W, K) in their units to zero mean and unit deviation."""
    pixels = images.astype(jnp.float32)
    return (pixels - jnp.asarray(mean)[None, None, None]) / jnp.asarray(std)[None, None, None]


# Of the strong view in UniMatch's code.
_FACTORS = (0.5, 1.5)  # of brightness, contrast and saturation
_HUE = (-0.25, 0.25)  # turns of the colour wheel
_SIGMA = (0.1, 2.0)  # px, standard deviation of the blur

_REACH = 8  # px that an image is extended by for the blur: 4 of the largest deviation
_TRIES = 256  # to draw a CutMix box that fits into the image

_Planes = tuple[Array, Array, Array]  # red, green and blue, (H, W) each


def photometric(key: Array, images: Array, config: ConfigDict) -> Array:
    """Colour jitter, grey-scale and blur, each with its own probability (decisions.md 23).

    Order and strengths are those of UniMatch's code, which works on whole grey levels: it rounds
    after every change. Here values stay float32.

    Args:
      key: random key.
      images: (B, H, W, 3) uint8 or float on 0..255.
      config: of the strong view; an operation with probability 0 is not traced at all.

    Returns:
      (B, H, W, 3) float32 on 0..255.
    """
    images = images.astype(jnp.float32)
    operations = [
        (config.color_jitter, _random_jitter),
        (config.grayscale, lambda _, image: jnp.stack([_grey(_planes(image))] * 3, axis=-1)),
        (config.blur, _random_blur),
    ]
    for i, (probability, operation) in enumerate(operations):
        if probability > 0:
            images = _sometimes(jax.random.fold_in(key, i), images, probability, operation)
    return images


def photometric_bands(
    key: Array, images: Array, config: ConfigDict, std: tuple[float, ...]
) -> Array:
    """Brightness, contrast and blur of images that keep their values, each band on its own.

    Hue, saturation and grey-scale mean nothing where bands are not red, green and blue, so that
    `color_jitter` stands for brightness and contrast alone and `grayscale` does nothing.

    Args:
      key: random key.
      images: (B, H, W, K) in any units.
      config: of the strong view; an operation with probability 0 is not traced at all.
      std: deviation of each band.

    Returns:
      (B, H, W, K) float32 in the same units.
    """
    images = images.astype(jnp.float32)
    operations = [
        (config.color_jitter, lambda key, image: _jitter_bands(key, image, jnp.asarray(std))),
        (config.blur, _random_blur),
    ]
    for i, (probability, operation) in enumerate(operations):
        if probability > 0:
            images = _chosen(jax.random.fold_in(key, i), images, probability, operation)
    return images


def _jitter_bands(key: Array, image: Array, std: Array) -> Array:
    """Stretches each band of (H, W, K) around its mean and adds up to one deviation of it."""
    factor_key, shift_key = jax.random.split(key)
    bands = (image.shape[-1],)
    factors = jax.random.uniform(factor_key, bands, minval=_FACTORS[0], maxval=_FACTORS[1])
    shifts = jax.random.uniform(shift_key, bands, minval=-1.0, maxval=1.0) * std
    mean = jnp.mean(image, axis=(0, 1), keepdims=True)
    return (image - mean) * factors[None, None] + mean + shifts[None, None]


def _sometimes(
    key: Array, images: Array, probability: float, operation: Callable[[Array, Array], Array]
) -> Array:
    def within(key: Array, image: Array) -> Array:
        return jnp.clip(operation(key, image / 255.0) * 255.0, 0.0, 255.0)

    return _chosen(key, images, probability, within)


def _chosen(
    key: Array, images: Array, probability: float, operation: Callable[[Array, Array], Array]
) -> Array:
    draw_key, operation_key = jax.random.split(key)
    chosen = jax.random.bernoulli(draw_key, probability, (images.shape[0],))
    keys = jax.random.split(operation_key, images.shape[0])
    return jnp.where(chosen[:, None, None, None], jax.vmap(operation)(keys, images), images)


def _random_jitter(key: Array, image: Array) -> Array:
    order_key, factor_key, hue_key = jax.random.split(key, 3)
    return color_jitter(
        image,
        jax.random.permutation(order_key, 4),
        jax.random.uniform(factor_key, (3,), minval=_FACTORS[0], maxval=_FACTORS[1]),
        jax.random.uniform(hue_key, minval=_HUE[0], maxval=_HUE[1]),
    )


def _random_blur(key: Array, image: Array) -> Array:
    return blur(image, jax.random.uniform(key, minval=_SIGMA[0], maxval=_SIGMA[1]))


def color_jitter(image: Array, order: Array, factors: Array, hue: Array) -> Array:
    """Changes brightness, contrast, saturation and hue of one image: torchvision's ColorJitter.

    Args:
      image: (H, W, 3) float32 on [0, 1].
      order: (4,) int, the changes in their order: 0 brightness, 1 contrast, 2 saturation, 3 hue.
      factors: (3,) of the first three; 1 changes nothing.
      hue: () turns of the colour wheel.

    Returns:
      (H, W, 3) float32 on [0, 1].
    """
    # Every image has an order of its own. Choosing among four changes at each of four places would
    # compute sixteen. But the first three are one formula, a blend, which leaves an image as it is
    # at a factor of 1: six blends, three before the hue and three after it, half of them idle.
    place = jnp.arange(3)
    before_hue = place < jnp.argmax(order == 3)
    blends = jnp.where(before_hue, order[:3], order[1:])  # the order without the hue
    planes = _blend(_planes(image), blends, jnp.where(before_hue, factors[blends], 1.0))
    planes = _blend(_turn(planes, hue), blends, jnp.where(before_hue, 1.0, factors[blends]))
    return jnp.stack(planes, axis=-1)


def _planes(image: Array) -> _Planes:
    # They stay apart until the last change: XLA would compute an image of three channels once more
    # for each channel that is read.
    return image[..., 0], image[..., 1], image[..., 2]


def _blend(planes: _Planes, blends: Array, factors: Array) -> _Planes:
    """Blends with black (0), the mean grey (1) and the grey of each pixel (2), in this order."""
    for blend, factor in zip(blends, factors, strict=True):
        grey = _grey(planes)
        other = jnp.where(blend == 0, 0.0, jnp.where(blend == 1, jnp.mean(grey), grey))
        red, green, blue = (jnp.clip(factor * x + (1 - factor) * other, 0, 1) for x in planes)
        planes = red, green, blue
    return planes


def _grey(planes: _Planes) -> Array:
    red, green, blue = planes
    return 0.2989 * red + 0.587 * green + 0.114 * blue  # torchvision's weights


def _turn(planes: _Planes, hue: Array) -> _Planes:
    """Turns the hue of HSV by `hue` turns; saturation and value stay."""
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    spread = value - jnp.minimum(jnp.minimum(red, green), blue)
    divisor = jnp.where(spread > 0, 6 * spread, 1.0)
    # The largest channel is found by comparing channels, not as the one that equals `value`: where
    # a compiler computed a channel twice, rounded differently, up to a tenth of the pixels got
    # another hue. A comparison can only change between channels that are as good as equal, and then
    # both branches agree.
    old = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / divisor,
        jnp.where(green >= blue, (blue - red) / divisor + 1 / 3, (red - green) / divisor + 2 / 3),
    )
    sixths = 6 * ((old + hue) % 1.0)
    return (
        value - spread * jnp.clip(2 - jnp.abs(sixths - 3), 0, 1),
        value - spread * jnp.clip(jnp.abs(sixths - 2) - 1, 0, 1),
        value - spread * jnp.clip(jnp.abs(sixths - 4) - 1, 0, 1),
    )


def blur(image: Array, sigma: Array) -> Array:
    """Blurs one image with a Gaussian; beyond its border the image goes on as at the border.

    Args:
      image: (H, W, K) float32.
      sigma: () standard deviation in px.
    """
    # As matrices: depthwise convolutions are very slow on a CPU.
    rows, columns = _gaussian(image.shape[0], sigma), _gaussian(image.shape[1], sigma)
    extended = jnp.pad(image, ((_REACH, _REACH), (_REACH, _REACH), (0, 0)), mode="edge")
    y = jnp.einsum("Hh,hwc->Hwc", rows, extended, precision="highest")
    return jnp.einsum("Ww,hwc->hWc", columns, y, precision="highest")


def _gaussian(length: int, sigma: Array) -> Array:
    """(length, length + 2 _REACH): what each pixel takes of an extended line; rows sum to 1."""
    place = jnp.arange(length + 2 * _REACH) - _REACH
    distance = place[None, :] - jnp.arange(length)[:, None]
    weights = jnp.exp(-0.5 * (distance / sigma) ** 2)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


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
    used = jax.random.bernoulli(use_key, probability, (batch,))
    return _rectangles(size, left, top, box_w, box_h) & used[:, None, None]


def unimatch_mask(key: Array, batch: int, size: tuple[int, int], config: ConfigDict) -> Array:
    """Draws the CutMix boxes of UniMatch's code, at most one an image.

    The area is uniform in its range. Then a ratio of the sides and a place are drawn until the box
    lies inside the image, so that long boxes and those that few places have room for are rarer.

    Args:
      key: random key.
      batch: B.
      size: (H, W) px.
      config: `config.method.unimatch_view`, for `cutmix` and the ranges of area and ratio.

    Returns:
      (B, H, W) bool, True where the next image of the batch shows.
    """
    height, width = size
    use_key, area_key, ratio_key, x_key, y_key = jax.random.split(key, 5)
    low, high = config.cutmix_area
    area = jax.random.uniform(area_key, (batch, 1), minval=low, maxval=high) * (height * width)
    # The first of many tries that fits, where theirs has a loop: a GPU would wait for its end. None
    # fits in about one image of 10^7 at 3:4 and of 40,000 at 1:2; such an image has no box.
    tries = (batch, _TRIES)
    low, high = config.cutmix_ratio
    ratio = jax.random.uniform(ratio_key, tries, minval=low, maxval=high)
    box_w, box_h = jnp.floor(jnp.sqrt(area / ratio)), jnp.floor(jnp.sqrt(area * ratio))
    left = jnp.floor(jax.random.uniform(x_key, tries) * width)
    top = jnp.floor(jax.random.uniform(y_key, tries) * height)
    fits = (left + box_w <= width) & (top + box_h <= height)
    first = jnp.argmax(fits, axis=1)[:, None]
    box = [jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (left, top, box_w, box_h)]
    used = jax.random.bernoulli(use_key, config.cutmix, (batch,)) & jnp.any(fits, axis=1)
    return _rectangles(size, *box) & used[:, None, None]


def _rectangles(
    size: tuple[int, int], left: Array, top: Array, width: Array, height: Array
) -> Array:
    """(B, H, W) bool, True at the pixels whose centre is in their image's rectangle, (B,) px."""
    x = jnp.arange(size[1])[None, :] + 0.5
    y = jnp.arange(size[0])[None, :] + 0.5
    inside_x = (x >= left[:, None]) & (x < (left + width)[:, None])  # (B, W)
    inside_y = (y >= top[:, None]) & (y < (top + height)[:, None])  # (B, H)
    return inside_y[:, :, None] & inside_x[:, None, :]


def mix(mask: Array, x: Array) -> Array:
    """Pastes the next image of the batch (the last one's next is the first) where `mask` is True.

    Args:
      mask: (B, H, W) bool.
      x: (B, H, W) or (B, H, W, K): images, labels, masks and features are mixed alike.
    """
    wide = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.where(wide, jnp.roll(x, -1, axis=0), x)


def nearest(x: Array, size: tuple[int, int]) -> Array:
    """Samples (B, H, W, ...) down to (B, h, w, ...), nearest neighbour as in the lineage."""
    if size == x.shape[1:3]:
        return x
    rows = (jnp.arange(size[0]) * x.shape[1]) // size[0]
    columns = (jnp.arange(size[1]) * x.shape[2]) // size[1]
    return x[:, rows][:, :, columns]
