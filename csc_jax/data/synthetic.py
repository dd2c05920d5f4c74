"""Street scenes drawn from a seed: the embedded data set that needs no download.

A scene is painted far to near (sky, skyline, ground, facades, trees, cars, people) and then lit as
a whole: shadows, a light gradient, colour cast, fog, blur and noise. Colours overlap between
classes on purpose (grey sky, road and pavement; brick and autumn leaves; cars of any colour), so
that position, shape and texture have to be learnt.
"""

import dataclasses
import zlib

import cv2
import numpy as np
from ml_collections import ConfigDict

from csc_jax.data.canvas import Canvas, box, disc, hsv, polygon
from csc_jax.data.example import Listing, OnValues, nothing
from csc_jax.data.street_objects import (
    BUILDING,
    CLASS_NAMES,
    PAVEMENT,
    ROAD,
    SKY,
    TREE,
    building_color,
    car_from_behind,
    car_from_side,
    facade,
    leaf_color,
    person,
    tree,
)
from csc_jax.errors import UserError

__all__ = ["CLASS_NAMES", "PALETTE", "Scene", "draw", "find", "scenes"]

PALETTE = np.array(
    [
        (128, 180, 230),
        (150, 70, 60),
        (128, 64, 128),
        (244, 150, 200),
        (70, 150, 50),
        (20, 30, 190),
        (240, 220, 40),
    ],
    np.uint8,
)

_OVERSAMPLE = 2  # scenes are drawn this much larger and then reduced, for smooth edges
_VERSION = 1  # of the drawing itself; raise it when a scene looks different, so caches are remade


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image, fully described by its place in the data set.

    Attributes:
      size: (height, width) px.
      weather: how much light, fog and noise differ between images, 0 to 1.
    """

    seed: int
    split: str
    index: int
    size: tuple[int, int]
    weather: float = 1.0

    @property
    def id(self) -> str:
        return f"{self.split}_{self.index:05d}"

    @property
    def has_label(self) -> bool:
        return True

    def fingerprint(self) -> str:
        return f"{_VERSION} {self.seed} {self.size} {self.weather}"

    def original(self) -> None:
        """No file stands behind a scene."""

    def read(self, on_values: OnValues = nothing) -> tuple[np.ndarray, np.ndarray, None]:
        """Draws image (H, W, 3) uint8 RGB and label (H, W) uint8; no file stands behind them."""
        stream = zlib.crc32(self.split.encode())
        rng = np.random.default_rng([self.seed, stream, self.index])
        image, label = draw(rng, self.size, self.weather)
        return image, label, None


def find(config: ConfigDict) -> Listing:
    """Lists the scenes of each split; `config` is the `data` part of the configuration."""
    return Listing(CLASS_NAMES, PALETTE, scenes(config.synthetic))


def scenes(config: ConfigDict) -> dict[str, list[Scene]]:
    """Returns the scenes of each split.

    Args:
      config: `data.synthetic`.
    """
    size = tuple(config.size)
    if min(size) < 16 or min(config.train, config.val) < 1 or config.seed < 0:
        raise UserError(
            f"data.synthetic asks for {config.train} train and {config.val} val images of size "
            f"{size} from seed {config.seed}; it takes at least 1 of each, of at least 16x16 px, "
            "from a seed of at least 0."
        )
    return {
        split: [
            Scene(config.seed, split, index, size, config.weather) for index in range(config[split])
        ]
        for split in ("train", "val")
    }


def draw(
    rng: np.random.Generator, size: tuple[int, int], weather: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one scene.

    Args:
      size: (height, width) px.
      weather: how much light, fog and noise differ from those of a clear day, 0 to 1.

    Returns:
      Image (H, W, 3) uint8 RGB and class ids (H, W) uint8; every pixel has a class.
    """
    canvas = Canvas(rng, (size[0] * _OVERSAMPLE, size[1] * _OVERSAMPLE))
    _sky(canvas)
    if rng.random() < 0.7:
        _street_ahead(canvas)
    else:
        _street_across(canvas)
    image = cv2.resize(_light(canvas, weather), size[::-1], interpolation=cv2.INTER_AREA)
    image = image + weather * rng.uniform(0, 0.035) * rng.standard_normal(image.shape, np.float32)
    label = canvas.label[::_OVERSAMPLE, ::_OVERSAMPLE].copy()
    return (image.clip(0, 1) * 255).round().astype(np.uint8), label


