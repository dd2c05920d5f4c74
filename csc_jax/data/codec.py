"""Encoded images and labels to arrays and back (OpenCV)."""

from pathlib import Path

import cv2
import numpy as np

from csc_jax.errors import UserError

# Grain and the builder already run one image per thread; OpenCV's own pool on top of that would
# only make the threads wait for each other.
cv2.setNumThreads(0)

# The pixel grid is taken as stored: a label PNG carries no EXIF tag, so turning the image alone
# would tear the two apart. An image whose label was drawn on the turned one fails the size check.
_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def decode_image(data: bytes) -> np.ndarray | None:
    """Returns the image as (H, W, 3) uint8 RGB, or None if it is corrupt or truncated."""
    return _decode(data, _RGB)


def decode_label(data: bytes) -> np.ndarray | None:
    """Returns the pixels as stored, or None if the file is corrupt or truncated.

    (H, W) of uint8 or uint16 for a grey-scale PNG, (H, W, 3 or 4) uint8 BGR for one with colours
    (OpenCV resolves a palette).
    """
    return _decode(data, cv2.IMREAD_UNCHANGED)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes (H, W, 3) RGB or (H, W), uint8, without loss."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", pixels)[1].tobytes()


def read_image(path: Path) -> np.ndarray:
    """Reads one image file as (H, W, 3) uint8 RGB; UserError if that is not possible."""
    try:
        image = decode_image(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if image is None:
        raise UserError(f"{path} is not an image that can be read (corrupt or truncated).")
    return image


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    if not data:  # OpenCV raises on an empty buffer, and returns None for any other bad one
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
