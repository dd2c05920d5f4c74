"""A data set of the user's own: `images/`, `labels/` and a list of classes.

The label of `images/PATH.jpg` (or .png) is `labels/PATH.png`, whose values, or palette indices, are
class ids from 0 and 255 for pixels to ignore. Classes stand in `classes.txt`, one name a line with
an optional colour behind it (`road 128 64 128` or `road #804080`), or in `classes.json`, a list of
names or of {"name": …, "color": [R, G, B]}.

Where `images/train` is there, `train`, `val` and, if there, `test` below `images/` are the splits.
Else every fifth labelled image in name order is val and all others are train. A train image
without label is an unlabelled one.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from csc_jax.data import files
from csc_jax.data.example import Listing, Pair, check_splits, label_ids
from csc_jax.data.pascal_voc import colormap
from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError

_SPLITS = ("train", "val", "test")
_LISTS = ("classes.txt", "classes.json")
_VAL_EVERY = 5
_MAX_CLASSES = Pair.INVALID  # the two highest values of a byte stand for "wrong" and "ignore"


def find(config: ConfigDict) -> Listing:
    """Lists the pairs of each split in name order.

    Ids are image paths relative to `images/`, without suffix: `train/berlin/0001`.

    Args:
      config: the `data` part of the configuration.

    Raises:
      UserError: for a missing folder or class list, a split without images or labels, a label
        without image, or images that share a label.
    """
    root = files.existing_root(config.root, "images/, labels/ and classes.txt or classes.json")
    names, palette = read_classes(_class_list(root, config.folder.classes))
    images = _by_id(root / "images", files.IMAGE_SUFFIXES)
    labels = _by_id(root / "labels", (".png",))
    orphans = sorted(labels.keys() - images.keys())
    if orphans:
        raise UserError(
            f"data.root {root} holds {len(orphans)} labels without image, the first of them "
            f"labels/{orphans[0]}.png, which belongs to images/{orphans[0]}.jpg or .png; give both "
            "the same name, or remove the label."
        )
    table = label_ids({**{i: i for i in range(len(names))}, IGNORE: IGNORE})
    pairs = [Pair(name, image, labels.get(name), table) for name, image in images.items()]
    splits = _by_folder(pairs, root) if (root / "images" / "train").is_dir() else _drawn(pairs)
    check_splits(splits, config.root, "images/**/*.jpg or .png with labels/**/*.png")
    for split, listed in splits.items():
        missing = [pair for pair in listed if not pair.has_label]
        if missing and (split != "train" or len(missing) == len(listed)):
            raise UserError(
                f"data.root {root} has no label labels/{missing[0].id}.png ({len(missing)} of the "
                f"{len(listed)} images of {split} lack theirs); only train images may be without, "
                "and not all of them."
            )
    return Listing(names, palette, splits)


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Reads a class list.

    Returns:
      C names and the palette, (C, 3) uint8 RGB; a class without a colour has Pascal VOC's.

    Raises:
      UserError: if the file cannot be read, or names no class, too many, or one of them twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = _from_json(text) if path.suffix == ".json" else _from_lines(text)
        names = tuple(name for name, _ in entries)
        "".join(names).encode()  # JSON can hold halves of characters, which nothing can print
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The class list {path} cannot be read ({error}); it takes one class name a line, or "
            'as JSON a list of names or of {"name": …, "color": [R, G, B]}.'
        ) from error
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice or not 2 <= len(names) <= _MAX_CLASSES:
        fault = f"{twice[0]!r} twice" if twice else f"{len(names)} classes"
        raise UserError(
            f"The class list {path} holds {fault}; it takes 2 to {_MAX_CLASSES} different names."
        )
    palette = colormap()[: len(names)]
    for i, (_, color) in enumerate(entries):
        if color is not None:
            palette[i] = color
    return names, palette


def _class_list(root: Path, given: str) -> Path:
    if given:
        return Path(given).expanduser()
    for name in _LISTS:
        if (root / name).is_file():
            return root / name
    raise UserError(
        f"data.root {root} has no class list, {' or '.join(_LISTS)}; write one class name a line, "
        "in the order of the label values from 0, or name the file with "
        "--config.data.folder.classes=FILE."
    )


_Entry = tuple[str, tuple[int, ...] | None]


def _from_lines(text: str) -> list[_Entry]:
    entries: list[_Entry] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if match := re.fullmatch(r"(.+?)\s+#([0-9a-fA-F]{6})", line):
            entries.append((match[1], tuple(bytes.fromhex(match[2]))))
        elif match := re.fullmatch(r"(.+?)\s+(\d+)[\s,]+(\d+)[\s,]+(\d+)", line):
            entries.append((match[1], _color(map(int, match.groups()[1:]))))
        else:
            entries.append((line, None))
    return entries


def _from_json(text: str) -> list[_Entry]:
    listed, entries = json.loads(text), list[_Entry]()
    if not isinstance(listed, list):
        raise ValueError(f"it holds a {type(listed).__name__}, not a list")
    for entry in listed:
        if isinstance(entry, str):
            entries.append((entry, None))
        else:
            color = entry.get("color")
            entries.append((str(entry["name"]), None if color is None else _color(color)))
    return entries


def _color(values: Iterable[int]) -> tuple[int, ...]:
    color = tuple(values)
    if len(color) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in color):
        raise ValueError(f"{color} is no colour; it takes three whole numbers, 0 to 255")
    return color


def _by_id(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"data.root {folder.parent} has no folder {folder.name}.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        # macOS leaves files such as "._a.png" beside "a.png".
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {path} share one label; keep one or rename it.")
        found[name] = path
    return found


def _by_folder(pairs: list[Pair], root: Path) -> dict[str, list[Pair]]:
    splits: dict[str, list[Pair]] = {split: [] for split in _SPLITS}
    for pair in pairs:
        split = pair.id.partition("/")[0]
        if split not in splits or "/" not in pair.id:
            raise UserError(
                f"data.root {root} has images/train, and so all images must be in one of the "
                f"folders images/{{{','.join(_SPLITS)}}}, but there is {pair.image}."
            )
        splits[split].append(pair)
    if not splits["test"]:
        del splits["test"]
    return splits


def _drawn(pairs: list[Pair]) -> dict[str, list[Pair]]:
    labeled = [pair for pair in pairs if pair.has_label]
    val = labeled[_VAL_EVERY - 1 :: _VAL_EVERY] or labeled[-1:]
    chosen = {pair.id for pair in val}
    return {"train": [pair for pair in pairs if pair.id not in chosen], "val": val}
