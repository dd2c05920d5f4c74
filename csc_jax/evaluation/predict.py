"""`--mode=predict`: overlays and index PNGs of anyone's images."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from csc_jax import data, evaluation
from csc_jax.data import codec
from csc_jax.errors import UserError
from csc_jax.reporting import visualize

log = logging.getLogger("csc_jax")

_SUFFIXES = (".jpg", ".jpeg", ".png")


def predict_folder(
    predict: Callable[[np.ndarray], np.ndarray],
    images: Path,
    out: Path,
    *,
    palette: np.ndarray,
    class_names: Sequence[str],
) -> list[Path]:
    """Writes `NAME.png` and `NAME_overlay.png` for each image.

    The first holds the class ids, with the palette (`evaluation.encode_with_palette`); the second
    is the image under the classes' colours, with a legend below.

    Args:
      predict: image (H, W, 3) uint8 RGB of any size -> class ids (H, W) uint8.
      images: one .jpg, .jpeg or .png, or a folder of them.
      out: folder to write to; made where it is missing.
      palette: (C, 3) uint8 RGB.
      class_names: C names, for the legend.

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
        classes = predict(image)
        index, overlay = (out / name for name in _outputs(path))
        _write(index, evaluation.encode_with_palette(classes, palette))
        blend = visualize.overlay(image, classes, palette)
        _write(overlay, codec.encode_png(visualize.with_legend(blend, palette, class_names)))
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


def _write(path: Path, encoded: bytes) -> None:
    try:
        path.write_bytes(encoded)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}. Choose another --out.") from error
