"""Facades, trees, cars and people of the synthetic scenes.

Each function paints one object with a colour, shape and texture of its own. `near` is its distance
(1 at the lower image edge, towards 0 at the horizon); lengths are px at that distance.
"""

import numpy as np

from csc_jax.data.canvas import Canvas, box, disc, hsv, polygon

CLASS_NAMES = ("sky", "building", "road", "pavement", "tree", "car", "pedestrian")
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PEDESTRIAN = range(len(CLASS_NAMES))

_RUBBER = np.full(3, 0.06)
_SHADE = 0.55  # light left on the ground under an object


def facade(c: Canvas, corners: np.ndarray, near: float) -> np.ndarray:
    """One wall with windows, perhaps shops and a cornice.

    Args:
      corners: (4, 2) px, clockwise from the upper left; the two upright edges are the sides.

    Returns:
      The colour of the wall, (3,).
    """
    rng, color = c.rng, building_color(c.rng)
    grain = (rng.uniform(0.0, 0.12), rng.uniform(0.0, 0.08), rng.uniform(0.0, 0.12))
    c.paint(corners[None], BUILDING, color, near, grain)
    if rng.random() < 0.85:
        columns, rows = rng.integers(2, 8, 2)
        wide = rng.uniform(0.35, 0.6) / columns
        tall = rng.uniform(0.35, 0.95) / rows  # the tallest are bands of glass
        u, v = np.meshgrid((np.arange(columns) + 0.25) / columns, (np.arange(rows) + 0.2) / rows)
        glass = _glass(rng, 0.9)
        c.paint(_part(corners, u, v, wide, tall), BUILDING, glass, near, (0.05, 0.1, 0.1))
    if rng.random() < 0.4:
        shops = _part(corners, 0.0, 0.82, 1.0, 0.18)
        c.paint(shops, BUILDING, building_color(rng), near, (0.1, 0.2, 0.0))
    if rng.random() < 0.4:
        cornice = _part(corners, 0.0, 0.0, 1.0, 0.06)
        c.paint(cornice, BUILDING, color * rng.uniform(0.5, 1.4), near)
    return color


def tree(c: Canvas, x: float, y: float, unit: float, near: float) -> None:
    """A trunk and a crown of overlapping tufts; `unit` = the image height at its distance."""
    rng = c.rng
    tall, wide = unit * rng.uniform(0.45, 0.95), unit * rng.uniform(0.12, 0.28)
    stem = unit * rng.uniform(0.012, 0.03)
    bark = hsv(rng, (0.03, 0.12), (0.1, 0.5), (0.1, 0.45))
    top = y - tall
    trunk = polygon((x - stem, y), (x + stem, y), (x + stem / 2, top), (x - stem / 2, top))
    c.paint(trunk, TREE, bark, near, (0.15, 0.0, 0.0))
    leaf = leaf_color(rng)
    low = rng.uniform(0.3, 0.7)  # where the crown starts, as a share of the height
    for _ in range(rng.integers(4, 8)):
        tuft_x, tuft_y = x + wide * rng.uniform(-0.7, 0.7), y - tall * rng.uniform(low, 1.05)
        radius = wide * rng.uniform(0.45, 0.9)
        bumps = 1 + 0.15 * rng.standard_normal(14)
        tuft = disc(tuft_x, tuft_y, radius, radius * rng.uniform(0.7, 1.1), bumps)
        c.paint(tuft, TREE, leaf * rng.uniform(0.6, 1.3), near, (0.22, 0.15, 0.0))


def car_from_behind(c: Canvas, x: float, y: float, wide: float, near: float) -> None:
    """Front or rear view, standing at (x, y)."""
    rng, color = c.rng, _car_color(c.rng)
    half, tall = wide / 2, wide * rng.uniform(0.65, 1.05)
    waist, sill = y - tall * 0.55, y - tall * 0.14
    c.darken(disc(x, y, half * 1.1, tall * 0.12), _SHADE)
    c.paint(_twins(x, half * 0.72, wide * 0.09, y - tall * 0.25, y), CAR, _RUBBER, near)
    slope = half * rng.uniform(0.6, 0.9)
    cabin = polygon(
        (x - half * 0.95, waist),
        (x - slope, y - tall),
        (x + slope, y - tall),
        (x + half * 0.95, waist),
    )
    c.paint(cabin, CAR, color, near)
    pane = (cabin - (x, waist)) * (0.85, 0.8) + (x, waist - tall * 0.02)
    c.paint(pane, CAR, _glass(rng, 0.6), near, (0.0, 0.1, 0.1))
    c.paint(box(x - half, waist, x + half, sill), CAR, color, near, (0.01, 0.0, 0.06))
    lamp = hsv(rng, (0.0, 0.12), (0.1, 0.95), (0.6, 1.0))
    lamps = _twins(x, half * 0.8, wide * 0.08, waist + tall * 0.08, waist + tall * 0.19)
    c.paint(lamps, CAR, lamp, near)
    bumper = box(x - half * 0.9, y - tall * 0.25, x + half * 0.9, sill)
    c.paint(bumper, CAR, color * rng.uniform(0.2, 0.8), near)


