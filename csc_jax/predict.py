"""`--mode=predict`: overlays and index PNGs of anyone's images."""

import logging
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from csc_jax import data, visualize
from csc_jax.data import transforms
from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")

_SUFFIXES = (".jpg", ".jpeg", ".png")


def predict_folder(
    predict: Callable[[np.ndarray], np.ndarray],
    images: Path,
    out: Path,
    *,
    palette: np.ndarray,
    image_size: tuple[int, int],
) -> list[Path]:
    """Writes `NAME.png` (class ids) and `NAME_overlay.png` (colours) for each image.

    Both have the image's own size; a network trained on resized images sees it at that size, and
    its class ids are enlarged to their nearest neighbours.

    Args:
      predict: image (H, W, 3) uint8 RGB -> class ids (H, W) uint8.
      images: one .jpg, .jpeg or .png, or a folder of them.
      out: folder to write to; made where it is missing.
      palette: (C, 3) uint8 RGB.
      image_size: `data.image_size` of the run, (height, width) px; (0, 0) = own size.

    Returns:
      The index PNGs written.

    Raises:
      UserError: nothing to read, no place to write, or unreadable images. These are named when all
        the others are done.
    """
    paths = _find(images)
    if out.resolve() == (images if images.is_dir() else images.parent).resolve():
        raise UserError(
            f"--out={out} is the folder of the images, which could be overwritten. Choose another "
            "folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made: {error}. Choose another folder.") from error
    written, unreadable = [], []
    for path in paths:
        try:
            image = data.read_image(path)
        except UserError as error:
            unreadable.append(f"{path.name} ({error})")
            continue
        height, width = image.shape[:2]
        small = image
        if any(image_size):
            no_label = np.zeros((height, width), np.uint8)
            small, _ = transforms.resize(image, no_label, image_size)  # as the data were prepared
        classes = predict(small)
        if classes.shape != (height, width):
            nearest = cv2.INTER_NEAREST_EXACT
            classes = cv2.resize(classes, (width, height), interpolation=nearest)
        index, overlay = (out / name for name in _outputs(path))
        _write(index, classes)
        blend = visualize.overlay(image, classes, palette)
        _write(overlay, cv2.cvtColor(blend, cv2.COLOR_RGB2BGR))
        written.append(index)
    log.info("%d of %d images written to %s", len(written), len(paths), out)
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(paths)} images under {images} could not be read: "
            f"{'; '.join(unreadable[:5])}. Replace or remove them; the others are done."
        )
    return written


def _find(images: Path) -> list[Path]:
    """Returns the images to predict, each with a name of its own."""
    if images.is_file():
        paths = [images]
    elif images.is_dir():
        paths = sorted(p for p in images.iterdir() if p.suffix.lower() in _SUFFIXES)
    else:
        raise UserError(f"--images={images} does not exist. Give an image or a folder of images.")
    if not paths:
        raise UserError(
            f"--images={images} holds no image ({', '.join(_SUFFIXES)}). Give another folder."
        )
    names: dict[str, Path] = {}
    for path in paths:
        for name in _outputs(path):
            other = names.setdefault(name.casefold(), path)  # some file systems ignore case
            if other != path:
                raise UserError(
                    f"--images={images} holds both {other.name} and {path.name}, which would be "
                    f"written to one file, {name}. Rename one of them."
                )
    return paths


def _outputs(path: Path) -> tuple[str, str]:
    """Returns the names of an image's index PNG and of its overlay."""
    return f"{path.stem}.png", f"{path.stem}_overlay.png"


def _write(path: Path, pixels: np.ndarray) -> None:
    encoded = cv2.imencode(".png", pixels)[1].tobytes()
    try:
        path.write_bytes(encoded)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}. Choose another --out.") from error
