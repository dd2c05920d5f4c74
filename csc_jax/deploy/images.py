"""What a user has for an image, as (H, W, 3) uint8 RGB."""

import os
from typing import Any

import numpy as np
from PIL import Image

from csc_jax import paths
from csc_jax.data import codec
from csc_jax.errors import UserError
from csc_jax.text import name

_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's modes


def as_rgb(image: Any, bits: int = 0) -> np.ndarray:
    """Returns an image as (H, W, 3) uint8 RGB.

    Args:
      image: a path; an image of Pillow; or an array of uint8, (H, W, 3) RGB, (H, W, 4) with an
        alpha channel, which is dropped, or grey as (H, W) or (H, W, 1).
      bits: `data.image_bits`, for a file.

    Raises:
      UserError: something else, values that are no uint8, a file that cannot be read, or more
        pixels than `codec.MAX_PIXELS`.
    """
    if isinstance(image, (str, os.PathLike)):
        return codec.read_image(paths.given("The image", os.fspath(image)), bits)
    if isinstance(image, Image.Image):
        return _of_pillow(image, "The image")
    if not hasattr(image, "__array__"):
        raise UserError(
            f"An image is a path, an image of Pillow or an array, not {type(image).__name__!r}."
        )
    return _of_array(np.asarray(image))


def check_size(height: int, width: int, what: str) -> None:
    """Raises UserError for an image without pixels, or with more than are read in one piece."""
    if height < 1 or width < 1:
        raise UserError(f"{what} is {height}x{width} px; it needs at least one pixel.")
    if height * width > codec.MAX_PIXELS:
        raise UserError(
            f"{what} is {height}x{width} px, more than the {codec.MAX_PIXELS} that are taken in "
            "one piece. Cut it into tiles."
        )


def _of_pillow(image: Image.Image, what: str) -> np.ndarray:
    check_size(image.height, image.width, what)
    if image.mode not in _EIGHT_BITS:
        raise UserError(
            f"{what} has Pillow's mode {name(image.mode)!r}; it takes 8 bits a channel, such as "
            "image.convert('RGB')."
        )
    try:
        return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reads the pixels only now
        raise UserError(f"{what} cannot be read: {name(error)}.") from error


def _of_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        raise UserError(
            f"The image is an array of {array.dtype}; it takes uint8, values of 0 to 255. Scale "
            "and round it first."
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"The image is an array of the shape {array.shape}; it takes (H, W, 3) RGB, (H, W, 4) "
            "RGBA, or (H, W) grey. Several images are given as a list."
        )
    check_size(array.shape[0], array.shape[1], "The image")
    if array.shape[-1] == 1:
        return array.repeat(3, axis=-1)
    return np.ascontiguousarray(array[..., :3])
