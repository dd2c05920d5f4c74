"""Lists of classes, in the forms that people and programs write them.

`read_classes` says which. A line that it does not understand is an error that shows the line, and
never a name.
"""

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csc_jax.data import files
from csc_jax.data.example import Pair
from csc_jax.data.pascal_voc import colormap
from csc_jax.data.transforms import IGNORE
from csc_jax.errors import UserError

MAX_CLASSES = Pair.INVALID  # the two highest values of a byte stand for "wrong" and "ignore"
_FIELD = "The class list"
_WAY_OUT = (
    "It takes one class name a line, with its colour behind it or without (road 128 64 128 or road "
    '#804080), or as JSON a list of names or of {"name": …, "color": [R, G, B]}; docs/data.md '
    "lists the other forms that are read."
)

_LONGEST = 200  # characters of a line that an error shows
_LONGEST_LINE = 2000  # characters; on much longer ones the patterns below take minutes

_Color = tuple[int, int, int]


class ClassList(NamedTuple):
    """What a class list says.

    Attributes:
      names: C names in the order of the class ids.
      palette: (C, 3) uint8 RGB; a class without a colour has Pascal VOC's.
      colors: the colours that the list gives, by class id.
      void: colours of pixels to ignore.
      values: class id, or 255, of each value that a label may hold.
      unclear: why `values` is a guess, "" if it is none: an ignored entry stands before a class and
        the lines have no ids, so that the values may count it or not.
    """

    names: tuple[str, ...]
    palette: np.ndarray
    colors: dict[int, _Color]
    void: tuple[_Color, ...]
    values: dict[int, int]
    unclear: str


class _Entry(NamedTuple):
    name: str
    color: _Color | None = None

    @property
    def is_void(self) -> bool:
        """Whether it is no class; a bare `void` may be one, and is."""
        name = self.name.casefold()
        return name == _IGNORE or (name in _VOID and self.color is not None)


_IGNORE = "__ignore__"  # labelme's, which has no id and stands before id 0
_VOID = ("void", "ignore", "ignored")