@dataclasses.dataclass(frozen=True)
class _View:
    """A flat street and where its lines meet.

    A ground position is (across, near): `across` is the x at which the line from it away from the
    vanishing point leaves the image below, `near` is 1 there and 0 at the vanishing point. All
    sizes are multiplied by `near`.
    """

    vanish_x: float
    horizon: float
    height: int

    def at(self, across: float, near: float, up: float = 0.0) -> tuple[float, float]:
        """Returns (x, y) px of the point `up` px (measured at near = 1) above the ground."""
        x = self.vanish_x + (across - self.vanish_x) * near
        return x, self.horizon + (self.height - self.horizon - up) * near

    def strip(self, left: float, right: float, far: float, near: float) -> np.ndarray:
        """Returns the part of the ground between two `across` and two `near`, (1, 4, 2) px."""
        return polygon(
            self.at(left, far), self.at(right, far), self.at(right, near), self.at(left, near)
        )

    def near_of(self, y: np.ndarray | float) -> np.ndarray:
        """Returns `near` of the ground that is seen at height y px, float32."""
        near = (np.asarray(y) - self.horizon) / (self.height - self.horizon)
        return near.clip(0.02).astype(np.float32)

    def ground(self, width: int) -> np.ndarray:
        """Returns (H, width) float32, `near` of every pixel if it shows the ground."""
        return np.repeat(self.near_of(np.arange(self.height) + 0.5)[:, None], width, 1)


def _sky(c: Canvas) -> None:
    rng = c.rng
    kinds = (
        ((0.53, 0.64), (0.1, 0.6), (0.55, 1.0)),  # blue
        ((0.5, 0.7), (0.0, 0.08), (0.45, 0.95)),  # overcast
        ((0.02, 0.12), (0.1, 0.5), (0.6, 1.0)),  # low sun
    )
    top, bottom = (hsv(rng, *kinds[i]) for i in rng.choice(3, 2, p=(0.45, 0.4, 0.15)))
    ramp = np.linspace(0, 1, c.height)[:, None, None] ** rng.uniform(0.5, 2)
    clouds = c.textures @ np.array((0, rng.uniform(0, 0.05), rng.uniform(0, 0.12)), np.float32)
    c.image[:] = (1 - ramp) * top + ramp * bottom + clouds[..., None]
    c.label[:] = SKY


def _street_ahead(c: Canvas) -> None:
    """A street that runs away from the viewer, with houses and trees along both sides."""
    rng, height, width = c.rng, c.height, c.width
    view = _View(width * rng.uniform(0.25, 0.75), height * rng.uniform(0.3, 0.55), height)
    middle, half = width * rng.uniform(0.35, 0.65), width * rng.uniform(0.3, 0.75)
    kerbs = (middle - half, middle + half)
    houses = np.array(kerbs) + np.array((-width, width)) * rng.uniform(0.15, 0.6, 2)
    ground = view.ground(width)
    _skyline(c, view.horizon)
    _pave(c, box(0, view.horizon, width, height), PAVEMENT, ground)
    _pave(c, view.strip(*kerbs, 0, 1.2), ROAD, ground)
    _kerbs_and_lanes(c, view, kerbs, ground)
    for side, edge in zip((-1, 1), houses, strict=True):
        if rng.random() < 0.85:
            _row_of_houses(c, view, side, edge)
    _cast_shadows(c)

    def beside(low: float, high: float) -> float:
        """A place between kerb (0) and houses (1) of either side."""
        side = rng.integers(2)
        return kerbs[side] + (houses[side] - kerbs[side]) * rng.uniform(low, high)

    objects = [(rng.uniform(0.12, 0.9), "tree", beside(0.1, 1)) for _ in range(rng.integers(7))]
    for _ in range(rng.integers(1, 6)):  # in one of two lanes, or parked at a kerb
        lane = middle + half * rng.choice((-0.76, -0.35, 0.4, 0.76))
        objects.append((rng.uniform(0.1, 0.85), "car", lane))
    for _ in range(rng.integers(6)):
        objects.append((rng.uniform(0.15, 0.95), "person", beside(-0.4, 0.9)))
    for near, kind, across in sorted(objects):
        x, y = view.at(across, near)
        if kind == "tree":
            tree(c, x, y, height * near, near)
        elif kind == "car":
            car_from_behind(c, x, y, half * 0.62 * near, near)
        else:
            person(c, x, y, height * near, near)


