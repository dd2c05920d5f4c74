"""Tiny data sets in each official layout: right names, ids, palettes and split files."""

import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from csc_jax.data import cityscapes, pascal_voc

SIZE = (24, 32)  # (height, width) px
VOC_COLORS = pascal_voc.colormap()
CITIES = {"train": ("aachen", "bremen"), "val": ("lindau",)}
FOLDER_CLASSES = "ground\nwide road 128 64 128\nsky #4682b4\n"


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Returns noise, (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def blocks(seed: int, values: object, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Returns a label of 8x8 px blocks, (H, W) uint8, each of one of `values`."""
    rng = np.random.default_rng(seed)
    grid = rng.choice(np.array(values, np.uint8), (-(-size[0] // 8), -(-size[1] // 8)))
    return grid.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """Writes (H, W) or (H, W, 3 or 4) RGB(A)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="png")
    return path


def write_jpeg(path: Path, pixels: np.ndarray) -> Path:
    """Writes (H, W, 3) RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".jpg", pixels[..., ::-1])[1].tobytes())
    return path


def write_palette_png(path: Path, index: np.ndarray, colors: np.ndarray = VOC_COLORS) -> Path:
    """Writes (H, W) indices the way Pascal VOC stores them, as a PNG with a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(index)
    image.putpalette(colors.ravel().tolist())
    assert image.mode == "P"
    image.save(path)
    return path


def write_sbd_mat(path: Path, index: np.ndarray) -> Path:
    """Writes (H, W) class ids the way SBD stores them, as GTcls.Segmentation of a MATLAB file."""
    from scipy import io as scipy_io

    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, {"GTcls": {"Segmentation": index}}, do_compression=True)
    return path


def write_lines(path: Path, lines: list[str]) -> Path:
    """Writes a list file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def cityscapes_tree(root: Path, per_city: int = 4, extra: int = 0) -> Path:
    """Makes the unpacked archives, labels with all 19 classes, void and license plate.

    Args:
      per_city: images of each of two train cities; val has half as many.
      extra: images in train_extra.
    """
    values = (*(label_id for _, label_id, _ in cityscapes._CLASSES), 0, 3, 255)
    for split, cities in CITIES.items():
        for seed, city in enumerate(cities):
            for i in range(per_city if split == "train" else max(1, per_city // 2)):
                stem = f"{split}/{city}/{city}_{i:06d}_000019"
                write_png(root / f"leftImg8bit/{stem}_leftImg8bit.png", picture(100 * seed + i))
                label = blocks(100 * seed + i, values)
                write_png(root / f"gtFine/{stem}_gtFine_labelIds.png", label)
    for i in range(extra):
        stem = f"train_extra/augsburg/augsburg_000000_{i:06d}"
        write_png(root / f"leftImg8bit/{stem}_leftImg8bit.png", picture(900 + i))
    return root


def zip_tree(source: Path, archive: Path, folders: tuple[str, ...]) -> Path:
    """Packs folders of `source`, with the other files that official archives hold."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("README", "see the web page")
        for folder in folders:
            for path in sorted((source / folder).rglob("*.png")):
                out.write(path, path.relative_to(source).as_posix())
    return archive


def voc_tree(
    root: Path, own: int = 4, val: int = 2, augmented: int = 4, labels: str = "png"
) -> Path:
    """Makes VOCdevkit/VOC2012 and, beside VOC's `own` images, `augmented` ones.

    Args:
      labels: of the augmented images: png, mat or none; grey-scale PNGs come with a list.
    """
    voc = root / "VOCdevkit" / "VOC2012"
    names = {
        "train": [f"2007_{i:06d}" for i in range(own)],
        "val": [f"2008_{i:06d}" for i in range(val)],
        "more": [f"2011_{i:06d}" for i in range(augmented)],
    }
    for split in ("train", "val"):
        write_lines(voc / f"ImageSets/Segmentation/{split}.txt", names[split])
    for seed, name in enumerate(names["train"] + names["val"] + names["more"]):
        size = (SIZE[0] + 2 * (seed % 3), SIZE[1])  # as in VOC, not all of one size
        index = blocks(seed, (*range(21), 255), size)
        write_jpeg(voc / f"JPEGImages/{name}.jpg", picture(seed, size))
        if name not in names["more"]:
            write_palette_png(voc / f"SegmentationClass/{name}.png", index)
        if labels == "mat":  # SBD covers part of VOC's own images too, val included
            write_sbd_mat(root / f"benchmark_RELEASE/dataset/cls/{name}.mat", index % 21)
        elif labels == "png" and name not in names["val"]:
            write_png(voc / f"SegmentationClassAug/{name}.png", index)
    if labels == "png":
        pool = names["more"] + names["train"]
        write_lines(voc / "ImageSets/Segmentation/train_aug.txt", pool)
    return root


def camvid_tree(root: Path, train: int = 8, val: int = 3, size: tuple[int, int] = SIZE) -> Path:
    """Makes images/ and labels/ with train and val; names have a blank and an accent."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            label = np.random.default_rng(i).integers(0, 12, size, np.uint8)
            write_jpeg(root / "images" / split / f"{split} é{i}.jpg", picture(i, size))
            write_png(root / "labels" / split / f"{split} é{i}.png", label)
    return root


def folder_tree(
    root: Path, labeled: int = 8, unlabeled: int = 3, splits: bool = True, as_json: bool = False
) -> Path:
    """Makes images/, labels/ and a class list of three names.

    Args:
      labeled: images of train, or of all, with a label.
      unlabeled: images of train, or of all, without.
      splits: with train and val, which has 2 images, or without such folders.
    """
    root.mkdir(parents=True, exist_ok=True)
    if as_json:
        entries = ["ground", {"name": "wide road", "color": [128, 64, 128]}, {"name": "sky"}]
        (root / "classes.json").write_text(json.dumps(entries))
    else:
        (root / "classes.txt").write_text(FOLDER_CLASSES)
    prefix = "train/" if splits else ""
    names = [f"{prefix}site {i % 2}/ä{i:02d}" for i in range(labeled + unlabeled)]
    names += [f"val/{i}" for i in range(2)] if splits else []
    bare = names[labeled : labeled + unlabeled]
    for seed, name in enumerate(names):
        write = write_jpeg if seed % 2 else write_png
        write(root / "images" / f"{name}.{'jpg' if seed % 2 else 'png'}", picture(seed))
        if name not in bare:
            write_png(root / "labels" / f"{name}.png", blocks(seed, (0, 1, 2, 255)))
    return root
