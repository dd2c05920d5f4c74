"""The surface that synthetic scenes are painted on: shapes, colours, textures, depth."""

import colorsys

import cv2
import numpy as np

_SUBPIXEL_BITS = 4  # of polygon corners handed to OpenCV

Range = tuple[float, float]


class Canvas:
    """What has been painted so far; a later shape hides an earlier one.

    Polygons are (N, K, 2) float arrays: N shapes of K corners, each (x, y) in px.

    Attributes:
      rng: the only source of randomness of the scene.
      image: (H, W, 3) float32 RGB, 0..1.
      label: (H, W) uint8 class ids.
      near: (H, W) float32, 1 at the lower image edge, towards 0 at the horizon; for the fog.
      textures: (H, W, 3) float32 noise around 0: fine, medium and coarse grain.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng = rng
        self.height, self.width = size
        self.image = np.zeros((*size, 3), np.float32)
        self.label = np.zeros(size, np.uint8)
        self.near = np.full(size, 0.02, np.float32)
        self.textures = np.stack([_noise(rng, size, cell) for cell in (2, 5, 14)], -1)

    def paint(
        self,
        polygons: np.ndarray,
        class_id: int,
        color: np.ndarray,
        near: float | np.ndarray,
        grain: tuple[float, float, float] = (0.02, 0.0, 0.0),
    ) -> None:
        """Fills shapes.

        Args:
          polygons: (N, K, 2) px.
          color: (3,) RGB, 0..1.
          near: distance of the shapes as in `Canvas.near`, one number or (H, W).
          grain: strength of the three textures, relative to the colour.
        """
        pixels = self._inside(polygons)
        shade = 1 + self._flat(self.textures)[pixels] @ np.array(grain, np.float32)
        self._flat(self.image)[pixels] = shade[:, None] * color.astype(np.float32)
        self.label.ravel()[pixels] = class_id
        self.near.ravel()[pixels] = near.ravel()[pixels] if isinstance(near, np.ndarray) else near

    def darken(self, polygons: np.ndarray, factor: float) -> None:
        """Multiplies the light inside shapes (N, K, 2); the classes stay."""
        self._flat(self.image)[self._inside(polygons)] *= factor

    def _flat(self, maps: np.ndarray) -> np.ndarray:
        return maps.reshape(-1, maps.shape[-1])  # a view

    def _inside(self, polygons: np.ndarray) -> np.ndarray:
        """Returns the positions, in the flattened canvas, of all pixels inside the shapes."""
        # Only their bounding box is rasterised: most shapes are small.
        low, high = polygons.min((0, 1)), polygons.max((0, 1))
        x0, y0 = max(int(low[0]) - 1, 0), max(int(low[1]) - 1, 0)
        x1, y1 = min(int(high[0]) + 2, self.width), min(int(high[1]) + 2, self.height)
        mask = np.zeros((max(y1 - y0, 0), max(x1 - x0, 0)), np.uint8)
        if mask.size:
            corners = ((polygons - (x0, y0)) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
            cv2.fillPoly(mask, list(corners), 1, shift=_SUBPIXEL_BITS)
        rows, columns = np.nonzero(mask)
        return (rows + y0) * self.width + columns + x0


def polygon(*points: tuple[float, float]) -> np.ndarray:
    """One shape from its corners (x, y), as (1, K, 2)."""
    return np.array([points], np.float64)


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """One upright rectangle, (1, 4, 2)."""
    return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def disc(x: float, y: float, rx: float, ry: float, bumps: np.ndarray | float = 1.0) -> np.ndarray:
    """One ellipse of 14 corners, (1, 14, 2), each corner at `bumps` (14,) times the radius."""
    return np.stack((x + rx * bumps * _CIRCLE[0], y + ry * bumps * _CIRCLE[1]), 1)[None]


def hsv(rng: np.random.Generator, hue: Range, saturation: Range, value: Range) -> np.ndarray:
    """One random colour, (3,) RGB 0..1, from ranges of hue, saturation and value, all 0..1."""
    return np.array(colorsys.hsv_to_rgb(*(rng.uniform(*r) for r in (hue, saturation, value))))


_CIRCLE = np.array([(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 15)[:-1]]).T


def _noise(rng: np.random.Generator, size: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise (H, W) float32 with grains of about `cell` px."""
    grid = rng.standard_normal((size[0] // cell + 2, size[1] // cell + 2), np.float32)
    return cv2.resize(grid, size[::-1], interpolation=cv2.INTER_LINEAR)
