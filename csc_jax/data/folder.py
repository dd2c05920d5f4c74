"""A data set of the user's own: `images/`, `labels/` and a list of classes.

The label of `images/PATH.jpg` is `labels/PATH.png`. docs/data.md lists the formats of both, and
`class_list` the forms of the list, `classes.txt` or `classes.json`.

Where folders below `images/` are named train, val or test (or training, Valid, test2017, …), they
are the splits. Else every fifth labelled image in name order is val and all others are train. A
train image without label is an unlabelled one.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from ml_collections import ConfigDict

from csc_jax import paths
from csc_jax.config import bands
from csc_jax.data import files
from csc_jax.data.class_list import ClassList, read_classes
from csc_jax.data.example import BadExample, LabelIds, Listing, Notes, Pair, check_splits, label_ids
from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError

log = logging.getLogger("csc_jax")

_SPLITS = ("train", "val", "test")
# Folders that are a split by their name, in any case and with a year behind it: COCO's train2017.
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
# Folders that may be one: train_set, valimages, 01_test, "Train data".
_LIKE_SPLIT = re.compile(
    rf"(?:^|[^a-z])({'|'.join(_SPLIT_NAMES)})(?:set|data|images?|imgs?|split|[ab])?(?:[^a-z]|$)"
)
_SPLIT_YEAR = re.compile(r"[-_]?(?:19|20)\d\d")
_LISTS = ("classes.txt", "classes.json", "labelmap.txt", "labels.txt", "classes.csv")
_VAL_EVERY = 5
_LARGEST_VALUE = (1 << 16) - 1  # of a label
_HEAD = 4096  # bytes that are compared before whole files are


def find(config: ConfigDict) -> Listing:
    """Lists the pairs of each split in name order.

    Ids are image paths relative to `images/`, without suffix: `train/berlin/0001`.

    Args:
      config: the `data` part of the configuration.

    Raises:
      UserError: for a missing folder or class list, splits that are not clear, a split without
        images or labels, a label without image, or images that share a label.
    """
    root = files.existing_root(config.root, "images/, labels/ and classes.txt or classes.json")
    folders = _part(root, "images"), _part(root, "labels")  # the first sign of a wrong root
    path = _class_list(root, config.folder.classes)
    classes = read_classes(path)
    images = files.walk(folders[0], files.IMAGE_SUFFIXES)
    labels = files.walk(folders[1], files.LABEL_SUFFIXES)
    log_passed_over(root / "images", images)
    by_folder = _splits_of_folders(images.found, root)
    of_image = {_key(name, by_folder): name for name in _by_stem(images.found)}
    label_of = _labels(labels, of_image, by_folder, root)
    if images.found and not label_of:
        raise UserError(
            f"data.root {root} has {len(images.found)} images and no label for any of them"
            f"{labels.passed_over()}; the label of images/PATH.jpg is labels/PATH.png."
        )
    meaning = _meaning(config.folder.label_values, classes, path)
    notes = Notes()
    kept = config.bands if bands.keeps_values(config) else 0
    pairs = [
        Pair(name, file, label_of.get(name), meaning, config.image_bits, notes, kept)
        for name, file in _by_stem(images.found).items()
    ]
    if not by_folder and len(label_of) == 1:
        raise UserError(
            f"data.root {root} has a label for one image alone, {next(iter(label_of))}. Label one "
            "more: without folders images/train and images/val every fifth labelled image, and at "
            "least one, is for validation, and a run needs another one to train on."
        )
    splits = _by_folder(pairs, by_folder) if by_folder else _drawn(pairs)
    check_splits(splits, config.root, f"images/**/*.jpg with labels/**/*.png{images.passed_over()}")
    if "test" in splits and not any(pair.has_label for pair in splits["test"]):
        log.info("The %d images of test have no labels: nothing scores them", len(splits["test"]))
        del splits["test"]
    for split, listed in splits.items():
        missing = [pair for pair in listed if not pair.has_label]
        if missing and (split != "train" or len(missing) == len(listed)):
            raise UserError(
                f"data.root {root} has no label labels/{missing[0].id}.png ({len(missing)} of the "
                f"{len(listed)} images of {split} lack theirs{labels.passed_over()}); only train "
                "images may be without, and not all of them."
            )
    _log_splits(splits, by_folder, len(pairs))
    _warn_of_shared(splits)
    return Listing(classes.names, classes.palette, splits, notes)


def _part(root: Path, name: str) -> Path:
    """Returns the folder of that name, in any case."""
    try:
        there = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        same = [path for path in there if path.name.casefold() == name and path.is_dir()]
        exact = [path for path in same if path.name == name] or same
        if len(exact) == 1:
            return exact[0]
        folders = [path.name for path in there if path.is_dir()][:5]
    except OSError as error:
        raise files.unreadable(error, "data.root", root) from error
    has = f"; it has {', '.join(folders)}" if folders else ""
    raise UserError(
        f"data.root {root} has no folder {name}{has}. Images belong in images/, labels in labels/"
        f"{_deeper(root, folders)}."
    )


def _deeper(root: Path, folders: Sequence[str]) -> str:
    """Returns what to do about folders of images that lie one folder too deep."""
    try:
        around = [folder for folder in folders if (root / folder / "images").is_dir()]
    except OSError:
        return ""
    if any(_split_of(folder) for folder in around):
        return f"; move {around[0]}/images to images/{around[0]}, and so with labels and each split"
    return f"; or name {root / around[0]} as data.root" if around else ""


def _class_list(root: Path, given: str) -> Path:
    if given:
        return paths.given("data.folder.classes", given)
    for name in _LISTS:
        if files.is_file(root / name, "data.root"):
            return root / name
    raise UserError(
        f"data.root {root} has no class list, {' or '.join(_LISTS[:2])}; write one class name a "
        "line, in the order of the label values from 0, or name the file with "
        "--config.data.folder.classes=FILE."
    )


def log_passed_over(folder: Path, walk: files.Walk) -> None:
    """Says what a folder of images holds besides images that are read."""
    if walk.others or walk.repeated:
        log.warning("%s: %d images%s", folder, len(walk.found), walk.passed_over())


# ---- Labels --------------------------------------------------------------------------------------


def _by_stem(found: Mapping[str, Path]) -> dict[str, Path]:
    """Returns the files by their path without suffix; UserError where two share one."""
    by_stem: dict[str, Path] = {}
    for name, path in found.items():
        first = by_stem.setdefault(_stem(name), path)
        if first != path:
            raise UserError(f"{first} and {path} share one label; keep one or rename it.")
    return by_stem


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _key(name: str, by_folder: Mapping[str, str]) -> str:
    """Returns what an image and its label have in common: images/Train/a, labels/train/a."""
    first, _, rest = name.partition("/")
    return f"{by_folder.get(first) or (by_folder and _split_of(first)) or first}/{rest}"


def _labels(
    labels: files.Walk, of_image: Mapping[str, str], by_folder: Mapping[str, str], root: Path
) -> dict[str, Path]:
    """Returns the label of each image that has one."""
    label_of: dict[str, Path] = {}
    orphans = []
    _by_stem(labels.found)  # refuses two labels of one image
    for name, path in labels.found.items():
        image = of_image.get(_key(_stem(name), by_folder))
        if image is None:
            orphans.append(name)
        else:
            label_of[image] = path
    if orphans:
        raise UserError(
            f"data.root {root} holds {len(orphans)} labels without image, the first of them "
            f"labels/{orphans[0]}, which belongs to images/{_stem(orphans[0])}.jpg or .png; give "
            "both the same name, or remove the label."
        )
    for name, path in labels.others.items():
        image = of_image.get(_key(_stem(name), by_folder))
        if image is not None and image not in label_of:
            ways = "csc-jax import-annotations turns COCO, LabelMe and CVAT into labels"
            raise UserError(
                f"{path} is no label that is read ({', '.join(files.LABEL_SUFFIXES)} are), and its "
                f"image {image} would count as one without label{labels.passed_over()}. Save "
                f"labels as PNG ({ways}), or move the file elsewhere."
            )
    return label_of


def _meaning(text: str, classes: ClassList, path: Path) -> LabelIds:
    colors: dict[tuple[int, int, int], int] = {}
    for color, class_id in [(c, i) for i, c in classes.colors.items()] + [
        (color, IGNORE) for color in classes.void
    ]:
        if colors.setdefault(color, class_id) != class_id:
            log.warning("%s has %s twice: labels in colour need one each", path, color)
            colors = {}
            break
    ids = label_ids(classes.values | {IGNORE: IGNORE})
    if text:
        ids = label_ids({IGNORE: IGNORE} | _label_values(text, len(classes.names)))
    return dataclasses.replace(
        ids,
        colors=colors,
        palette=classes.colors,
        equal_channels=not classes.colors or bool(text),
        mapped=bool(text),
        unclear="" if text else classes.unclear,
        source=str(path),
    )


def _label_values(text: str, classes: int) -> dict[int, int]:
    """Parses `data.folder.label_values`."""
    values: dict[int, int] = {}
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*:\s*(\d{1,3})\s*", entry, re.ASCII)
        value, class_id = (int(match[1]), int(match[2])) if match else (-1, -1)
        if not 0 <= value <= _LARGEST_VALUE or value in values:
            fault = f"the value {value} twice" if value in values else f"{entry.strip()[:50]!r}"
            raise UserError(
                f"data.folder.label_values is {text[:200]!r}, which holds {fault}; it takes "
                "VALUE:ID with commas between them, such as 0:0,255:1, values up to "
                f"{_LARGEST_VALUE}."
            )
        if class_id >= classes and class_id != IGNORE:
            raise UserError(
                f"data.folder.label_values is {text[:200]!r}, which maps {value} to {class_id}; "
                f"the class list has the ids 0 to {classes - 1}, and {IGNORE} means to ignore."
            )
        values[value] = class_id
    return values


# ---- Splits --------------------------------------------------------------------------------------


def _split_of(folder: str) -> str | None:
    """Returns the split that a folder of this name is, if it is one."""
    name = folder.casefold()
    return _SPLIT_NAMES.get(name) or _SPLIT_NAMES.get(_SPLIT_YEAR.sub("", name))


def _splits_of_folders(images: Mapping[str, Path], root: Path) -> dict[str, str]:
    """Returns the split of each folder below images/; none if they are no splits.

    Raises:
      UserError: images outside the splits, two folders for one split, or splits further down.
    """
    folders = sorted({name.partition("/")[0] for name in images if "/" in name})
    by_folder = {name: split for name in folders if (split := _split_of(name))}
    like = {_SPLIT_NAMES[m[1]]: f for f in folders if (m := _LIKE_SPLIT.search(f.casefold()))}
    if not by_folder and len(like) > 1:
        parts = [f"images/{like[split]} images/{split}" for split in _SPLITS if split in like]
        raise UserError(
            f"data.root {root} has folders that look like splits and are not called so. Call "
            f"{' and '.join(parts)}, or, if they are no splits, by other names; the same in "
            "labels/."
        )
    for name, path in images.items():
        first, *deeper = PurePosixPath(name).parts[:-1] or ("",)
        if by_folder and first not in by_folder:
            raise UserError(
                f"data.root {root} has images/{next(iter(by_folder))}, and so all images must be "
                f"in one of the folders images/{{{','.join(_SPLITS)}}}, but there is {path}."
            )
        for folder in deeper:
            split = _split_of(folder)
            if split and split != by_folder.get(first):
                raise UserError(
                    f"data.root {root} has a folder {folder} below images/{first}, as a split "
                    f"would be called, but there is {path}. Splits are the folders directly below "
                    f"images/: make it images/{folder}/{first}, or give it another name."
                )
    for split in _SPLITS:
        same = [name for name, of in by_folder.items() if of == split]
        if len(same) > 1:
            raise UserError(
                f"data.root {root} has images/{same[0]} and images/{same[1]}, both of them folders "
                f"for the split {split}. Put their images into one."
            )
    if by_folder and not {"train", "val"} <= set(by_folder.values()):
        there = " and ".join(f"images/{name}" for name in by_folder)
        lacking = "train" if "train" not in by_folder.values() else "val"
        raise UserError(
            f"data.root {root} has no images for {lacking}: there is {there}, and so the splits "
            f"are the folders below images/. Add images/{lacking}, or move all images out of them "
            "to have every fifth labelled image drawn for val."
        )
    return by_folder


def _by_folder(pairs: list[Pair], by_folder: Mapping[str, str]) -> dict[str, list[Pair]]:
    splits: dict[str, list[Pair]] = {split: [] for split in _SPLITS}
    for pair in pairs:
        splits[by_folder[pair.id.partition("/")[0]]].append(pair)
    if not splits["test"]:
        del splits["test"]
    return splits


def _drawn(pairs: list[Pair]) -> dict[str, list[Pair]]:
    labeled = [pair for pair in pairs if pair.has_label]
    val = labeled[_VAL_EVERY - 1 :: _VAL_EVERY] or labeled[-1:]
    chosen = {pair.id for pair in val}
    return {"train": [pair for pair in pairs if pair.id not in chosen], "val": val}


def _log_splits(
    splits: Mapping[str, Sequence[Pair]], by_folder: Mapping[str, str], images: int
) -> None:
    counts = {split: len(listed) for split, listed in splits.items()}
    if by_folder:
        parts = [
            f"images/{name} is {split} ({counts[split]})"
            for name, split in by_folder.items()
            if split in counts
        ]
        log.info("Splits: %s", ", ".join(parts))
    else:
        log.info(
            "Splits: no folder is named as one, so every fifth labelled image in the order of the "
            "names is val (%d) and the rest of the %d images is train (%d)",
            *(counts["val"], images, counts["train"]),
        )


def _warn_of_shared(splits: Mapping[str, Sequence[Pair]]) -> None:
    """Warns of train images that are in another split too, under whatever name."""
    by_size: dict[int, list[Pair]] = {}
    for split, pairs in splits.items():
        if split != "train":
            for pair in pairs:
                by_size.setdefault(_size(pair), []).append(pair)
    shared = []
    heads: dict[str, bytes] = {}
    for pair in splits["train"]:
        for other in by_size.get(_size(pair), ()):
            if _same(pair, other, heads):
                shared.append((pair, other))
                break
    if shared:
        pair, other = shared[0]
        log.warning(
            "%d train images are also images of val or test, the first of them %s, which is %s; "
            "the scores say too much as long as they are in both",
            *(len(shared), pair.image, other.image),
        )


def _size(pair: Pair) -> int:
    assert isinstance(pair.image, Path)
    try:
        return pair.image.stat().st_size
    except OSError:
        return -1  # the preparation says so


def _same(one: Pair, other: Pair, heads: dict[str, bytes]) -> bool:
    """Compares the content of two files of one size; first its beginning, which mostly decides."""
    try:
        for pair in (one, other):
            assert isinstance(pair.image, Path)
            if pair.id not in heads:
                with pair.image.open("rb") as file:
                    heads[pair.id] = file.read(_HEAD)
        return heads[one.id] == heads[other.id] and one.original() == other.original()
    except (OSError, ValueError, BadExample):
        return False