def read_classes(path: Path) -> ClassList:
    """Reads a class list.

    A text file has one class a line, in one of these forms: `NAME`, `NAME R G B`, `NAME,R,G,B`,
    `NAME #RRGGBB`, `R G B NAME`, each of them behind an id if every line has one (`0: NAME`); the
    labelmap of CVAT (`NAME:R,G,B:PARTS:ACTIONS`), the labels.txt of labelme, or CSV with a header.
    A JSON file holds a list of names or of {"name": …, "color": [R, G, B]}.

    Blank lines and lines that begin with "#" are left out. A line `void R G B` (or ignore) names a
    colour to ignore, as does labelme's `__ignore__`; it is no class.

    Raises:
      UserError: if the file cannot be read, holds a line that is none of this, or names no class,
        too many, or one of them twice.
    """
    text = files.read_text(path, _FIELD)
    try:
        read = _from_json if path.suffix.lower() == ".json" else _from_lines
        entries, numbered = read(text)
        for entry in entries:
            _check_name(entry.name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(f"{_FIELD} {path} cannot be read ({error}). {_WAY_OUT}") from error
    classes = [entry for entry in entries if not entry.is_void]
    void = [entry for entry in entries if entry.is_void]
    names = tuple(unicodedata.normalize("NFC", entry.name) for entry in classes)
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice or not 2 <= len(names) <= MAX_CLASSES:
        one = f"1 class, {names[0][:_LONGEST]!a}" if names else ""
        fault = one if len(names) == 1 else f"{len(names)} classes"
        fault = f"{twice[0]!r} twice" if twice else fault
        raise UserError(
            f"{_FIELD} {path} holds {fault}; it takes 2 to {MAX_CLASSES} different names, one a "
            "line."
        )
    palette = colormap()[: len(names)]
    colors = {i: entry.color for i, entry in enumerate(classes) if entry.color}
    for i, color in colors.items():
        palette[i] = color
    counted = [entry for entry in entries if entry.name.casefold() != _IGNORE]
    ids = {id(entry): i for i, entry in enumerate(classes)}
    unclear = ""
    if not numbered and any(entry.is_void for entry in counted[: len(classes)]):
        unclear = (
            f"{path} has a line for pixels to ignore before that of a class, so that the ids may "
            "count it or not. Move it to the end, or give every line its id (0: NAME R G B)"
        )
    return ClassList(
        names,
        palette,
        colors,
        tuple(entry.color for entry in void if entry.color),
        {value: ids.get(id(entry), IGNORE) for value, entry in enumerate(counted)},
        unclear,
    )


def _check_name(name: str) -> None:
    # JSON can hold halves of characters, which nothing can print.
    if not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise ValueError(f"{name!a} is no name")


# ---- Text ----------------------------------------------------------------------------------------

_HEX = re.compile(r"(.+?)[\s,;]+#([0-9a-fA-F]{6})")
_RGB = re.compile(r"(.+?)[\s,;:]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+)")
_RGB_FIRST = re.compile(r"(\d+)[\s,;]+(\d+)[\s,;]+(\d+)[\s,;:]+(\D.*)")
_NUMBERED = re.compile(r"(\d+)(?:\s*[:=,;.)\t]\s*|\s+)(\S.*)")
_CVAT = re.compile(r"([^#][^:]*):(?:(\d+),(\d+),(\d+))?:[^:]*:[^:]*")
# What stands at the ends of lines of other forms: JSON, YAML, Python, INI, HTML.
_OTHER = re.compile(r"[\[\]{}<>\"'%@*=|&!?`(),;:-].*|.*[\[\]{}<>\"'=|`,;:]|.*[:=,;]\s*\d+")
# What stands behind a name and is no colour that is read: more or other numbers than three of 0 to
# 255 (0.5 0.5 0.5, -1 0 0, rgb(1,2,3), 1|2|3), other forms of hexadecimal, a comment.
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_BEHIND = re.compile(
    rf".*[\s,;:|(]{_NUMBER}(?:[\s,;:|]+{_NUMBER}){{2,}}\W*"
    r"|.*[\s,;:|](?:#|0x)(?:[0-9a-f]{3,4}|[0-9a-f]{6}|[0-9a-f]{8})|//.*|.*\s(?:#|//)\s.*",
    re.IGNORECASE,
)
_END_NUMBER = re.compile(rf"(.*)[\s,;:|](?:{_NUMBER}|[0-9a-fA-F]{{6}})")
_HEADERS = {
    "name": (
        *("name", "names", "class", "classes", "label", "labels", "category"),
        *("class_name", "classname", "class name", "label_name"),
    ),
    "id": (
        "id",
        "idx",
        "index",
        "value",
        "class_id",
        "label_id",
        "number",
        "class id",
        "pixel value",
    ),
    "red": ("r", "red"),
    "green": ("g", "green"),
    "blue": ("b", "blue"),
    "color": ("color", "colour", "hex", "rgb", "color_rgb"),
}


def _from_lines(text: str) -> tuple[list[_Entry], bool]:
    """Returns the entries, and whether they are in the order of ids that the file gives them."""
    lines = [line.strip() for line in text.split("\n")]
    kept = [line for line in lines if line and not line.startswith("#")]
    if not kept:
        return [], False
    long = [line for line in kept if len(line) > _LONGEST_LINE]
    if long:
        raise ValueError(f"the line {long[0][:_LONGEST]!a}… has {len(long[0])} characters")
    cvat = [_CVAT.fullmatch(line) for line in kept]
    if all(cvat):
        return [_Entry(m[1].strip(), _color(m.groups()[1:])) for m in cvat if m], False
    if columns := _header(kept[0]):
        return _from_csv(kept[1:], *columns)
    if all(_RGB_FIRST.fullmatch(line) for line in kept):
        return [_entry(line) for line in kept], False
    numbered = [match for line in kept if (match := _NUMBERED.fullmatch(line))]
    if len(numbered) == len(kept) and not all(_NUMBERED.fullmatch(m[2]) for m in numbered):
        entries = _in_order([(_whole(m[1]), _entry(m[2])) for m in numbered], kept)
        _check_ends(entries, kept)
        return entries, True
    if numbered:
        fault = (
            "more numbers than an id"
            if len(numbered) == len(kept)
            else "a number, and others do not"
        )
        raise ValueError(f"the line {numbered[0][0]!a} begins with {fault}")
    entries = [_entry(line) for line in kept]
    _check_ends(entries, kept)
    return entries, False


def _check_ends(entries: Sequence[_Entry], lines: Sequence[str]) -> None:
    ends = [_END_NUMBER.fullmatch(entry.name) for entry in entries]
    # "class 1" and "class 2" are names; "sky 1" and "road 2" are names with their ids.
    if len(ends) > 1 and all(ends) and len({m[1] for m in ends if m}) == len(ends):
        raise ValueError(f"the line {lines[0]!a} holds a number that is neither name nor colour")


def _entry(line: str) -> _Entry:
    if match := _HEX.fullmatch(line):
        red, green, blue = bytes.fromhex(match[2])
        entry = _Entry(match[1].strip(), (red, green, blue))
    elif match := _RGB_FIRST.fullmatch(line):
        entry = _Entry(match[4].strip(), _color(match.groups()[:3]))
    elif match := _RGB.fullmatch(line):
        entry = _Entry(match[1].strip(), _color(match.groups()[1:]))
    else:
        entry = _Entry(line)
    if _OTHER.fullmatch(entry.name) or _BEHIND.fullmatch(entry.name):
        raise ValueError(f"the line {line!a} is no name with or without a colour")
    return entry


def _in_order(numbered: Sequence[tuple[int, _Entry]], lines: Sequence[str]) -> list[_Entry]:
    """Sorts by id, 255 last: it is that of pixels to ignore in any list."""
    known = [(n, e, line) for (n, e), line in zip(numbered, lines, strict=True) if n != IGNORE]
    known.sort(key=lambda item: item[0])
    for expected, (number, _, line) in enumerate(known):
        if number != expected:
            raise ValueError(
                f"the line {line!a} has the id {number} where {expected} is expected; ids start at "
                "0 and leave none out"
            )
    ignored = [entry for number, entry in numbered if number == IGNORE]
    for entry in ignored:
        if not entry.is_void and entry.name.casefold() not in _VOID:
            raise ValueError(f"the class {entry.name!a} has the id 255, that of pixels to ignore")
    return [entry for _, entry, _ in known] + [entry for entry in ignored if entry.is_void]


def _header(line: str) -> tuple[dict[str, int], str] | None:
    """Returns the columns of a table by their meaning, and what is between them, if it is one."""
    for separator in ",;\t":
        titles = [title.strip().strip('"').casefold() for title in line.split(separator)]
        columns = {
            meaning: titles.index(title)
            for meaning, known in _HEADERS.items()
            for title in known
            if title in titles
        }
        if "name" in columns and len(titles) > 1:
            if len(columns) > 1:
                return columns, separator
            raise ValueError(f"the line {line!a} is a header without a column for id or colour")
    words = line.strip('"').casefold().split()
    if len(words) > 1 and all(any(word in known for known in _HEADERS.values()) for word in words):
        raise ValueError(f"the line {line!a} looks like a header; put commas between its columns")
    if line.strip('"').casefold() in (*_HEADERS["name"], *_HEADERS["id"]):
        raise ValueError(f"the line {line!a} looks like a header; remove it")
    return None


def _from_csv(
    lines: list[str], columns: dict[str, int], separator: str
) -> tuple[list[_Entry], bool]:
    numbered, entries = list[tuple[int, _Entry]](), list[_Entry]()
    for line in lines:
        (row,) = csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True)
        if len(row) <= max(columns.values()):
            raise ValueError(f"the line {line!a} has fewer columns than the header")
        cells = {meaning: row[column].strip() for meaning, column in columns.items()}
        try:
            entry = _Entry(cells["name"], _cell_color(cells))
            _check_name(entry.name)
            number = _whole(cells["id"]) if "id" in cells else None
        except ValueError as error:
            raise ValueError(f"the line {line!a}: {error}") from error
        entries.append(entry)
        if number is not None:
            numbered.append((number, entry))
    return (_in_order(numbered, lines), True) if numbered else (entries, False)


