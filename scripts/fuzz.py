"""Feeds the readers of the user's files with hostile input; anything but a UserError is a crash.

Command:    python scripts/fuzz.py [--examples=6000] [--seed=0]
Run time:   3 minutes on one core

Split lists, lists of Pascal VOC, class lists and label PNGs, made by hypothesis: arbitrary bytes,
and well-formed files with their parts exchanged, repeated, cut off or turned. A crash is shown with
the smallest input that causes it, and one seed makes the same inputs again. Exit status 0 if there
was none.
"""

import argparse
import io
import json
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.data import example, folder, pascal_voc
from csc_jax.errors import UserError

Reader = Callable[[Path, bytes], None]

IDS = tuple(f"{where}/ä {i}" for where in ("train", "..", "/etc") for i in range(6))
_CONFIG = config_lib.default_config().data
SIZE = (5, 7)  # (height, width) px of the image that a label belongs to


def run() -> int:
    """Fuzzes every reader; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=6000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total = 0
    for name in READERS:
        started = time.perf_counter()
        counts = fuzz(name, options.examples, options.seed)
        total += sum(counts.values())
        seconds = time.perf_counter() - started
        print(f"{name:<14} {counts['read']:6d} read  {counts['refused']:6d} refused", end="")
        print(f"  {seconds:6.1f} s", flush=True)
    print(f"{total} inputs, no crash")
    return 0


def fuzz(name: str, examples: int, seed: int = 0, reader: Reader | None = None) -> dict[str, int]:
    """Gives a reader, by default its own, `examples` inputs of a kind, a key of `READERS`.

    Returns:
      How many were "read" and how many "refused", by a UserError or a BadExample.

    Raises:
      Exception: whatever else the reader raised, on the smallest input found.
    """
    own, inputs = READERS[name]
    read = reader or own
    counts = {"read": 0, "refused": 0}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs)
    def body(content: bytes) -> None:
        try:
            read(Path(scratch), content)
            counts["read"] += 1
        except (UserError, example.BadExample):
            counts["refused"] += 1

    with tempfile.TemporaryDirectory() as scratch:
        body()
    return counts


# ---- Readers -------------------------------------------------------------------------------------


def read_split_list(scratch: Path, content: bytes) -> None:
    """A list of labelled images, and the partition that it makes."""
    source = data.Source(IDS, SIZE, (), frozenset(IDS[:2]))
    dataset = data.Dataset("fuzzed", ("a",), np.zeros((1, 3), np.uint8), {"train": source})
    path = scratch / "labeled.txt"
    path.write_bytes(content)
    config = _CONFIG.copy_and_resolve_references()
    config.labeled_list = str(path)
    lists = data.partition(config, dataset, seed=0)
    assert sorted(lists.labeled + lists.unlabeled) == sorted(IDS)


def read_voc_list(scratch: Path, content: bytes) -> None:
    """The train list of a Pascal VOC, and the files that it names."""
    lists = scratch / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "val.txt").write_text("2008_000001\n")
    (lists / "train.txt").write_bytes(content)
    config = _CONFIG.copy_and_resolve_references()
    config.root, config.pascal_voc.pool = str(scratch), "classic"
    for pair in pascal_voc.find(config).splits["train"]:
        assert isinstance(pair, example.Pair)
        for file in (pair.image, pair.label):
            assert isinstance(file, Path)
            assert file.parent in (scratch / "JPEGImages", scratch / "SegmentationClass")
        pair.fingerprint()


def read_class_list(scratch: Path, content: bytes) -> None:
    """Both kinds of class list; the first byte says which."""
    path = scratch / ("classes.json" if content[:1] in b"[{" else "classes.txt")
    path.write_bytes(content)
    names, palette = folder.read_classes(path)
    assert palette.shape == (len(names), 3)
    assert len(set(names)) == len(names)
    json.dumps(names).encode()
    "".join(names).encode()


def read_label(scratch: Path, content: bytes) -> None:
    """A label beside a good image."""
    image, label = scratch / "image.png", scratch / "label.png"
    if not image.exists():
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(image)
    label.write_bytes(content)
    table = example.label_ids({0: 0, 1: 1, 2: 2, 255: 255})
    classes = example.Pair("fuzzed", image, label, table).read()[1]
    assert classes.shape == SIZE
    assert classes.dtype == np.uint8
    assert set(np.unique(classes)) <= {0, 1, 2, 255}


# ---- Inputs --------------------------------------------------------------------------------------

_KNOWN = st.sampled_from(IDS[2:])
_NAMES = st.one_of(
    st.sampled_from(IDS),
    st.sampled_from(["..", "/", "../../etc/passwd", "/etc/passwd", "C:\\x", "\0", "~", "a" * 300]),
    st.text(max_size=20),
)
_LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n", " \t\n", "\u2028", "\v"])


@st.composite
def _mutated(draw: Any, contents: st.SearchStrategy[bytes]) -> bytes:
    """Files with bytes turned, cut off, repeated or put in; a third of them as they were."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 5]))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["turn", "cut", "repeat", "insert"]))
        if kind == "turn" and place < len(content):
            content[place] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, 40))]
        elif kind == "repeat":
            content[place:place] = content[place : place + draw(st.integers(1, 40))]
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=8))
    return bytes(content)


