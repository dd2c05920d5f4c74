"""Encoded images and labels to arrays and back."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from csc_jax.errors import UserError

# Grain and the builder already run one image per thread; OpenCV's own pool on top of that would
# only make the threads wait for each other.
cv2.setNumThreads(0)

# The pixel grid is taken as stored: a label PNG carries no EXIF tag, so turning the image alone
# would tear the two apart. An image whose label was drawn on the turned one fails the size check.
_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def cpu_count() -> int:
    """Returns how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decode_image(data: bytes) -> np.ndarray | None:
    """Returns the image as (H, W, 3) uint8 RGB, or None if it is corrupt or truncated."""
    return _decode(data, _RGB)


def decode_label(data: bytes) -> np.ndarray | None:
    """Returns a label that `encode_png` wrote, (H, W) uint8, or None if it is corrupt."""
    return _decode(data, cv2.IMREAD_UNCHANGED)


def decode_stored_values(data: bytes, suffix: str) -> np.ndarray | None:
    """Decodes a label file of the user's.

    Args:
      suffix: ".mat" for a class map of SBD, any other for an image.

    Returns:
      The values as they are stored, those of a palette PNG being its indices: (H, W) of an integer
      type, or (H, W, 3 or 4) if they are colours. None if the file is corrupt or truncated.
    """
    try:
        if suffix == ".mat":
            from scipy import io as scipy_io  # takes its time, and few need it

            stored = scipy_io.loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0]
        else:
            # OpenCV would turn the indices of a palette into colours. PNG alone, whatever the
            # content says: for others Pillow starts programs such as Ghostscript.
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                stored = np.asarray(image)
    except Exception:  # on a damaged file both raise nearly anything
        return None
    if stored.dtype.kind not in "biu" or stored.ndim not in (2, 3):
        return None
    if stored.ndim == 3 and stored.shape[-1] == 2:
        stored = stored[..., 0]  # grey and alpha
    return stored.astype(np.uint8) if stored.dtype == bool else stored


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
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # an empty buffer, or a header that promises far too many pixels
        return None
