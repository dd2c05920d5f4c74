"""`--mode=predict`: overlays, index PNGs and more of anyone's images."""

import contextlib
import dataclasses
import io
import logging
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

import numpy as np

from csc_jax import evaluation
from csc_jax.data import codec, files
from csc_jax.errors import UserError
from csc_jax.evaluation import polygons

log = logging.getLogger("csc_jax")

COCO_NAME = "polygons.json"
_T = TypeVar("_T")


class Prediction(Protocol):
    """What is known of an image: `deploy.Result`."""

    @property
    def classes(self) -> np.ndarray:
        """(H, W) uint8 class ids."""

    @property
    def confidence(self) -> np.ndarray:
        """(H, W) float32, the probability of that class, in [0, 1]."""

    @property
    def probabilities(self) -> np.ndarray | None:
        """(H, W, C) float32 of all classes, where they were asked for."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""

    @property
    def palette(self) -> np.ndarray:
        """(C, 3) uint8 RGB."""

    def overlay(self, *, legend: bool = False) -> np.ndarray:
        """Returns the image under the classes' colours, (H', W, 3) uint8 RGB."""


@dataclasses.dataclass(frozen=True)
class Extras:
    """What is written beside index PNGs and overlays.

    Attributes:
      confidence: `NAME_confidence.png`, 8 bits: 255 times the probability of the class.
      soft: `NAME_probabilities.npz`, the array `probabilities` (H, W, C) float16 and `class_names`.
      polygons: one of `polygons.FORMATS`: `NAME.json` for labelme, `polygons.json` of all images
        for COCO; None = none.
    """

    confidence: bool = False
    soft: bool = False
    polygons: str | None = None


def predict_folder(
    predict: Callable[[np.ndarray], Prediction],
    images: Path,
    out: Path,
    *,
    class_names: tuple[str, ...],
    extras: Extras = Extras(),
    read: Callable[[Path], codec.Photo] = codec.read_photo,
    in_tiles: Callable[[Path, Path, Path | None], object] | None = None,
) -> list[Path]:
    """Writes `NAME.png` and `NAME_overlay.png` for each image, in the sub-folder that it is in.

    The first holds the class ids, with the palette (`evaluation.encode_with_palette`); the second
    is the image under the classes' colours, with a legend below.

    Args:
      predict: image (H, W, K) of any size, as `read` gives it -> what is known of it, with
        probabilities where `extras.soft` asks for them.
      images: one image, or a folder of them, which is searched with its sub-folders (`files.walk`).
      out: folder to write to; made where it is missing. Where it lies in `images`, what is in it is
        no input.
      class_names: C names.
      extras: what else is written.
      read: an image file -> what `predict` takes; UserError where it cannot.
      in_tiles: (image, TIFF for class ids, TIFF for confidence or None) -> writes these for a TIFF
        of any size, which then has no overlay; None = TIFFs are read whole, like all others.

    Returns:
      The index PNGs written.

    Raises:
      UserError: nothing to read, no place to write, or unreadable images. These are named when all
        the others are done.
    """
    if in_tiles is not None and (extras.soft or extras.polygons):
        raise UserError("--tile goes with --confidence, but not with --soft or --polygons.")
    found = _find(images, out, extras, tiled=in_tiles is not None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made: {error}. Choose another folder.") from error
    written, unreadable, turned = list[Path](), list[str](), list[str]()
    with coco_file(out, class_names, extras) as coco:
        for name, path in found.items():
            if in_tiles is not None and _is_tiff(name):
                targets = {k: out / o for k, o in _outputs(name, extras, tiled=True).items()}
                _make_folder(targets["index"])
                try:
                    in_tiles(path, targets["index"], targets.get("confidence"))
                    written.append(targets["index"])
                except UserError as error:
                    unreadable.append(f"{name} ({error})")
                continue
            try:
                photo = read(path)
            except UserError as error:
                unreadable.append(f"{name} ({error})")
                continue
            if photo.turned:
                turned.append(name)
            result = predict(photo.pixels)
            written.append(write_one(result, name, path, out, extras, coco))
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


def write_one(
    result: Prediction,
    name: str,
    image: Path,
    out: Path,
    extras: Extras,
    coco: polygons.CocoFile | None,
) -> Path:
    """Writes what there is to write for one image, and returns the path of the index PNG.

    Args:
      result: what is known of the image.
      name: of the image, a relative path with its suffix; see `check_outputs`.
      image: its file, which a LabelMe file names.
      out: folder to write to.
      extras: what is written besides index PNG and overlay.
      coco: what `coco_file` gave.

    Raises:
      UserError: no place to write.
    """
    outputs = {kind: out / output for kind, output in _outputs(name, extras).items()}
    for kind, output in outputs.items():
        write_file(output, _ENCODERS[kind](result))
    if extras.polygons:
        _write_polygons(result.classes, name, image, out, result.class_names, coco)
    return outputs["index"]


def _write_polygons(
    classes: np.ndarray,
    name: str,
    image: Path,
    out: Path,
    class_names: tuple[str, ...],
    coco: polygons.CocoFile | None,
) -> None:
    """Adds an image's polygons to the COCO file of all images, or writes a LabelMe file of its own.

    Args:
      classes: (H, W) uint8 class ids.
      name: of the image, relative to the folder of images.
      image: its file, which a LabelMe file names.
      out: folder to write to.
      class_names: C names.
      coco: the file of all images; None = LabelMe's format.
    """
    size = classes.shape
    regions = polygons.regions(classes, len(class_names))
    if coco is not None:
        _guarded(out / COCO_NAME, lambda: coco.add(name, size, regions))
    else:
        target = (out / name).with_suffix(".json")
        write_file(target, polygons.labelme(regions, class_names, image, target, size))


def _find(images: Path, out: Path, extras: Extras, *, tiled: bool) -> dict[str, Path]:
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
    check_outputs(found, extras, f"--images={images}", tiled=tiled)
    return found


def check_outputs(
    names: Iterable[str], extras: Extras, source: str, *, tiled: bool = False
) -> None:
    """Raises UserError where two images would be written to one file.

    Args:
      names: of the images, relative paths with their suffixes.
      extras: what is written.
      source: where the images are, for the message.
      tiled: whether TIFFs go in tiles.
    """
    taken: dict[str, str] = {}
    for name in names:
        for output in _outputs(name, extras, tiled=tiled).values():
            other = taken.setdefault(output.casefold(), name)  # some file systems ignore case
            if other != name:
                raise UserError(
                    f"{source} holds both {other} and {name}, which would be "
                    f"written to one file, {output}. Rename one of them."
                )


# What each kind of output holds.
_ENCODERS: dict[str, Callable[[Prediction], bytes]] = {
    "index": lambda result: evaluation.encode_with_palette(result.classes, result.palette),
    "overlay": lambda result: codec.encode_png(result.overlay(legend=True)),
    "confidence": lambda result: codec.encode_png(
        np.round(255 * result.confidence).astype(np.uint8)
    ),
    "probabilities": lambda result: _npz(result),
}


def _outputs(name: str, extras: Extras, *, tiled: bool = False) -> dict[str, str]:
    """Returns the paths of what is written for an image, by kind; `tiled` as where there is one."""
    stem = PurePosixPath(name).with_suffix("").as_posix()
    if tiled and _is_tiff(name):
        names = {"index": f"{stem}.tif"}
        return names | ({"confidence": f"{stem}_confidence.tif"} if extras.confidence else {})
    outputs = {"index": f"{stem}.png", "overlay": f"{stem}_overlay.png"}
    if extras.confidence:
        outputs["confidence"] = f"{stem}_confidence.png"
    if extras.soft:
        outputs["probabilities"] = f"{stem}_probabilities.npz"
    return outputs


def _is_tiff(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in (".tif", ".tiff")


def _npz(result: Prediction) -> bytes:
    assert result.probabilities is not None
    file = io.BytesIO()
    np.savez_compressed(
        file,
        probabilities=result.probabilities.astype(np.float16),
        class_names=np.array(result.class_names),
    )
    return file.getvalue()


def coco_file(
    out: Path, class_names: tuple[str, ...], extras: Extras
) -> contextlib.AbstractContextManager[polygons.CocoFile | None]:
    """Opens the file of all images' polygons, or nothing where `extras` asks for none."""
    if extras.polygons != "coco":
        return contextlib.nullcontext()
    _make_folder(out / COCO_NAME)
    return _guarded(out / COCO_NAME, lambda: polygons.CocoFile(out / COCO_NAME, class_names))


def write_file(path: Path, encoded: bytes) -> None:
    """Writes a file and makes its folder; UserError where that fails."""
    _make_folder(path)
    _guarded(path, lambda: path.write_bytes(encoded))


def _make_folder(path: Path) -> None:
    _guarded(path, lambda: path.parent.mkdir(parents=True, exist_ok=True))


def _guarded(path: Path, act: Callable[[], _T]) -> _T:
    """Does what writes to a file; UserError where that fails."""
    try:
        return act()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}. Choose another --out.") from error
