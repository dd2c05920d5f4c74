"""Boundary IoU: how well the outlines of classes fit, whatever their areas.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021: the
IoU of those pixels of a true and a predicted mask that lie within d of the outline of their mask.
Here the mask is that of a class in an image; pixels are added up over the set, class by class, as
for mean IoU.
"""

import dataclasses

import cv2
import numpy as np

DILATION = 0.02  # d as a ratio of the image's diagonal (their Sec. 5)
_NONE = 255  # class id of what does not count


@dataclasses.dataclass(frozen=True)
class BoundaryIoU:
    """Pixels near outlines, over a set.

    Attributes:
      intersection: (C,) int64, near the outline in truth and prediction, and of the class in both.
      union: (C,) int64, in either.
    """

    intersection: np.ndarray
    union: np.ndarray

    @classmethod
    def nothing(cls, num_classes: int) -> "BoundaryIoU":
        """Returns that of no image."""
        return cls(np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64))

    def __add__(self, other: "BoundaryIoU") -> "BoundaryIoU":
        return BoundaryIoU(self.intersection + other.intersection, self.union + other.union)

    @property
    def iou(self) -> np.ndarray:
        """(C,) float64; nan where a class occurs nowhere."""
        return np.where(self.union > 0, self.intersection / np.maximum(self.union, 1), np.nan)

    @property
    def mean(self) -> float:
        """Over the classes that occur; nan if none does."""
        present = self.iou[~np.isnan(self.iou)]
        return float(present.mean()) if present.size else float("nan")


def boundary_iou(label: np.ndarray, classes: np.ndarray, num_classes: int) -> BoundaryIoU:
    """Counts the pixels near the outlines of an image.

    A pixel without label or prediction belongs to no class on either side, so that the border of
    such an area is an outline of both. So is the border of the image, as in the authors' code.

    Args:
      label: (H, W) uint8, outside [0, num_classes) = ignored.
      classes: (H, W) uint8, the prediction, likewise.
      num_classes: C, at most 255.
    """
    counted = (label < num_classes) & (classes < num_classes)
    label = np.where(counted, label, np.uint8(_NONE))
    classes = np.where(counted, classes, np.uint8(_NONE))
    distance = max(1, round(DILATION * float(np.hypot(*label.shape))))
    true = counted & near_outline(label, distance)
    found = counted & near_outline(classes, distance)

    def pixels(of: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.bincount(of[where], minlength=num_classes)

    both = pixels(label, true & found & (label == classes))
    return BoundaryIoU(both, pixels(label, true) + pixels(classes, found) - both)


def near_outline(classes: np.ndarray, distance: int) -> np.ndarray:
    """Returns which pixels lie within `distance` px of the outline of their class's mask.

    These are the pixels that an erosion of that mask by a square of side 2 `distance` + 1 takes
    away, the image's surroundings being of no class.

    Args:
      classes: (H, W) uint8 class ids; 255 for none.
      distance: px, at least 1.

    Returns:
      (H, W) bool.
    """
    # An eroded mask keeps a pixel where the square holds one class id alone, its own: the least and
    # the greatest id there tell this for the masks of all classes at once.
    square = np.ones((2 * distance + 1,) * 2, np.uint8)
    outside = cv2.BORDER_CONSTANT
    greatest = cv2.dilate(classes, square, borderType=outside, borderValue=_NONE)
    least = cv2.erode(classes, square, borderType=outside, borderValue=_NONE)
    return np.asarray((greatest != classes) | (least != classes))