@st.composite
def _lists(draw: Any) -> bytes:
    """Lines of ids that are known, unknown, or paths out of the data set."""
    names = draw(st.sampled_from([_NAMES, _KNOWN, _KNOWN]))
    lines = draw(st.lists(names, max_size=8, unique=draw(st.booleans())))
    end = draw(_LINE_ENDS)
    start = draw(st.sampled_from(["", "", "\ufeff"]))
    return (start + end.join(lines) + end).encode(errors="surrogatepass")


_NUMBERS = st.one_of(st.integers(0, 255), st.integers())
_DIGITS = st.one_of(_NUMBERS.map(str), st.just("9" * 5000))  # more than Python makes an int of
_COLORS = st.builds(
    lambda values, between: between.join(values),
    st.lists(_DIGITS, min_size=2, max_size=4),
    st.sampled_from([" ", ",", ", "]),
)
_HEX = st.builds(lambda text: f"#{text}", st.text("0123456789abcdefG", min_size=5, max_size=7))
_CLASS_LINES = st.builds(
    lambda lines, end: end.join(lines).encode(errors="surrogatepass"),
    st.lists(st.builds("{} {}".format, _NAMES, st.one_of(_COLORS, _HEX, st.just(""))), max_size=8),
    _LINE_ENDS,
)
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), _NUMBERS,
              st.text(st.characters(), max_size=9)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["name", "color", "x"]), inner, max_size=3),
    ),
    max_leaves=12,
)  # fmt: skip
_CLASS_ENTRY = st.one_of(
    st.text(min_size=1, max_size=9),
    st.fixed_dictionaries(
        {"name": st.text(max_size=9)},
        optional={"color": st.lists(st.integers(-1, 256), min_size=3, max_size=4)},
    ),
)
_CLASS_ENTRIES = st.one_of(
    st.lists(_CLASS_ENTRY, min_size=2, max_size=6),
    st.lists(st.one_of(_CLASS_ENTRY, _JSON), max_size=6),
)
_DEEP = st.integers(0, 100_000).map(lambda depth: b"[" * depth)
_CLASS_JSON = st.one_of(
    st.one_of(_JSON, _CLASS_ENTRIES).map(lambda value: json.dumps(value).encode()), _DEEP
)


@st.composite
def _pngs(draw: Any) -> bytes:
    """Label files of every mode, of the right size or not, and their header changed."""
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]))
    height, width = draw(
        st.sampled_from([SIZE, SIZE, SIZE, SIZE[::-1]]) | st.tuples(*[st.integers(1, 9)] * 2)
    )
    values = draw(st.sampled_from([(0, 1, 2), (0, 1, 2, 255), (0, 3), range(250)]))
    choice = np.frombuffer(draw(st.binary(min_size=16, max_size=16)), np.uint8) % len(values)
    pixels = np.resize(np.array(values, np.uint8)[choice], (height, width))
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * draw(st.sampled_from([1, 1, 257])))
    elif mode == "P":
        image = Image.fromarray(pixels)
        image.putpalette(list(range(256)) * 3)
    else:
        image = Image.fromarray(pixels).convert(mode)
    stream = io.BytesIO()
    image.save(stream, draw(st.sampled_from(["PNG"] * 9 + ["TIFF"])))
    content = stream.getvalue()
    if draw(st.integers(0, 4)) == 0 and content.startswith(b"\x89PNG"):
        content = draw(_with_new_header(content))
    return content


@st.composite
def _with_new_header(draw: Any, content: bytes) -> bytes:
    """Another size, depth or kind of colour, with the right checksum."""
    side = st.one_of(st.integers(0, 9), st.sampled_from([2**15, 2**31 - 1, 2**32 - 1]))
    header = b"IHDR" + struct.pack(
        ">IIBBBBB",
        *(draw(side), draw(side), draw(st.sampled_from([1, 2, 4, 8, 16, 3]))),
        *(draw(st.integers(0, 7)), 0, 0, draw(st.integers(0, 2))),
    )
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


_ANYTHING = st.binary(max_size=200)
READERS: dict[str, tuple[Reader, st.SearchStrategy[bytes]]] = {
    "split list": (read_split_list, st.one_of(_mutated(_lists()), _lists(), _ANYTHING)),
    "VOC list": (read_voc_list, st.one_of(_mutated(_lists()), _lists(), _ANYTHING)),
    "class list": (
        read_class_list,
        st.one_of(
            *(_CLASS_LINES, _mutated(_CLASS_LINES), _CLASS_JSON, _mutated(_CLASS_JSON), _ANYTHING)
        ),
    ),
    "label PNG": (read_label, st.one_of(_mutated(_pngs()), _pngs(), _ANYTHING)),
}


if __name__ == "__main__":
    sys.exit(run())
