"""Annotation files of other programs, as outlines or runs of pixels, to maps of class ids.

`read` takes COCO JSON (polygons, and both kinds of run-length encoding), the JSON files of LabelMe
and the XML of CVAT ("CVAT for images 1.1"). What a file claims is checked before it is believed:
names, sizes, coordinates and runs.
"""

import base64
import binascii
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np

from csc_jax import text
from csc_jax.data import codec, files
from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError

BACKGROUND = ("background", "_background_")
VOID = ("__ignore__", "void", "ignore", "ignored")
_FIELD = "The annotation file"
_LARGE = 1 << 23  # px of a shape, from which half a pixel around it does not count
_FRACTION_BITS = 6  # of a coordinate, for OpenCV
_FINER = 5  # as many points of a grid a pixel, along each axis; odd, so that one is its centre
_LONGEST = 1 << 16  # px of a side of an image
_OUTSIDE = 2  # px that an outline may leave the image by; it is cut off there
_CIRCLE = np.linspace(0, 2 * np.pi, 90, endpoint=False)
# What reading a file of another shape than the documented one raises.
_MALFORMED = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError),
    *(RecursionError, ElementTree.ParseError, binascii.Error),
)

# (height, width) px of an image -> (H, W) bool, the pixels of a shape.
_Mask = Callable[[tuple[int, int]], np.ndarray]


class Shape(NamedTuple):
    """One annotated object.

    Attributes:
      label: name of its class.
      mask: of its pixels.
    """

    label: str
    mask: _Mask


class Annotated(NamedTuple):
    """One image and what is annotated in it, later shapes over earlier ones.

    Attributes:
      name: path of its label, with "/" and without suffix, inside any folder it is put in.
      size: (height, width) px.
    """

    name: str
    size: tuple[int, int]
    shapes: Sequence[Shape]


class Annotations(NamedTuple):
    """What an annotation file holds.

    Attributes:
      names: of the classes, in the order of the file's own list if it has one.
      colors: (R, G, B) of those names that the file has one for.
      skipped: number of shapes without an area (points, lines), by their kind.
    """

    names: tuple[str, ...]
    colors: Mapping[str, tuple[int, int, int]]
    images: Sequence[Annotated]
    skipped: Mapping[str, int]


def read(path: Path) -> Annotations:
    """Reads an annotation file, or a folder of LabelMe's.

    Raises:
      UserError: it cannot be read, is of no known form, or claims what cannot be.
    """
    if files.is_folder(path, _FIELD):
        walk = files.walk(path, (".json",), _FIELD)
        if not walk.found:
            raise UserError(f"{_FIELD} {path} is a folder without .json{walk.passed_over()}.")
        result = _merged([_guarded(file, name) for name, file in walk.found.items()])
    else:
        result = _guarded(path, path.name)
    twice = Counter(image.name.casefold() for image in result.images)
    for image in result.images:
        if twice[image.name.casefold()] > 1:
            raise UserError(
                f"{_FIELD} {path} has two images whose label would be "
                f"{text.name(image.name)}.png. Rename one of them."
            )
    return result


def draw(image: Annotated, ids: Mapping[str, int], background: int) -> np.ndarray:
    """Returns the class ids of an image, (H, W) uint8.

    Args:
      ids: of each class that is drawn.
      background: id of the pixels that no shape holds.

    Raises:
      UserError: for a shape that cannot be drawn.
    """
    label = np.full(image.size, background, np.uint8)
    for number, shape in enumerate(image.shapes):
        try:
            label[shape.mask(image.size)] = ids[shape.label]
        except (*_MALFORMED, codec.Unusable, cv2.error) as error:
            raise UserError(
                f"The annotation of {text.name(image.name)} cannot be drawn: shape {number}, "
                f"{text.name(shape.label)}, {text.name(error)}. Correct or remove it."
            ) from error
    return label


def _guarded(path: Path, name: str) -> Annotations:
    content = files.read_text(path, _FIELD)
    try:
        if content.lstrip().startswith("<"):
            return _cvat(content)
        stored = json.loads(content)
        if isinstance(stored, dict) and "shapes" in stored:
            return _labelme(stored, name)
        if isinstance(stored, dict) and "annotations" in stored:
            return _coco(stored)
        raise ValueError("it has neither the annotations of COCO nor the shapes of LabelMe")
    except _MALFORMED as error:
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise UserError(
            f"{_FIELD} {path} cannot be read: {lacks}{text.name(str(error)[:200])}. It takes COCO "
            "JSON, LabelMe JSON or the XML of CVAT for images 1.1."
        ) from error


