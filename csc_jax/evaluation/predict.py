"""`--mode=predict`: overlays and index PNGs of anyone's images."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from csc_jax import evaluation
from csc_jax.data import codec, files
from csc_jax.errors import UserError
from csc_jax.reporting import visualize

log = logging.getLogger("csc_jax")


def predict_folder(
    predict: Callable[[np.ndarray], np.ndarray],
    images: Path,
    out: Path,
    *,
    palette: np.ndarray,
    class_names: Sequence[str],
    bits: int = 0,
) -> list[Path]:
    """Writes `NAME.png` and `NAME_overlay.png` for each image, in the sub-folder that it is in.

    The first holds the class ids, with the palette (`evaluation.encode_with_palette`); the second
    is the image under the classes' colours, with a legend below.

    Args:
      predict: image (H, W, 3) uint8 RGB of any size -> class ids (H, W) uint8.
      images: one image, or a folder of them, which is searched with its sub-folders (`files.walk`).
      out: folder to write to; made where it is missing. Where it lies in `images`, what is in it is
        no input.
      palette: (C, 3) uint8 RGB.
      class_names: C names, for the legend.
      bits: `data.image_bits`.

    Returns:
      The index PNGs written.

    Raises:
      UserError: nothing to read, no place to write, or unreadable images. These are named when all
        the others are done.
    """
    found = _find(images, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made: {error}. Choose another folder.") from error
    written, unreadable, turned = list[Path](), list[str](), list[str]()
    for name, path in found.items():
        try:
            photo = codec.read_photo(path, bits)
        except UserError as error:
            unreadable.append(f"{name} ({error})")
            continue
        image = photo.pixels
        if photo.turned:
            turned.append(name)
        classes = predict(image)
        index, overlay = (out / output for output in _outputs(name))
        _write(index, evaluation.encode_with_palette(classes, palette))
        blend = visualize.overlay(image, classes, palette)
        _write(overlay, codec.encode_png(visualize.with_legend(blend, palette, class_names)))
        written.append(index)
    log.info("%d of %d images written to %s", len(written), len(found), out)
    if turned:
        log.warning(
            "%d images were turned upright, as their EXIF orientation says (the first is %s); the "
            "masks belong to the images as they are shown",
            *(len(turned), turned[0]),
        )
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(found)} images under {images} could not be read: "
            f"{'; '.join(unreadable[:5])}. Replace or remove them; the others are done."
        )
    return written


def _find(images: Path, out: Path) -> dict[str, Path]:
    """Returns the images to predict, by their path below `images`, each with outputs of its own."""
    passed_over = ""
    if files.is_file(images, "--images"):
        found, folder = {images.name: images}, images.parent
    elif files.is_folder(images, "--images"):
        walk, folder = files.walk(images, files.IMAGE_SUFFIXES, "--images"), images
        found, passed_over = walk.found, walk.passed_over()
    else:
        raise UserError(f"--images={images} does not exist. Give an image or a folder of images.")
    try:
        target, source = out.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise UserError(f"--out={out} cannot be used: {error}. Choose another folder.") from error
    if target == source:
        raise UserError(
            f"--out={out} is the folder of the images, which could be overwritten. Choose another "
            "folder."
        )
    if target.is_relative_to(source):
        own = f"{target.relative_to(source).as_posix()}/"
        found = {name: path for name, path in found.items() if not name.startswith(own)}
    if not found:
        raise UserError(
            f"--images={images} holds no image ({', '.join(files.IMAGE_SUFFIXES)}){passed_over}. "
            "Give another folder."
        )
    if passed_over:
        log.warning("--images=%s: %d images%s", images, len(found), passed_over)
    names: dict[str, str] = {}
    for name in found:
        for output in _outputs(name):
            other = names.setdefault(output.casefold(), name)  # some file systems ignore case
            if other != name:
                raise UserError(
                    f"--images={images} holds both {other} and {name}, which would be "
                    f"written to one file, {output}. Rename one of them."
                )
    return found


def _outputs(name: str) -> tuple[str, str]:
    """Returns the paths of an image's index PNG and of its overlay."""
    stem = PurePosixPath(name).with_suffix("").as_posix()
    return f"{stem}.png", f"{stem}_overlay.png"


def _write(path: Path, encoded: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}. Choose another --out.") from error
