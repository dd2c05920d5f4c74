"""Draws a data set like those of a microscope: cells in noise, TIFFs of 16 bits or floats.

python tests/cells.py DIR [IMAGES LABELED SIDE BANDS TYPE]
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from csc_jax.data import codec

CLASSES = ("background", "cell", "nucleus")


def draw(
    rng: np.random.Generator, size: tuple[int, int], bands: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image (H, W, K) float32, counts of a camera of 12 bits, and its class ids.

    Cells have a nucleus; blurred blobs that belong to no cell are background. Each further band
    shows nuclei darker and cells brighter than the one before.
    """
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    tilt = rng.normal(0, 60, 2)
    ground = 300 + tilt[0] * rows / height + tilt[1] * columns / width
    cell, nucleus = np.zeros(size, np.float32), np.zeros(size, np.float32)
    label = np.zeros(size, np.uint8)
    for _ in range(max(1, height * width // 9000)):  # out of focus
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(10, 25)
        ground += rng.uniform(100, 500) * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / r**2)
    for _ in range(max(2, height * width // 4500)):
        center = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        axes = int(rng.uniform(8, 18)), int(rng.uniform(8, 18))
        angle = float(rng.uniform(0, 180))
        inner = tuple(max(2, int(n * rng.uniform(0.3, 0.5))) for n in axes)
        for kind, (layer, level, sides) in enumerate(
            ((cell, rng.uniform(200, 700), axes), (nucleus, rng.uniform(300, 1200), inner)), 1
        ):
            cv2.ellipse(layer, center, sides, angle, 0, 360, float(level), -1)
            cv2.ellipse(label, center, sides, angle, 0, 360, kind, -1)
    cell, nucleus = (cv2.GaussianBlur(layer, (0, 0), 1.5) for layer in (cell, nucleus))
    light = [ground + cell * (1 + 0.5 * k) + nucleus / (1 + k) for k in range(bands)]
    image = rng.normal(np.stack(light, axis=-1), np.sqrt(4 * np.stack(light, axis=-1)))
    return image.clip(0, 4095).astype(np.float32), label


def write(path: Path, image: np.ndarray, dtype: str) -> None:
    """Writes (H, W, K) as a TIFF with a page for each band."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if np.dtype(dtype).kind == "u":
        image = image.round()
    pages = [np.ascontiguousarray(image[..., k], dtype) for k in range(image.shape[-1])]
    path.write_bytes(cv2.imencodemulti(".tiff", pages)[1].tobytes())


def tree(
    root: Path,
    images: int = 40,
    labeled: int = 12,
    size: tuple[int, int] = (256, 256),
    bands: int = 1,
    dtype: str = "uint16",
) -> Path:
    """Makes images/{train,val}, labels and classes.txt; a fifth of the images, at least 2, is val.

    Args:
      root: the folder.
      images: of both splits.
      labeled: of the train images; those of val have labels too.
      size: (height, width) px.
      bands: K.
      dtype: uint8 (which cuts off bright values), uint16 or float32.
    """
    rng = np.random.default_rng(0)
    val = max(2, images // 5)
    for i in range(images):
        name = f"val/{i:03d}" if i < val else f"train/{i:03d}"
        image, label = draw(rng, size, bands)
        write(root / f"images/{name}.tif", image.clip(0, 255) if dtype == "uint8" else image, dtype)
        if i < val + labeled:
            path = root / f"labels/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(codec.encode_png(label))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root


if __name__ == "__main__":
    given = [int(number) for number in sys.argv[2:6]]
    count, with_label, side, number = (given + [40, 12, 256, 1][len(given) :])[:4]
    tree(Path(sys.argv[1]), count, with_label, (side, side), number, *sys.argv[6:7])