def _merged(parts: Sequence[Annotations]) -> Annotations:
    names = {name for part in parts for name in part.names}
    skipped: Counter[str] = Counter()
    for part in parts:
        skipped.update(part.skipped)
    return Annotations(
        tuple(sorted(names)), {}, [image for part in parts for image in part.images], skipped
    )


# ---- What files claim ----------------------------------------------------------------------------


def _name(claimed: object, inside: str = "") -> str:
    """Returns the path of an image's label; ValueError for one that leaves its folder."""
    path = _text(claimed, "a file name").replace("\\", "/")
    parts = path.split("/")
    if re.match(r"\w+:", path) or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"the file name {path[:100]!a} leads out of its folder")
    if not path.isprintable() and any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise ValueError(f"the file name {path[:100]!a} holds a control character")
    stem, suffix = path[: path.rfind(".")], path[path.rfind(".") :]
    return inside + (
        stem if suffix.lower() in files.IMAGE_SUFFIXES and parts[-1] != suffix else path
    )


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{str(value)[:50]!a} is no {what.removeprefix('a ')}")
    value.encode()  # JSON can hold halves of characters
    return unicodedata.normalize("NFC", value)  # the form of class lists and of the walk


def _size(height: object, width: object) -> tuple[int, int]:
    sides = _whole(height), _whole(width)
    if min(sides) < 1 or max(sides) > _LONGEST or sides[0] * sides[1] > codec.MAX_PIXELS:
        raise ValueError(
            f"an image of {sides[0]}x{sides[1]} px (height x width) is none, or has more than the "
            f"{_LONGEST} px a side or {codec.MAX_PIXELS} px in all that are read"
        )
    return sides


def _whole(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,10}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not int:
        raise ValueError(f"{str(value)[:50]!a} is no whole number")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is no list")
    return value


# ---- Pixels of shapes ----------------------------------------------------------------------------


