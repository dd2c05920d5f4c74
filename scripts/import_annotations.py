"""Turns annotation files (COCO JSON, LabelMe JSON, CVAT XML) into label PNGs and classes.txt.

Command:    python scripts/import_annotations.py FILE_OR_FOLDER --out=DIR [--subfolder=train]
            [--classes=FILE] [--background=NAME] [--empty=background]
Then put the images into DIR/images, in a folder train as well if you gave --subfolder=train.

Writes DIR/labels/SUBFOLDER/NAME.png for each image that has an annotation, with the class ids as
values and a palette, and DIR/classes.txt. Pixels outside all shapes are `background`, class 0, or
ignored with --background= (nothing behind it). A shape that comes later in the file, or has a
higher z_order, lies above earlier ones. Shapes named void, ignore or __ignore__ are ignored pixels.
Images without annotation get no label, so they count as unlabelled ones; --empty=background says
that there is nothing in them. Points and lines have no area and are left out, with a warning.
"""

import argparse
import io
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from csc_jax import main, text
from csc_jax.data import annotations as lib
from csc_jax.data.class_list import MAX_CLASSES, read_classes
from csc_jax.data.pascal_voc import colormap
from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")


def run() -> int:
    """Imports; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("annotations", type=Path, help="a file, or a folder of LabelMe's")
    parser.add_argument("--out", type=Path, required=True, help="data.root of the data set")
    parser.add_argument("--subfolder", default="", help="of labels/, such as train or val")
    parser.add_argument("--classes", type=Path, help="class list that gives names their ids")
    parser.add_argument("--background", default="background", help="class outside all shapes")
    parser.add_argument("--empty", choices=["unlabelled", "background"], default="unlabelled")
    options = parser.parse_args()
    main.log_to_terminal()
    try:
        import_annotations(
            options.annotations,
            options.out,
            subfolder=options.subfolder,
            classes=options.classes,
            background=options.background,
            label_empty=options.empty == "background",
        )
    except UserError as error:
        print(f"error: {text.printable(error)}", file=sys.stderr)
        return error.exit_status
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
    if classes:
        listed = read_classes(classes)
        names, palette = listed.names, listed.palette
    else:
        names = tuple(lib.class_order(found, background))
        palette = _palette(names, found)
    if not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(
            f"{source} has {len(names)} classes with the background; it takes 2 to {MAX_CLASSES}."
        )
    ids, outside = lib.class_ids(found, names, background)
    drawn = [image for image in found.images if image.shapes or label_empty]
    if not drawn:
        raise UserError(f"{source} has no image with a shape that has an area.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_classes(out / "classes.txt", names, palette)
        written = _write_labels(out, subfolder, drawn, ids, outside, palette)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{out} cannot be written: {error}. Make room, or choose another --out."
        ) from error
    for kind, count in found.skipped.items():
        log.warning("%d shapes of the kind %s have no area: left out", count, text.name(kind))
    bare = len(found.images) - len(drawn)
    if bare:
        log.info("%d images have no shape and get no label (see --empty)", bare)
    log.info("%d labels of %d classes are in %s", len(written), len(names), out)
    return written


def _palette(names: Sequence[str], found: lib.Annotations) -> np.ndarray:
    palette = colormap()[: len(names)].copy()
    own = palette.copy()
    for i, name in enumerate(names):
        own[i] = found.colors.get(name, own[i])
    return own if len(np.unique(own, axis=0)) == len(own) else palette


def _write_classes(path: Path, names: Sequence[str], palette: np.ndarray) -> None:
    lines = [
        f"{name} {' '.join(map(str, color))}" for name, color in zip(names, palette, strict=True)
    ]
    content = "".join(f"{line}\n" for line in lines)
    if path.exists():
        there = read_classes(path)
        if there.names != tuple(names):
            raise UserError(
                f"{path} is there and has other classes, or another order, than these annotations: "
                f"name it with --classes={path}, or choose another --out."
            )
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".import_") as scratch:
        unfinished = Path(scratch) / path.name
        unfinished.write_text(content, encoding="utf-8")
        try:
            read_back = read_classes(unfinished).names
        except UserError:
            read_back = ()
        if read_back != tuple(names):
            raise UserError(
                "A name of a class is none that a class list can hold: "
                f"{', '.join(map(text.name, names))[:500]}. Rename it."
            )
        unfinished.replace(path)


def _write_labels(
    out: Path,
    subfolder: str,
    images: Sequence[lib.Annotated],
    ids: dict[str, int],
    outside: int,
    palette: np.ndarray,
) -> list[Path]:
    target = out / "labels" / subfolder
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is there and not empty. Remove it, or choose another --out.")
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    scratch = Path(tempfile.mkdtemp(dir=out, prefix=".import_"))
    try:
        for image in images:
            path = scratch / "labels" / f"{image.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(lib.draw(image, ids, outside))
            picture.putpalette(colors.tobytes())
            content = io.BytesIO()
            picture.save(content, "png")
            path.write_bytes(content.getvalue())
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()
        (scratch / "labels").replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [target / f"{image.name}.png" for image in images]


if __name__ == "__main__":
    sys.exit(run())
