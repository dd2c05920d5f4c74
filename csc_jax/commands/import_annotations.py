"""Turns annotation files (COCO, LabelMe, CVAT) into label PNGs and classes.txt.

Command:    csc-jax import-annotations FILE_OR_FOLDER --out=DIR
                [--subfolder=train] [--classes=FILE] [--background=NAME]
                [--empty=background]
Then put the images into DIR/images, in a folder train as well if you gave
--subfolder=train.

Reads COCO JSON, LabelMe JSON and CVAT XML. Writes DIR/labels/SUBFOLDER/NAME.png
for each image that has an annotation, with the class ids as values and a
palette, and DIR/classes.txt. Pixels outside all shapes are `background`, class
0, or ignored with --background= (nothing behind it). A shape that comes later
in the file, or has a higher z_order, lies above earlier ones. Shapes named
void, ignore or __ignore__ are ignored pixels. Images without annotation get no
label, so they count as unlabelled ones; --empty=background says that there is
nothing in them. Points and lines have no area and are left out, with a warning.
"""

import argparse
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from csc_jax import text
from csc_jax.data import annotations as lib
from csc_jax.data.class_list import MAX_CLASSES, read_classes
from csc_jax.data.pascal_voc import colormap
from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")


def main(arguments: Sequence[str]) -> int:
    """Imports; returns 0."""
    parser = argparse.ArgumentParser(
        prog="csc-jax import-annotations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("annotations", type=Path, help="a file, or a folder of LabelMe's")
    parser.add_argument("--out", type=Path, required=True, help="data.root of the data set")
    parser.add_argument("--subfolder", default="", help="of labels/, such as train or val")
    parser.add_argument("--classes", type=Path, help="class list that gives names their ids")
    parser.add_argument("--background", default="background", help="class outside all shapes")
    parser.add_argument("--empty", choices=["unlabelled", "background"], default="unlabelled")
    options = parser.parse_args(arguments)
    import_annotations(
        options.annotations,
        options.out,
        subfolder=options.subfolder,
        classes=options.classes,
        background=options.background,
        label_empty=options.empty == "background",
    )
    return 0


def import_annotations(
    source: Path,
    out: Path,
    *,
    subfolder: str = "",
    classes: Path | None = None,
    background: str = "background",
    label_empty: bool = False,
) -> list[Path]:
    """Writes labels and class list; all of them, or nothing.

    Returns:
      The labels written.

    Raises:
      UserError: annotations that cannot be used, or an `out` that cannot be written or holds labels
        of this folder, or another class list.
    """
    if subfolder and (len(Path(subfolder).parts) != 1 or subfolder in ("..", "/", os.sep)):
        raise UserError(f"--subfolder={subfolder} is no name of one folder, such as train.")
    found = lib.read(source)
    names = tuple(lib.class_order(found, background))
    if classes:
        listed = read_classes(classes)
        names, palette = listed.names, listed.palette
    elif 2 <= len(names) <= MAX_CLASSES:
        palette = _palette(names, found)
    else:
        raise UserError(
            f"{source} has {len(names)} classes with the background; it takes 2 to {MAX_CLASSES}."
        )
    ids, outside = lib.class_ids(found, names, background)
    drawn = [image for image in found.images if image.shapes or label_empty]
    if not drawn:
        raise UserError(f"{source} has no image with a shape that has an area.")
    _check_place(out, subfolder, names)
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out, prefix=".import_"))
        try:
            _write_classes(scratch / "classes.txt", names, palette)
            for image in drawn:
                path = scratch / "labels" / f"{image.name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_with_palette(lib.draw(image, ids, outside), palette))
            target = out / "labels" / subfolder
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rmdir()
            (scratch / "labels").replace(target)
            if not (out / "classes.txt").exists():
                (scratch / "classes.txt").replace(out / "classes.txt")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{out} cannot be written: {error}. Make room, or choose another --out."
        ) from error
    for kind, count in found.skipped.items():
        log.warning("%d shapes of the kind %s have no area: left out", count, text.name(kind))
    bare = len(found.images) - len(drawn)
    if bare:
        log.info("%d images have no shape and get no label (see --empty)", bare)
    log.info("%d labels of %d classes are in %s", len(drawn), len(names), out)
    return [target / f"{image.name}.png" for image in drawn]


def _palette(names: Sequence[str], found: lib.Annotations) -> np.ndarray:
    palette = colormap()[: len(names)].copy()
    own = palette.copy()
    for i, name in enumerate(names):
        own[i] = found.colors.get(name, own[i])
    return own if len(np.unique(own, axis=0)) == len(own) else palette


def _check_place(out: Path, subfolder: str, names: Sequence[str]) -> None:
    target, classes = out / "labels" / subfolder, out / "classes.txt"
    try:
        taken, listed = target.exists() and any(target.iterdir()), classes.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"{target} cannot be read: {error}. Choose another --out.") from error
    if taken:
        raise UserError(f"{target} is there and not empty. Remove it, or choose another --out.")
    if listed and read_classes(classes).names != tuple(names):
        raise UserError(
            f"{classes} is there and has other classes, or another order, than these annotations: "
            f"name it with --classes={classes}, or choose another --out."
        )


def _write_classes(path: Path, names: Sequence[str], palette: np.ndarray) -> None:
    colors = (" ".join(map(str, color)) for color in palette)
    lines = [f"{name} {color}\n" for name, color in zip(names, colors, strict=True)]
    path.write_text("".join(lines), encoding="utf-8")
    try:
        read_back: Sequence[str] = read_classes(path).names
    except UserError:
        read_back = ()
    if read_back != tuple(names):
        raise UserError(
            "A name of a class is none that a class list can hold: "
            f"{', '.join(map(text.name, names))[:500]}. Rename it."
        )


def _with_palette(label: np.ndarray, palette: np.ndarray) -> bytes:
    colors = np.zeros((256, 3), np.uint8)  # with fewer, Pillow would write fewer bits a pixel
    colors[: len(palette)] = palette
    picture, content = Image.fromarray(label), io.BytesIO()
    picture.putpalette(colors.tobytes())
    picture.save(content, "png")
    return content.getvalue()
