"""Predictions as PNG files, named and coded as each benchmark's own evaluator reads them."""

import dataclasses
import functools
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from PIL import Image

from csc_jax import paths
from csc_jax.errors import UserError

# Official id in the PNG files of each of the 19 train ids (cityscapesscripts, helpers/labels.py).
CITYSCAPES_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_SIZE = (1024, 2048)  # (height, width) px of every image
_CITYSCAPES_ID = re.compile(r"(?:.*/)?([^/_]+_\d+_\d+)_leftImg8bit(?:\.png)?")
_IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g)$", re.IGNORECASE)


def voc_palette() -> np.ndarray:
    """Returns Pascal VOC's palette, (256, 3) uint8 RGB: the index's bits dealt out to R, G, B."""
    index, channel = np.arange(256)[:, None], np.arange(3)[None]
    bits = [((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)]
    return np.sum(bits, axis=0).astype(np.uint8)


def check_folder(out: Path, data_root: str, flag: str = "--save_predictions") -> None:
    """Makes the folder for predictions, before anything expensive is done.

    Args:
      out: the folder.
      data_root: of the data set.
      flag: that named the folder, for messages.

    Raises:
      UserError: it cannot be made or written to, or lies where the data set's own labels are.
    """
    check_outside(out, data_root, flag)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise _not_written(out, error, flag) from error


def check_outside(out: Path, data_root: str, flag: str) -> None:
    """Raises UserError for a folder where a data set has its files.

    These are `images` and `labels`, where data.root has both, and else all of it. Arguments are
    those of `check_folder`.
    """
    if not data_root:
        return
    root = paths.given("data.root", data_root)
    try:
        target, root = out.resolve(), root.resolve()
        folders = [
            folder.resolve()
            for folder in (root.iterdir() if root.is_dir() else ())
            if folder.name.casefold() in ("images", "labels") and folder.is_dir()
        ]
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise _not_written(out, error, flag) from error
    taken = folders if len(folders) > 1 else [root]
    if target == root or any(target.is_relative_to(folder) for folder in taken):
        raise UserError(
            f"{flag}={out} lies in data.root {data_root}, where predictions could replace the "
            "labels or images. Choose a folder outside of it."
        )


class PredictionWriter:
    """Writes one PNG an image, at the image's own size; a callback of `evaluate`.

    Cityscapes: official label ids, `<city>_<seq>_<frame>_gtFine_labelIds.png`. Pascal VOC: class
    ids with the official palette, `<id>.png`. ADE20K: 1..150, `<id>.png`, as its server takes them.
    Any other data set: class ids, `<id>.png`, in the subfolders that the ids name.
    """

    def __init__(self, dataset: str, ids: Sequence[str], out: Path, *, resized: bool):
        """Plans the files; writes nothing yet.

        Args:
          dataset: `data.name`.
          ids: of all images that will come.
          out: a folder as `check_folder` leaves it.
          resized: whether `data.image_size` changed the images. Cityscapes predictions are then
            enlarged to 1024x2048 px; those of other data sets stay as they are, because their
            images' own sizes are not kept.

        Raises:
          UserError: an id that has no file name in this format, or shares it with another.
        """
        self._format = _FORMATS.get(dataset, _PLAIN)
        self._size = self._format.size if resized else None
        self._paths: dict[str, Path] = {}
        taken: dict[str, str] = {}
        for name in ids:
            file_name = self._format.file_name(name)
            other = taken.setdefault(file_name.casefold(), name)  # some file systems ignore case
            if other != name:
                raise UserError(
                    f"The images {other} and {name} of {dataset} would both be written to "
                    f"{out / file_name}. Rename one of them."
                )
            self._paths[name] = out / file_name

    def __call__(self, name: str, classes: np.ndarray, miou: float = float("nan")) -> None:
        """Writes the class ids, (H, W) uint8, of an image.

        Raises:
          UserError: an id that was not planned, or a folder that cannot be written to.
        """
        path = self._paths.get(name)
        if path is None:
            raise UserError(f"There is no image {name} among those to be written.")
        if self._size is not None and classes.shape != self._size:
            nearest = cv2.INTER_NEAREST_EXACT
            classes = cv2.resize(classes, self._size[::-1], interpolation=nearest)
        unfinished = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(self._format.encode(classes))
            unfinished.replace(path)  # a full disk leaves no half PNG
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise _not_written(path, error) from error


@dataclasses.dataclass(frozen=True)
class _Format:
    file_name: Callable[[str], str]  # of an image's id
    encode: Callable[[np.ndarray], bytes]  # class ids (H, W) uint8 -> PNG
    size: tuple[int, int] | None = None  # (height, width) px, where all images have the same


def _cityscapes_name(name: str) -> str:
    match = _CITYSCAPES_ID.fullmatch(name)
    if match is None:
        raise UserError(
            f"The image {name} has no Cityscapes name, <city>_<seq>_<frame>_leftImg8bit.png, so "
            "its prediction has none either. Evaluate without --save_predictions."
        )
    return f"{match[1]}_gtFine_labelIds.png"


def _plain_name(name: str) -> str:
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts:
        raise UserError(f"The image id {name!r} cannot name a file of --save_predictions.")
    return f"{_IMAGE_SUFFIX.sub('', str(path))}.png"


def _encode_label_ids(classes: np.ndarray) -> bytes:
    return _png(Image.fromarray(np.array(CITYSCAPES_LABEL_IDS, np.uint8)[classes]))


def _encode_from_one(classes: np.ndarray) -> bytes:
    return _encode_plain(classes + np.uint8(1))  # 0 stands for unlabelled


def encode_with_palette(classes: np.ndarray, palette: np.ndarray) -> bytes:
    """Returns a PNG of class ids, (H, W) uint8, that a viewer shows in colours, (C, 3) uint8 RGB.

    Its values are the class ids: `np.asarray(PIL.Image.open(path))` reads them. OpenCV, which does
    not know palettes, reads colours.
    """
    colors = np.zeros((256, 3), np.uint8)  # with fewer, Pillow would write fewer bits a pixel
    colors[: len(palette)] = palette
    image = Image.fromarray(classes)
    image.putpalette(colors.tobytes())
    return _png(image)


def _encode_plain(classes: np.ndarray) -> bytes:
    return _png(Image.fromarray(classes))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _not_written(
    path: Path, error: OSError | RuntimeError, flag: str = "--save_predictions"
) -> UserError:
    return UserError(
        f"{path} cannot be written: {getattr(error, 'strerror', None) or error}. Free or grant "
        f"space there, or choose another {flag}."
    )


_PLAIN = _Format(_plain_name, _encode_plain)
_FORMATS = {
    "ade20k": _Format(_plain_name, _encode_from_one),
    "cityscapes": _Format(_cityscapes_name, _encode_label_ids, _CITYSCAPES_SIZE),
    "pascal_voc": _Format(
        _plain_name, functools.partial(encode_with_palette, palette=voc_palette())
    ),
}