def car_from_side(c: Canvas, x: float, y: float, long: float, near: float) -> None:
    """Side view, standing at (x, y), facing left or right."""
    rng, color = c.rng, _car_color(c.rng)
    tall, way = long * rng.uniform(0.3, 0.42), rng.choice((-1, 1))
    back, front = np.array((-0.25, 0.12)) + rng.uniform(-0.12, 0.08)  # ends of the roof
    scale = (way * long, -tall)  # the shapes below: length 1 around 0, height 1 above the ground
    c.darken(disc(x, y, long * 0.52, tall * 0.12), _SHADE)
    hull = polygon(
        (-0.5, 0.15), (-0.5, 0.5), (-0.42, 0.58), (back, 0.97), (front, 1.0), (0.28, 0.6),
        (0.48, 0.5), (0.5, 0.15),
    )  # fmt: skip
    c.paint(hull * scale + (x, y), CAR, color, near, (0.01, 0.0, 0.06))
    pillar = (back + front) / 2
    panes = np.concatenate((
        polygon((-0.34, 0.6), (back, 0.9), (pillar - 0.015, 0.9), (pillar - 0.015, 0.6)),
        polygon((pillar + 0.015, 0.6), (pillar + 0.015, 0.9), (front, 0.92), (0.2, 0.6)),
    ))  # fmt: skip
    c.paint(panes * scale + (x, y), CAR, _glass(rng, 0.6), near, (0.0, 0.1, 0.1))
    rim = np.full(3, rng.uniform(0.2, 0.7))
    for radius, paint in ((0.2, _RUBBER), (0.09, rim)):
        hubs = (
            disc(x + end * long, y - tall * 0.18, tall * radius, tall * radius)
            for end in (-0.3, 0.3)
        )
        c.paint(np.concatenate(list(hubs)), CAR, paint, near)


def person(c: Canvas, x: float, y: float, unit: float, near: float) -> None:
    """Legs, arms, torso and head, standing at (x, y); `unit` = the image height there."""
    rng = c.rng
    tall = unit * rng.uniform(0.3, 0.48)
    wide = tall * rng.uniform(0.11, 0.17)
    hip, neck = y - tall * 0.48, y - tall * 0.84
    c.darken(disc(x, y, wide * 1.2, tall * 0.03), _SHADE)
    foot, swing = wide * rng.uniform(0.2, 1.2), wide * rng.uniform(0.2, 0.8)
    # Half a body: corners (across, y) of leg, arm and half torso; the other half mirrors it.
    leg = polygon((0, hip), (wide * 0.7, hip), (foot + wide * 0.25, y), (foot - wide * 0.25, y))
    arm = polygon((wide * 0.6, neck), (wide, neck), (wide + swing, hip), (wide * 0.6 + swing, hip))
    trunk = polygon((0, neck), (wide, neck), (wide * 0.75, hip + wide * 0.3), (0, hip + wide * 0.3))
    trousers = hsv(rng, (0.0, 1.0), (0.0, 0.6), (0.05, 0.6))
    c.paint(_mirrored(leg, x), PEDESTRIAN, trousers, near)
    jacket = hsv(rng, (0.0, 1.0), (0.0, 0.9), (0.1, 0.95))
    c.paint(_mirrored(np.concatenate((arm, trunk)), x), PEDESTRIAN, jacket, near, (0.05, 0.05, 0.0))
    skin = hsv(rng, (0.03, 0.09), (0.25, 0.6), (0.25, 0.95))
    c.paint(disc(x, y - tall * 0.92, tall * 0.06, tall * 0.08), PEDESTRIAN, skin, near)


def building_color(rng: np.random.Generator) -> np.ndarray:
    """Brick and plaster, or any pale colour; (3,)."""
    if rng.random() < 0.4:
        return hsv(rng, (0.0, 1.0), (0.0, 0.35), (0.2, 0.95))
    return hsv(rng, (0.0, 0.14), (0.1, 0.65), (0.25, 0.95))


def leaf_color(rng: np.random.Generator) -> np.ndarray:
    """Green, or autumn; (3,)."""
    if rng.random() < 0.75:
        return hsv(rng, (0.18, 0.4), (0.15, 0.75), (0.12, 0.6))
    return hsv(rng, (0.02, 0.14), (0.3, 0.8), (0.25, 0.8))


def _car_color(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        return hsv(rng, (0.0, 1.0), (0.3, 0.95), (0.2, 0.95))
    return np.full(3, rng.uniform(0.05, 0.95))


def _glass(rng: np.random.Generator, brightest: float) -> np.ndarray:
    return hsv(rng, (0.5, 0.65), (0.0, 0.4), (0.05, brightest))


def _twins(x: float, offset: float, half: float, top: float, bottom: float) -> np.ndarray:
    """Two equal boxes left and right of x, (2, 4, 2)."""
    return np.concatenate([
        box(x + side * offset - half, top, x + side * offset + half, bottom) for side in (-1, 1)
    ])  # fmt: skip


def _mirrored(shapes: np.ndarray, x: float) -> np.ndarray:
    """Shapes (N, K, 2) right of a middle line at 0, and their mirror images, moved to x."""
    return np.concatenate((shapes, shapes * (-1, 1))) + np.array((x, 0))


def _part(
    corners: np.ndarray,
    u: np.ndarray | float,
    v: np.ndarray | float,
    wide: float,
    tall: float,
) -> np.ndarray:
    """Cuts boxes out of a wall.

    Args:
      corners: (4, 2) px of the wall, clockwise from the upper left.
      u, v: left and upper edges of the N boxes, 0..1 of the wall's width and height.
      wide, tall: their size, in the same units.

    Returns:
      (N, 4, 2) px.
    """
    u, v = np.ravel(u)[:, None], np.ravel(v)[:, None]
    u = np.concatenate((u, u + wide, u + wide, u), 1)[..., None]  # (N, 4, 1)
    v = np.concatenate((v, v, v + tall, v + tall), 1)[..., None]
    top = corners[0] + (corners[1] - corners[0]) * u
    bottom = corners[3] + (corners[2] - corners[3]) * u
    return top + (bottom - top) * v