def _cell_color(cells: Mapping[str, str]) -> _Color | None:
    if {"red", "green", "blue"} <= cells.keys():
        return _color([cells[c] for c in ("red", "green", "blue")])
    if not cells.get("color"):
        return None
    color = _entry(f"x {cells['color'].strip('[]() ')}").color
    if color is None:
        raise ValueError("it holds no colour such as 128 64 128 or #804080")
    return color


def _whole(text: object) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", str(text)):
        raise ValueError(f"{str(text)[:50]!a} is no whole number")
    return int(str(text))


# ---- JSON ----------------------------------------------------------------------------------------


def _from_json(text: str) -> tuple[list[_Entry], bool]:
    listed, entries = json.loads(text), list[_Entry]()
    if not isinstance(listed, list):
        raise ValueError(f"it holds a {type(listed).__name__}, not a list")
    for entry in listed:
        if isinstance(entry, str):
            entries.append(_Entry(entry))
        else:
            color = entry.get("color")
            entries.append(_Entry(str(entry["name"]), None if color is None else _color(color)))
    return entries, False


def _color(values: Iterable[object]) -> _Color | None:
    """Returns three numbers, or None if all of them are; they come as text or as numbers."""
    color = tuple(values)
    if color == (None, None, None):
        return None
    if len(color) == 3 and all(isinstance(v, str) for v in color):
        color = tuple(_whole(v) for v in color)
    if len(color) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in color):
        raise ValueError(f"{color} is no colour; it takes three whole numbers, 0 to 255")
    red, green, blue = color
    return red, green, blue  # type: ignore[return-value]