def _street_across(c: Canvas) -> None:
    """A street that passes in front of the viewer, with houses behind it."""
    rng, height, width = c.rng, c.height, c.width
    view = _View(width / 2, height * rng.uniform(0.3, 0.4), height)
    parts = (rng.uniform(0.42, 0.62), rng.uniform(0.04, 0.16), rng.uniform(0.2, 0.5))
    foot, kerb, end = height * np.cumsum(parts)  # y px: houses, pavement, road end here
    ground = view.ground(width)
    _skyline(c, foot)
    x = -width * rng.uniform(0, 0.3)
    while x < width:
        wide = width * rng.uniform(0.2, 0.7)
        if rng.random() < 0.8:
            wall = box(x, foot - height * rng.uniform(0.2, 0.7), x + wide, foot)[0]
            facade(c, wall, float(view.near_of(foot)))
        x += wide * rng.uniform(0.9, 1.1)
    _pave(c, box(0, foot, width, height), PAVEMENT, ground)
    _pave(c, box(0, kerb, width, end), ROAD, ground)
    line = hsv(rng, (0.0, 0.2), (0.0, 0.3), (0.6, 0.95))
    for y in (kerb, end):
        c.paint(box(0, y, width, y + height * 0.012), PAVEMENT, line * 0.8, ground)
    if rng.random() < 0.6:
        y, dash = (kerb + end) / 2, width * rng.uniform(0.05, 0.2)
        starts = np.arange(-dash, width, 2 * dash) + rng.uniform(0, dash)
        dashes = np.concatenate([box(s, y, s + dash, y + height * 0.015) for s in starts])
        c.paint(dashes, ROAD, line, ground)
    _cast_shadows(c)
    objects = [(rng.uniform(foot, kerb), "tree") for _ in range(rng.integers(4))]
    objects += [
        (end - (end - kerb) * rng.uniform(0, 0.7), "car") for _ in range(rng.integers(1, 4))
    ]
    objects += [(rng.uniform(foot, height * 1.1), "person") for _ in range(rng.integers(5))]
    for y, kind in sorted(objects):
        x, near = width * rng.uniform(-0.05, 1.05), float(view.near_of(y))
        if kind == "tree":
            tree(c, x, y, height * max(near, 0.3), near)
        elif kind == "car":
            car_from_side(c, x, y, width * rng.uniform(0.5, 0.8) * near, near)
        else:
            person(c, x, y, height * near, near)


def _skyline(c: Canvas, foot: float) -> None:
    """Far buildings and trees that stand at y = `foot` px."""
    rng, x, near = c.rng, 0.0, 0.06
    while x < c.width:
        wide, tall = c.width * rng.uniform(0.06, 0.25), c.height * rng.uniform(0.01, 0.16)
        kind = rng.random()
        if kind < 0.45:
            house = box(x, foot - tall, x + wide, foot + 1)
            c.paint(house, BUILDING, building_color(rng), near)
        elif kind < 0.85:
            crown = disc(x + wide / 2, foot, wide, tall, 1 + 0.2 * rng.standard_normal(14))
            c.paint(crown, TREE, leaf_color(rng), near, (0.15, 0.1, 0.0))
        x += wide


def _pave(c: Canvas, shape: np.ndarray, class_id: int, ground: np.ndarray) -> None:
    """Road or pavement; both share one range of greys, browns and reds, roads are mostly grey."""
    rng = c.rng
    color = hsv(rng, (0.0, 0.14), (0.0, 0.3), (0.2, 0.75))
    if class_id == ROAD and rng.random() < 0.7:
        color = hsv(rng, (0.55, 0.7), (0.0, 0.12), (0.18, 0.6))
    grain = (rng.uniform(0.02, 0.1), rng.uniform(0.0, 0.08), rng.uniform(0.0, 0.12))
    c.paint(shape, class_id, color, ground, grain)


