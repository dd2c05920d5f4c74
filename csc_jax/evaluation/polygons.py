"""Masks as polygons that a person corrects in a labelling tool: COCO's format, or labelme's.

A polygon is the outer border of a connected region, through the centres of its pixels. What lies in
a hole of it is a region of its own and follows it, so that regions painted one after the other make
the mask again. Specks of fewer than three border pixels are left out.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

FORMATS = ("coco", "labelme")


class Region(NamedTuple):
    """A connected region of one class."""

    class_id: int
    points: np.ndarray  # (N, 2) int32, x and y px of the border, N at least 3
    area: float  # px, of the polygon


def regions(classes: np.ndarray, num_classes: int) -> list[Region]:
    """Returns the regions of class ids (H, W) uint8, the largest first; other ids have none."""
    found = []
    for class_id in np.unique(classes).tolist():
        if class_id >= num_classes:
            continue
        mask = (classes == class_id).astype(np.uint8)
        # In two levels: outer borders, also of regions in a hole of another, and those of holes.
        contours, levels = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        found += [
            Region(class_id, contour.reshape(-1, 2), float(cv2.contourArea(contour)))
            for contour, (*_, parent) in zip(contours, levels[0], strict=True)
            if parent < 0 and len(contour) >= 3
        ]
    return sorted(found, key=lambda region: -region.area)


def labelme(
    found: Sequence[Region], class_names: Sequence[str], image: Path, out: Path, size: Sequence[int]
) -> bytes:
    """Returns the JSON of an image for labelme.

    Args:
      found: its regions.
      class_names: of the class ids.
      image: the file, whose pixels are not repeated in the JSON.
      out: where the JSON will lie, from which labelme looks for the image.
      size: (height, width) px.
    """
    content: dict[str, Any] = {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            {
                "label": class_names[region.class_id],
                "points": region.points.tolist(),
                "group_id": None,
                "shape_type": "polygon",
                "flags": {},
            }
            for region in found
        ],
        "imagePath": Path(os.path.relpath(image, out.parent)).as_posix(),
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    return json.dumps(content).encode()


class CocoFile:
    """One file for all images, written as they come; a context manager.

    Category ids are class ids plus 1, since COCO counts from 1.
    """

    def __init__(self, path: Path, class_names: Sequence[str]):
        self._path = path
        self._unfinished = path.with_name(path.name + ".unfinished")
        self._file = self._unfinished.open("w", encoding="utf-8")
        self._images: list[dict[str, Any]] = []
        self._count = 0
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(class_names)]
        self._file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')

    def add(self, name: str, size: Sequence[int], found: Sequence[Region]) -> None:
        """Writes the regions of an image, `size` being (height, width) px."""
        self._images.append(
            {"id": len(self._images) + 1, "file_name": name, "height": size[0], "width": size[1]}
        )
        for region in found:
            self._count += 1
            x, y = region.points.min(axis=0).tolist()
            right, bottom = region.points.max(axis=0).tolist()
            annotation = {
                "id": self._count,
                "image_id": len(self._images),
                "category_id": region.class_id + 1,
                "segmentation": [region.points.reshape(-1).tolist()],
                "area": region.area,
                "bbox": [x, y, right - x + 1, bottom - y + 1],
                "iscrowd": 0,
            }
            comma = "," if self._count > 1 else ""
            self._file.write(f"{comma}\n{json.dumps(annotation)}")

    def __enter__(self) -> "CocoFile":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        with self._file:
            if not failed:
                self._file.write(f'],\n"images": {json.dumps(self._images)}}}\n')
        if failed:
            self._unfinished.unlink(missing_ok=True)
        else:
            self._unfinished.replace(self._path)
