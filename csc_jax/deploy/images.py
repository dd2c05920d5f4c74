"""What a user has for an image, as the network takes it."""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from csc_jax import paths
from csc_jax.config import bands
from csc_jax.data import codec, raster
from csc_jax.errors import UserError
from csc_jax.text import name

_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's modes


def as_image(image: Any, data: ConfigDict) -> np.ndarray:
    """Returns an image as the network takes it: (H, W, 3) uint8 RGB, or (H, W, K) of its values.

    Args:
      image: a path; an image of Pillow; or an array. For RGB it is of uint8, (H, W, 3), (H, W, 4)
        with an alpha channel, which is dropped, or grey as (H, W) or (H, W, 1). Where images keep
        their values it is (H, W, K), or (H, W) for one band, of `data.pixel_type`.
      data: that part of the config.

    Raises:
      UserError: something else, values of another type, a file that cannot be read, or more
        pixels than `codec.MAX_PIXELS`.
    """
    if isinstance(image, (str, os.PathLike)):
        return read(paths.given("The image", os.fspath(image)), data).pixels
    kept = bands.keeps_values(data)
    if isinstance(image, Image.Image):
        if not kept:
            return _of_pillow(image, "The image")
        image = _values_of_pillow(image, "The image")
    if not hasattr(image, "__array__"):
        raise UserError(
            f"An image is a path, an image of Pillow or an array, not {type(image).__name__!r}."
        )
    array = np.asarray(image)
    return _values(array, data, "The image") if kept else _of_array(array)


def read(path: Path, data: ConfigDict) -> codec.Photo:
    """Reads one image file as the network takes it; UserError if that is not possible.

    Args:
      path: the file.
      data: that part of the config.
    """
    if not bands.keeps_values(data):
        return codec.read_photo(path, data.image_bits)
    photo = codec.read_with(path, functools.partial(raster.decode, bands=data.bands))
    if photo.pixels.dtype != data.pixel_type:
        raise UserError(_other_type(path, photo.pixels.dtype, data))
    return photo


def check_bands(count: int, dtype: Any, data: ConfigDict, what: object) -> None:
    """Raises UserError for other bands or values than those of the training."""
    if count != data.bands:
        raise UserError(
            f"{what} has {count} band{'s' * (count != 1)}; the network was trained on {data.bands}."
        )
    # Floats of any width are on one scale; whole numbers of 8 and of 16 bits are not.
    floats = data.pixel_type == "float32" and np.dtype(dtype).kind == "f"
    if np.dtype(dtype).newbyteorder("=") != data.pixel_type and not floats:
        raise UserError(_other_type(what, dtype, data))


def _other_type(what: object, dtype: Any, data: ConfigDict) -> str:
    return (
        f"{what} is of {np.dtype(dtype).name}; the network was trained on {data.pixel_type}, and "
        "values of another type are on another scale. Give it in the units and the type of the "
        "training images."
    )


def _values(array: np.ndarray, data: ConfigDict, what: str) -> np.ndarray:
    """Returns an array as (H, W, K) of the type of the training images."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise UserError(
            f"{what} is an array of the shape {array.shape}; it takes (H, W, {data.bands})"
            f"{', or (H, W)' * (data.bands == 1)}. Several images are given as a list."
        )
    check_bands(array.shape[-1], array.dtype, data, what)
    check_size(array.shape[0], array.shape[1], what)
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, data.pixel_type)
    try:
        raster.check_finite(values)
    except codec.Unusable as error:
        raise UserError(f"{what} {error}.") from error
    return values


def _values_of_pillow(image: Image.Image, what: str) -> np.ndarray:
    check_size(image.height, image.width, what)
    try:
        if image.mode in ("1", "P", "PA", "CMYK", "YCbCr", "RGBX"):
            image = image.convert("RGB")
        return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reads the pixels only now
        raise UserError(f"{what} cannot be read: {name(error)}.") from error


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