def _kerbs_and_lanes(
    c: Canvas, view: _View, kerbs: tuple[float, float], ground: np.ndarray
) -> None:
    """Kerb stones, joints between the slabs, and the lines of the lanes."""
    rng, wide = c.rng, c.width * 0.02
    left, right = kerbs
    stone = hsv(rng, (0.0, 0.15), (0.0, 0.15), (0.3, 0.9))
    edges = (
        view.strip(left - 2 * wide, left, 0, 1.2),
        view.strip(right, right + 2 * wide, 0, 1.2),
    )
    c.paint(np.concatenate(edges), PAVEMENT, stone, ground)
    # Even steps along the street are even steps in 1 / near.
    if rng.random() < 0.6:
        rows = 1 / np.linspace(1, 8, rng.integers(8, 22))
        sides = ((-4 * c.width, left - 2 * wide), (right + 2 * wide, 5 * c.width))
        joints = [view.strip(a, b, row, row * 1.03) for a, b in sides for row in rows if row > 0.12]
        c.paint(np.concatenate(joints), PAVEMENT, stone * rng.uniform(0.6, 1.1), ground)
    if rng.random() < 0.75:
        color = hsv(rng, (0.08, 0.16), (0.0, 0.5 * rng.integers(2)), (0.65, 1.0))
        ends = 1 / np.linspace(0.8, 9, 2 * rng.integers(4, 9))
        lanes = rng.integers(2, 4)
        middles = [left + (right - left) * lane / lanes for lane in range(1, lanes)]
        dashes = [
            view.strip(x - wide / 2, x + wide / 2, far, near)
            for x in middles
            for near, far in zip(ends[::2], ends[1::2], strict=True)
        ]
        c.paint(np.concatenate(dashes), ROAD, color, ground)


def _row_of_houses(c: Canvas, view: _View, side: int, edge: float) -> None:
    """Houses along one side (-1 left, 1 right), far to near, each with the wall facing us too."""
    rng, near = c.rng, 0.07
    while near < 1.3:
        far, near = near, near * rng.uniform(1.25, 2.2)
        if rng.random() < 0.18:
            continue  # a gap: what stands behind shows through
        tall = c.height * rng.uniform(0.45, 1.6)
        tops = view.at(edge, far, tall), view.at(edge, near, tall)
        wall = np.array((*tops, view.at(edge, near), view.at(edge, far)))
        color = facade(c, wall, (far + near) / 2)
        x, y = view.at(edge, near)
        front = box(x, y - tall * near, x + side * c.width * near, y)
        c.paint(front, BUILDING, color * rng.uniform(0.6, 1.1), near, (0.03, 0.03, 0.05))


def _cast_shadows(c: Canvas) -> None:
    """Darkens parts of the ground, as houses and trees outside the image do."""
    rng = c.rng
    ground = (c.label == ROAD) | (c.label == PAVEMENT)
    for _ in range(rng.integers(3)):
        if rng.random() < 0.6:  # a straight edge, any way round
            angle, x = rng.uniform(0, 2 * np.pi), c.width * rng.uniform(0.2, 0.8)
            columns, rows = np.arange(c.width) - x, np.arange(c.height)[:, None] - 0.75 * c.height
            shaded = ground & (np.cos(angle) * columns + np.sin(angle) * rows > 0)
        else:  # the blots of a tree
            shaded = ground & (c.textures[..., 2] > rng.uniform(-0.3, 0.8))
        c.image[shaded] *= rng.uniform(0.35, 0.75)


def _light(c: Canvas, weather: float) -> np.ndarray:
    """Returns the image (H, W, 3) float32 under one light: fog, gradient, cast, exposure, blur."""
    rng, image = c.rng, c.image
    if rng.random() < 0.4:
        clear = np.exp(-weather * rng.uniform(0.02, 0.2) / c.near)[..., None]
        image = clear * image + (1 - clear) * hsv(rng, (0.5, 0.7), (0.0, 0.1), (0.5, 0.95))
    across = np.linspace(-1, 1, c.width) * rng.normal(0, 0.18)
    down = np.linspace(-1, 1, c.height)[:, None] * rng.normal(0, 0.12)
    gain = (1 + weather * (across + down)).clip(0.4)[..., None]
    gain = gain * (1 + weather * rng.uniform(-0.15, 0.15, 3))
    lit = (image * gain * (1 + weather * rng.uniform(-0.45, 0.25))).clip(0).astype(np.float32)
    lit **= np.float32(1 + weather * rng.uniform(-0.25, 0.25))
    if rng.random() < 0.3:
        return cv2.GaussianBlur(lit, (0, 0), c.height * rng.uniform(0.004, 0.01))
    return lit
