"""Lists of images as people publish them: which ids of a data set their lines mean.

UniMatch writes two columns (`JPEGImages/ID.jpg SegmentationClass/ID.png`), CPS paths with tabs
between them, SegNet paths of its authors' machine; others ids alone, or file names, with the
separators of Windows. All of them name the image first.
"""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from csc_jax import paths
from csc_jax.data import files

_SUFFIXES = "|".join(re.escape(suffix) for suffix in files.IMAGE_SUFFIXES)
_FIRST_PATH = re.compile(rf"(.+?(?:{_SUFFIXES}))[\"']?(?:[\s,;|].*)?", re.IGNORECASE)
_END = re.compile(rf"(_leftImg8bit)?({_SUFFIXES})?$", re.IGNORECASE)  # Cityscapes' and any
_ANY_SUFFIX = files.IMAGE_SUFFIXES[0]
_ROOTS = ("images", "leftimg8bit", "jpegimages")  # what data sets keep their images in
_TRAIN = re.compile(r"train(ing)?([-_]?\d{4})?", re.IGNORECASE)
_OTHER_SPLIT = re.compile(r"train_extra|(val(id(ation)?)?|test(ing)?)([-_]?\d{4})?", re.IGNORECASE)

_MOST = 1 << 13  # characters of a line: two paths as long as a system takes them

_Name = tuple[str, ...]  # parts of a path below the folder of the images, without suffix


class Ids:
    """The ids of one or more splits, by everything that a line may call them.

    A line means an image if both are one path below the folder of the images (`images`,
    `leftImg8bit`, `JPEGImages`), suffixes aside; if the line has the last parts of such a path, and
    no other image ends in them; or if it has more folders at its beginning, as an absolute path
    does, of which the last one that is named as a split is train.
    """

    def __init__(self, ids: Iterable[str]):
        self._ids = {_composed(name): name for name in ids}
        self._names: dict[_Name, str] = {}
        self._ends: dict[_Name, str | None] = {}  # None where several images end so
        # As they are, and then without a suffix of their own, where they have one.
        for end in (_ANY_SUFFIX, ""):
            for of in self._ids.values():
                self._add(_name(of + end), of)

    def _add(self, name: _Name, of: str) -> None:
        self._names.setdefault(name, of)
        for start in range(1, len(name)):
            end = name[start:]
            self._ends[end] = None if self._ends.get(end, of) != of else of

    def find(self, line: str) -> str | None:
        """Returns the id that a line means, None if it means none or may mean several."""
        if len(line) > _MOST:
            return None
        line = _composed(line)
        for text in (line, line.strip()):
            if text in self._ids:
                return self._ids[text]
        for column, is_certain in _first_columns(line.strip()):
            if found := self._ids.get(column) or self._find(_name(column), is_certain):
                # Another image behind it is a second id, or a label that is not this image's.
                rest = line.strip().removeprefix('"').removeprefix("'")[len(column) :]
                label = re.split(r"[\s,;|]", rest.strip("\"'"), maxsplit=1)[-1].strip("\"' \t,;|")
                whole = self._find(_name(label), True)  # its name may hold blanks as well
                if whole is None:
                    parts = re.split(r"[\s,;|]+", rest)
                    named = {self._find(_name(text.strip("\"'")), True) for text in parts}
                else:
                    named = {whole}
                return found if named <= {None, found} else None
        return None

    def is_ambiguous(self, line: str) -> bool:
        """Whether a line that `find` has no id for is the end of several images' paths."""
        name = _name(line.strip()) if len(line) <= _MOST else ()
        return self._ends.get(name, "") is None

    def _find(self, name: _Name, may_have_more: bool) -> str | None:
        if found := self._names.get(name) or self._ends.get(name):
            return found
        foreign = False
        for start in range(1, len(name) if may_have_more else 0):
            folder = name[start - 1]
            foreign = not _TRAIN.fullmatch(folder) and (
                foreign or _OTHER_SPLIT.fullmatch(folder) is not None
            )
            if not foreign and name[start:] in self._names:
                return self._names[name[start:]]
        return None


def read_lines(path: str, field: str) -> list[str]:
    """Returns the lines of a list that are not blank; UserError if it cannot be read as text."""
    text = files.read_text(paths.given(field, path), field)
    return [line for line in text.split("\n") if line.strip()]


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _first_columns(line: str) -> list[tuple[str, bool]]:
    """Returns what may be the first column, without quotes, and whether it is no more than that.

    Names may hold blanks, so that a column ends for certain only behind the suffix of an image.
    """
    if match := _FIRST_PATH.fullmatch(line):
        columns = [match[1]]
    else:
        columns = [
            line.split()[0] if line.split() else "",
            re.split(r"[\t,;|]", line, maxsplit=1)[0],
        ]
        # "photo (1)" is no second column behind "photo", but "a/1 b/1" are two.
        if not re.search(r"[\s,;|].*[/\\]", line):
            columns = [line, *reversed(columns)]
    certain = match is not None
    return [(column.strip().strip("\"'"), certain or " " not in column) for column in columns]


def _name(text: str) -> _Name:
    parts = PurePosixPath(_composed(text).replace("\\", "/")).parts
    kept = [part for part in parts if part not in ("/", "//")]
    roots = [i for i, part in enumerate(kept[:-1]) if part.casefold() in _ROOTS]
    kept = kept[roots[-1] + 1 :] if roots else kept
    if not kept:
        return ()
    return (*kept[:-1], _END.sub("", kept[-1], count=1))