def _filled(outlines: Sequence[np.ndarray], round_: bool = False) -> _Mask:
    """Returns the pixels whose centres lie in any of some polygons, (N, 2) x and y px.

    The corner of the image is (0, 0), so that the centre of its first pixel is (0.5, 0.5).

    Args:
      round_: whether they are circles or turned, which may leave the image by as much again.
    """

    def mask(size: tuple[int, int]) -> np.ndarray:
        whole = np.zeros(size, bool)
        for outline in outlines:
            _check_inside(outline, size, max(size) if round_ else _OUTSIDE)
            low = np.floor(outline.min(0)).clip(0).astype(int)
            high = np.ceil(outline.max(0)).clip(0, size[::-1]).astype(int)
            if (high <= low).any():
                continue
            width, height = high - low
            # OpenCV fills whatever the outline touches, a sixth too much of a small object: it
            # fills a finer grid, of which only the centres of pixels count.
            finer = _FINER if width * height <= _LARGE else 1
            grid = np.zeros((height * finer, width * finer), np.uint8)
            points = ((outline - low) * finer - 0.5) * (1 << _FRACTION_BITS)
            points = points.round().astype(np.int32)
            cv2.fillPoly(grid, [points], 1, lineType=cv2.LINE_8, shift=_FRACTION_BITS)
            centres = grid[finer // 2 :: finer, finer // 2 :: finer] != 0
            whole[low[1] : high[1], low[0] : high[0]] |= centres
        return whole

    return mask


def _outline(values: object) -> np.ndarray:
    points = np.array(_list(values, "an outline"), np.float64)
    if points.ndim == 1 and points.size % 2 == 0:
        points = points.reshape(-1, 2)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise ValueError("an outline needs x and y of three points at least")
    return points


def _check_inside(points: np.ndarray, size: tuple[int, int], margin: int) -> None:
    inside = (points >= -margin) & (points <= np.array(size[::-1]) + margin)
    if not inside.all():  # nor is what is not finite
        raise ValueError(f"leaves the image of {size[0]}x{size[1]} px (height x width)")


def _runs(counts: Sequence[int], size: tuple[int, int], order: str) -> np.ndarray:
    """Returns a mask of runs, which begin with one of pixels outside it."""
    lengths = np.array([_whole(count) for count in counts], dtype=object)
    if any(length < 0 for length in lengths) or sum(lengths) != size[0] * size[1]:
        raise ValueError("has runs that do not add up to the pixels of its mask")
    inside = np.arange(len(lengths)) % 2 == 1
    return inside.repeat(lengths.astype(np.int64)).reshape(size, order=order)


def _coco_counts(text_of_runs: str) -> list[int]:
    """Decodes the compressed runs of COCO: 5 bits a character, and differences from the third on.

    As rleFrString of its API (https://github.com/cocodataset/cocoapi, common/maskApi.c).
    """
    counts: list[int] = []
    value = shift = 0
    for character in text_of_runs:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("has compressed runs that are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more of this number follows
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("has compressed runs that end in the middle of one")
    return counts


# ---- COCO ----------------------------------------------------------------------------------------


def _coco(stored: dict[str, Any]) -> Annotations:
    categories = sorted(
        (
            (_whole(c["id"]), _text(c["name"], "a name"))
            for c in _list(stored["categories"], "categories")
        ),
        key=lambda item: item[0],
    )
    name_of = dict(categories)
    if len(name_of) < len(categories):
        raise ValueError("two categories have one id")
    images: dict[int, Annotated] = {}
    for image in _list(stored["images"], "images"):
        size = _size(image["height"], image["width"])
        images[_whole(image["id"])] = Annotated(_name(image["file_name"]), size, [])
    for annotation in _list(stored["annotations"], "annotations"):
        image_id = _whole(annotation["image_id"])
        if "segments_info" in annotation:
            raise ValueError("it has the segments of panoptic COCO, whose masks are PNGs already")
        if image_id not in images or _whole(annotation["category_id"]) not in name_of:
            raise ValueError(f"an annotation is of image {image_id} or a category not listed")
        shapes = images[image_id].shapes
        assert isinstance(shapes, list)
        label = name_of[_whole(annotation["category_id"])]
        shapes.append(Shape(label, _coco_mask(annotation.get("segmentation"))))
    return Annotations(tuple(dict.fromkeys(name_of.values())), {}, list(images.values()), {})


def _coco_mask(segmentation: object) -> _Mask:
    def mask(size: tuple[int, int]) -> np.ndarray:
        if isinstance(segmentation, dict):
            if tuple(_list(segmentation["size"], "size")) != size:
                raise ValueError(f"has a mask of {segmentation['size']}, not of the image's size")
            counts = segmentation["counts"]
            counts = _coco_counts(counts) if isinstance(counts, str) else _list(counts, "counts")
            return _runs(counts, size, "F")
        outlines = [_outline(part) for part in _list(segmentation, "its segmentation")]
        if not outlines:
            raise ValueError("has a box alone, without an outline")
        return _filled(outlines)(size)

    return mask


# ---- LabelMe -------------------------------------------------------------------------------------


def _labelme(stored: dict[str, Any], file: str) -> Annotations:
    size = _size(stored["imageHeight"], stored["imageWidth"])
    # That is the way from the JSON file, and may begin with "..".
    image = _text(stored["imagePath"], "a file name").replace("\\", "/").rpartition("/")[2]
    inside = f"{file.rpartition('/')[0]}/" if "/" in file else ""
    shapes, skipped = list[Shape](), Counter[str]()
    for shape in _list(stored["shapes"], "shapes"):
        label, kind = _text(shape["label"], "a label"), shape.get("shape_type") or "polygon"
        points = _list(shape["points"], "points")
        if kind == "polygon":
            shapes.append(Shape(label, _filled([_outline(points)])))
        elif kind == "rectangle":
            (left, top), (right, bottom) = _pair_of_points(points)
            shapes.append(Shape(label, _filled([_box(left, top, right, bottom)])))
        elif kind == "circle":
            (x, y), (edge_x, edge_y) = _pair_of_points(points)
            radius = float(np.hypot(edge_x - x, edge_y - y))
            shapes.append(Shape(label, _filled([_ellipse(x, y, radius, radius)], round_=True)))
        elif kind == "mask":
            shapes.append(Shape(label, _labelme_mask(_pair_of_points(points), shape["mask"])))
        else:
            skipped[_text(kind, "a kind")] += 1
    names = tuple(sorted({shape.label for shape in shapes}))
    return Annotations(names, {}, [Annotated(_name(image, inside), size, shapes)], skipped)


def _pair_of_points(points: list[Any]) -> np.ndarray:
    pair = np.array(points, np.float64)
    if pair.shape != (2, 2):
        raise ValueError("a shape of two points has others")
    return pair


def _labelme_mask(points: np.ndarray, encoded: object) -> _Mask:
    """Decodes the PNG of the pixels between two corners."""

    def mask(size: tuple[int, int]) -> np.ndarray:
        _check_inside(points, size, 0)
        left, top = points[0].astype(int)
        stored = base64.b64decode(_text(encoded, "a mask"), validate=True)
        return _placed(codec.decode_mask(stored, ".png").values != 0, left, top, size)

    return mask


def _placed(part: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    if part.ndim != 2 or min(left, top) < 0:
        raise ValueError("has a mask that is none, or begins outside the image")
    if top + part.shape[0] > size[0] or left + part.shape[1] > size[1]:
        raise ValueError(f"has a mask that leaves the image of {size[0]}x{size[1]} px")
    whole = np.zeros(size, bool)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    return whole


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.float64)


def _ellipse(x: float, y: float, radius_x: float, radius_y: float) -> np.ndarray:
    return np.stack([x + radius_x * np.cos(_CIRCLE), y + radius_y * np.sin(_CIRCLE)], axis=1)


# ---- CVAT ----------------------------------------------------------------------------------------

_NO_ENTITIES = re.compile(r"<!(DOCTYPE|ENTITY)", re.IGNORECASE)


def _cvat(content: str) -> Annotations:
    if _NO_ENTITIES.search(content):
        raise ValueError("it declares entities, which CVAT does not")
    # Decoded already; what the file says of its encoding would be wrong now.
    root = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", content))
    if root.tag != "annotations" or root.find("track") is not None:
        raise ValueError(
            "it has no images of CVAT; export tracks of a video as CVAT for images 1.1 too"
        )
    names, colors = list[str](), dict[str, tuple[int, int, int]]()
    for label in root.iterfind(".//labels/label"):
        name = _text(label.findtext("name"), "a name").strip()
        names.append(name)
        if match := re.fullmatch(r"#([0-9a-fA-F]{6})", (label.findtext("color") or "").strip()):
            red, green, blue = bytes.fromhex(match[1])
            colors[name] = (red, green, blue)
    skipped: Counter[str] = Counter()
    images = [_cvat_image(element, skipped) for element in root.iterfind("image")]
    used = {shape.label for image in images for shape in image.shapes}
    return Annotations((*dict.fromkeys(names), *sorted(used - set(names))), colors, images, skipped)


def _cvat_image(image: ElementTree.Element, skipped: Counter[str]) -> Annotated:
    size = _size(image.get("height"), image.get("width"))
    layered: list[tuple[int, Shape]] = []
    for element in image:
        if element.tag == "tag":
            continue
        mask = _cvat_mask(element)
        if mask is None:
            skipped[element.tag] += 1
            continue
        label = _text(element.get("label"), "a label").strip()
        layered.append((_whole(element.get("z_order", "0")), Shape(label, mask)))
    layered.sort(key=lambda item: item[0])
    return Annotated(_name(image.get("name")), size, [shape for _, shape in layered])


def _cvat_mask(
    element: ElementTree.Element,
) -> _Mask | None:
    def number(name: str, default: str | None = None) -> float:
        value = float(_text(element.get(name, default), "a number"))
        if not np.isfinite(value):
            raise ValueError(f"{name} is {value}")
        return value

    def numbers(*names: str) -> list[float]:
        return [number(name) for name in names]

    if element.tag == "polygon":
        points = _text(element.get("points"), "points").split(";")
        return _filled([_outline([[float(v) for v in point.split(",")] for point in points])])
    if element.tag in ("box", "ellipse"):
        if element.tag == "box":
            outline = _box(*numbers("xtl", "ytl", "xbr", "ybr"))
        else:
            outline = _ellipse(*numbers("cx", "cy", "rx", "ry"))
        angle = np.deg2rad(number("rotation", "0"))
        centre = outline.mean(0)
        turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        return _filled([(outline - centre) @ turn + centre], round_=True)
    if element.tag == "mask":
        left, top = (_whole(element.get(name)) for name in ("left", "top"))
        part = _size(element.get("height"), element.get("width"))
        counts = [_whole(count.strip()) for count in _text(element.get("rle"), "rle").split(",")]
        return lambda size: _placed(_runs(counts, part, "C"), left, top, size)
    return None


def class_ids(
    annotations: Annotations, names: Sequence[str], background: str
) -> tuple[dict[str, int], int]:
    """Returns the id of each class that shapes have, and that of pixels outside all shapes.

    Args:
      names: of all classes in the order of their ids.
      background: name of the class of pixels outside all shapes, "" to ignore them.

    Raises:
      UserError: a shape or the background is of no class that is listed.
    """
    ids = {name: i for i, name in enumerate(names)}
    for name in annotations.names:
        if name.casefold() in VOID:
            ids[name] = IGNORE
        elif name.casefold() in BACKGROUND and background in ids:
            ids.setdefault(name, ids[background])
    used = {shape.label for image in annotations.images for shape in image.shapes}
    missing = sorted(used - ids.keys())
    if missing or (background and background not in ids):
        what = text.name(missing[0]) if missing else f"{background} (--background)"
        raise UserError(
            f"The list of classes lacks {what}; it has {', '.join(map(text.name, names[:10]))}. "
            "Add it, or rename what the annotations call it."
        )
    return ids, ids[background] if background else IGNORE


def class_order(annotations: Annotations, background: str) -> Iterator[str]:
    """Yields the names of the classes in the order of their ids, the background first."""
    if background:
        yield background
    for name in annotations.names:
        folded = name.casefold()
        if folded not in VOID and name != background and not (background and folded in BACKGROUND):
            yield name
