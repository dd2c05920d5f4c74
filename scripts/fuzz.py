"""Feeds the readers of the user's files with hostile input; anything but a UserError is a crash.

Command:    python scripts/fuzz.py [--examples=3750] [--seed=0]
Run time:   7 minutes on half a core

Split lists, lists of Pascal VOC, class lists, values of labels, label files, colour masks, images
of 8 bits and of bands, annotation files and files of weights, made by hypothesis: arbitrary bytes,
and well-formed files with their parts exchanged, repeated, cut off or turned. A crash is shown with
the smallest input that causes it, and one seed makes the same inputs again. Exit status 0 if there
was none.
"""

import argparse
import io
import json
import pickle
import pickletools
import shutil
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.commands.import_annotations import import_annotations
from csc_jax.data import class_list, codec, example, folder, pascal_voc, raster
from csc_jax.errors import UserError
from csc_jax.models import weight_files

Reader = Callable[[Path, bytes], None]

IDS = tuple(f"{where}/ä {i}" for where in ("train", "..", "/etc") for i in range(6))
_CONFIG = config_lib.default_config().data
SIZE = (5, 7)  # (height, width) px of the image that a label belongs to


def run() -> int:
    """Fuzzes every reader; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=3750, help="for each reader")
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
      How many were "read" and how many "refused", by the project's own errors.

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
        except (UserError, example.BadExample, codec.Unusable):
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
    names, palette, colors, _, values, _ = class_list.read_classes(path)
    assert palette.shape == (len(names), 3)
    assert all(tuple(palette[i]) == color for i, color in colors.items())
    assert set(range(len(names))) <= set(values.values()) <= {*range(len(names)), 255}
    assert len(set(names)) == len(names)
    json.dumps(names).encode()
    "".join(names).encode()


def read_label_values(scratch: Path, content: bytes) -> None:
    """The field that maps stored values to ids."""
    path = scratch / "classes.txt"
    if not path.exists():
        path.write_text("a\nb\n")
    meaning = folder._meaning(content.decode(errors="replace"), class_list.read_classes(path), path)
    assert set(np.unique(meaning.table)) <= {0, 1, 254, 255}


def read_label(scratch: Path, content: bytes) -> None:
    """A label beside a good image."""
    table = example.label_ids({0: 0, 1: 1, 2: 2, 255: 255})
    _read_label(scratch, content, table)


def read_color_mask(scratch: Path, content: bytes) -> None:
    """A label in colours, or with a palette, beside a good image."""
    path = scratch / "classes.txt"
    if not path.exists():
        path.write_text("a 0 0 0\nb 1 1 1\nc 2 2 2\nvoid 255 255 255\n")
    _read_label(scratch, content, folder._meaning("", class_list.read_classes(path), path))


def _read_label(scratch: Path, content: bytes, meaning: example.LabelIds) -> None:
    image, label = scratch / "image.png", scratch / "label.png"
    if not image.exists():
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(image)
    label.write_bytes(content)
    classes = example.Pair("fuzzed", image, label, meaning).read()[1]
    assert classes.shape == SIZE
    assert classes.dtype == np.uint8
    assert set(np.unique(classes)) <= {0, 1, 2, 255}


def read_image(scratch: Path, content: bytes) -> None:
    """An image; what is kept as it is has to decode to the same later."""
    del scratch
    photo = codec.decode_photo(content, 0 if len(content) % 2 else 16)
    assert photo.pixels.dtype == np.uint8
    assert photo.pixels.shape[2:] == (3,)
    if photo.as_stored:
        kept = codec.decode_image(content)
        assert kept is not None
        assert (kept == photo.pixels).all()


def read_bands(scratch: Path, content: bytes) -> None:
    """An image that keeps its values, of as many bands as its length says."""
    del scratch
    bands = (1, 3, 2, 4, 5)[len(content) % 5]
    pixels = raster.decode(content, bands).pixels
    assert pixels.dtype in (np.uint8, np.uint16, np.float32)
    assert pixels.shape[2:] == (bands,)
    assert np.isfinite(pixels).all()
    kept = codec.decode_image(codec.encode_image(pixels))
    assert kept is not None
    np.testing.assert_array_equal(kept, pixels)


def read_annotations(scratch: Path, content: bytes) -> None:
    """An annotation file, and all that is written for it."""
    inside = scratch / "inside"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir()
    source = scratch / "annotations"
    source.write_bytes(content)
    try:
        for path in import_annotations(source, inside / "out"):
            assert path.is_relative_to(inside / "out" / "labels")
            assert path.is_file()
    finally:
        assert sorted(p.name for p in scratch.iterdir()) == ["annotations", "inside"]
        assert [p.name for p in inside.iterdir()] in ([], ["out"])
        if (inside / "out").exists():
            assert {p.name for p in (inside / "out").iterdir()} <= {"labels", "classes.txt"}


def read_weight_file(scratch: Path, content: bytes) -> None:
    """A file of weights; one with a header of JSON is a .safetensors."""
    path = scratch / ("a.safetensors" if content[8:9] == b"{" else "a.pth")
    path.write_bytes(content)
    for name, array in weight_files.read_weights(path).items():
        assert isinstance(name, str)
        float(np.asarray(array, np.float32).sum())


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
    """Lines of ids that are known, unknown, or paths out of the data set; also in two columns."""
    columns = st.builds(
        "{}{}{}{}{}".format,
        st.sampled_from(["", "images/", "./", "C:\\images\\", "/val/", '"']),
        _KNOWN,
        st.sampled_from(["", ".jpg", ".PNG"]),
        st.sampled_from(["", " ", "\t", ","]),
        st.sampled_from(["", "labels/a.png", "#"]),
    )
    names = draw(st.sampled_from([_NAMES, _KNOWN, _KNOWN, columns]))
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
_CLASS_LINE = st.one_of(
    st.builds("{} {}".format, _NAMES, st.one_of(_COLORS, _HEX, st.just(""))),
    st.builds("{}{}{} {}".format, st.integers(0, 4), st.sampled_from([": ", " ", ",", "="]),
              st.text("ab ", min_size=1, max_size=3), st.one_of(_COLORS, st.just(""))),
    st.builds("{}:{}::".format, _NAMES, st.one_of(_COLORS, st.just(""))),
    st.builds("{} {}".format, _COLORS, _NAMES),
    st.builds("{},{},{},{}".format, _NAMES, *[st.integers(0, 256)] * 3),
    st.sampled_from(["name,r,g,b", "id;name;color", "# label:color_rgb:parts:actions", "__ignore__",
                     "_background_", "void 1 2 3", '"a","b"']),
)  # fmt: skip
_FORMS = st.sampled_from([
    *("{i}: {n}", "{i} {n} {i} 2 3", "{n}", "{n} 1 2 {i}", "{n},1,{i},3", "{n} #0102{i:02}"),
    *("3 2 {i} {n}", "{n}:1,2,{i}::", "- {n}", '"{n}",'),
])  # fmt: skip
_GOOD_LINES = st.builds(
    lambda form, count, start, end: (
        start + end.join(form.format(i=i, n=f"n{i}x") for i in range(count))
    ).encode(),
    *(_FORMS, st.integers(0, 6)),
    st.sampled_from(["", "", "# a\n", "\ufeff", "void 9 9 9\n", "__ignore__\n", "name,r,g,b\n"]),
    _LINE_ENDS,
)
_KINDS_OF_LINES = st.sampled_from([_CLASS_LINE, *_CLASS_LINE.original_strategies])
_CLASS_LINES = st.builds(
    lambda lines, end, encoding: end.join(lines).encode(encoding, errors="surrogatepass"),
    _KINDS_OF_LINES.flatmap(lambda kind: st.lists(kind, max_size=8)),
    _LINE_ENDS,
    st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be"]),
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
    """Label files of every mode and format, of the right size or not, and their header changed."""
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
    kind = draw(st.sampled_from(["PNG"] * 6 + ["TIFF", "TIFF", "BMP", "WEBP", "JPEG", "GIF"]))
    try:
        image.save(stream, kind)
    except OSError:  # a mode that the format has not
        image.convert("RGB").save(stream, kind)
    content = stream.getvalue()
    if draw(st.integers(0, 4)) == 0 and content.startswith(b"\x89PNG"):
        content = draw(_with_new_header(content))
    return content


def _plain_label(mode: str, values: bytes, kind: str) -> bytes:
    image = Image.fromarray(np.frombuffer(values, np.uint8).reshape(SIZE) % 3).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


_LABEL_FILES = st.builds(
    _plain_label,
    st.sampled_from(["L", "RGB"]),
    st.binary(min_size=SIZE[0] * SIZE[1], max_size=SIZE[0] * SIZE[1]),
    st.sampled_from(["PNG", "TIFF", "BMP"]),
)


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


_PLACES = st.one_of(
    st.floats(-3, 12), st.integers(-3, 12), st.sampled_from([1e300, 2**40, float("nan"), "x", None])
)
_POINTS = st.lists(st.tuples(_PLACES, _PLACES), min_size=1, max_size=6)
_GOOD_POINTS = st.lists(st.tuples(st.floats(0, 7), st.floats(0, 5)), min_size=3, max_size=6)
_SIDES = st.sampled_from([(5, 7)] * 6 + [(0, 3), (2**20, 2**20), ("5", 7), (-1, -1), (None, 7)])
_FILES = st.one_of(
    *[st.sampled_from(["a.jpg", "b/c.png"])] * 3,
    st.sampled_from(["../a.jpg", "/etc/a.jpg", "C:\\a.jpg", "", "a" * 300, "a\0b", ".", "b"]),
    st.text(max_size=9),
)
_LABELS = st.one_of(*[st.sampled_from(["sky", "road", "background"])] * 3, st.text(max_size=9))
_RUNS = st.one_of(
    st.just([3, 4, 28]),
    st.just("34h0"),
    st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=9),
    st.lists(st.integers(-2, 40) | st.just(2**70), max_size=5),
)
_COCO_OBJECTS = st.fixed_dictionaries({
    "image_id": st.sampled_from([1, 1, 1, 2, 9]),
    "category_id": st.sampled_from([1, 1, 2, 9]),
    "segmentation": st.one_of(
        st.lists(_GOOD_POINTS.map(lambda points: [v for point in points for v in point]),
                 max_size=2),
        st.lists(_POINTS, max_size=2),
        st.fixed_dictionaries({"size": _SIDES, "counts": _RUNS}),
        _JSON,
    ),
})  # fmt: skip
_COCO = st.fixed_dictionaries({
    "images": st.lists(
        st.builds(lambda number, name, sides: {"id": number, "file_name": name, "height": sides[0],
                                               "width": sides[1]},
                  st.integers(1, 2), _FILES, _SIDES),
        max_size=2),
    "categories": st.lists(st.fixed_dictionaries({"id": st.integers(1, 2), "name": _LABELS}),
                           max_size=3),
    "annotations": st.lists(_COCO_OBJECTS, max_size=3) | _JSON,
})  # fmt: skip
_LABELME = st.builds(
    lambda name, sides, shapes: {
        **{"imagePath": name, "imageHeight": sides[0], "imageWidth": sides[1]},
        "shapes": shapes,
    },
    *(_FILES, _SIDES),
    st.lists(
        st.fixed_dictionaries(
            {
                "label": _LABELS,
                "points": _GOOD_POINTS | _POINTS | _JSON,
                "shape_type": st.sampled_from(
                    ["polygon", "polygon", "rectangle", "circle", "mask", "line", None, 3]
                ),
                "mask": st.sampled_from(["", "iVBORw0KGgo=", "x"]),
            }
        ),
        max_size=3,
    ),
)
_ATTRIBUTES = st.one_of(st.floats(0, 5).map(str), st.sampled_from(["-9", "1e400", "nan", "", "<"]))


def _cvat_shape(tag: str, points: list[Any], values: list[str], label: str) -> str:
    names = ("xtl", "ytl", "xbr", "ybr", "rotation", "left", "top", "width", "height", "z_order")
    given = "".join(f' {name}="{value}"' for name, value in zip(names, values, strict=True))
    outline = ";".join(f"{x},{y}" for x, y in points)
    return f'<{tag} label="{label}" points="{outline}" rle="3,4"{given}/>'


_CVAT = st.builds(
    lambda name, sides, shapes, start: (
        f'{start}<annotations><image name="{name}" height="{sides[0]}" width="{sides[1]}">'
        f"{''.join(shapes)}</image></annotations>"
    ),
    *(_FILES, _SIDES),
    st.lists(
        st.builds(
            _cvat_shape,
            st.sampled_from(["polygon", "box", "ellipse", "mask", "points", "tag"]),
            _GOOD_POINTS | _POINTS,
            st.lists(_ATTRIBUTES, min_size=10, max_size=10),
            _LABELS,
        ),
        max_size=3,
    ),
    st.sampled_from(["", '<?xml version="1.0" encoding="utf-8"?>',
                     '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>']),
)  # fmt: skip
_GOOD_COCO = st.builds(
    lambda outline, label: {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 5, "width": 7}],
        "categories": [{"id": 1, "name": label}, {"id": 2, "name": "sky"}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": outline}],
    },
    _GOOD_POINTS.map(lambda points: [[v for point in points for v in point]])
    | st.fixed_dictionaries({"size": st.just((5, 7)), "counts": _RUNS}),
    _LABELS,
)
_ANNOTATIONS = st.one_of(
    (_COCO | _GOOD_COCO | _LABELME | _JSON).map(lambda value: json.dumps(value).encode()),
    _CVAT.map(lambda value: value.encode(errors="surrogatepass")),
    _DEEP,
)
_VALUES = st.one_of(
    st.lists(
        st.builds("{}:{}".format, st.integers(-1, 70000), st.sampled_from([0, 1, 1, 255, 7])),
        max_size=4,
    ).map(",".join),
    st.text("0123456789:, -x", max_size=20),
    st.text(max_size=20),
).map(lambda value: value.encode(errors="surrogatepass"))


_PLAIN = st.one_of(
    st.integers(0, 9), st.integers(), st.sampled_from([2**31, 2**63, 2**64, -1]), st.none(),
    st.text(max_size=4), st.lists(st.integers(0, 9), max_size=3).map(tuple),
).map(lambda value: pickle.dumps(value, 2)[2:-1])  # fmt: skip
_STORAGE = st.builds(
    lambda kind, key, length: (
        b"(" + pickle.dumps("storage", 2)[2:-1] + f"ctorch\n{kind}Storage\n".encode()
        + pickle.dumps(key, 2)[2:-1] + pickle.dumps("cpu", 2)[2:-1] + length + b"tQ"
    ),
    st.sampled_from(["Float", "Float", "Byte", "BFloat16", "ComplexFloat"]),
    st.sampled_from(["0", "0", "0", "1", 0]),
    st.one_of(st.just(b"K\x06"), _PLAIN),
)  # fmt: skip
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("
_VIEWS = (  # of offset, sizes and strides that a storage of 6 numbers has
    b"K\x00K\x02K\x03\x86K\x03K\x01\x86",
    b"K\x05))",
    b"K\x00K\x06\x85K\x01\x85",
)
_GOOD_TENSOR = st.sampled_from(_VIEWS).map(
    lambda view: (
        _REBUILD + b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x06tQ" + view + b"tR"
    )
)
_TENSOR = st.builds(
    lambda storage, view: _REBUILD + storage + view + b"tR",
    st.one_of(_STORAGE, _PLAIN),
    st.one_of(st.sampled_from(_VIEWS), st.tuples(_PLAIN, _PLAIN, _PLAIN).map(b"".join)),
)
_OPCODES = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
_PROGRAM = st.one_of(
    st.lists(_GOOD_TENSOR, min_size=1, max_size=3).map(
        lambda tensors: b"}(" + b"".join(b"U\x01" + b"%d" % i + t for i, t in enumerate(tensors))
        + b"u"
    ),
    st.dictionaries(st.sampled_from(["a", "b", 3]), st.one_of(_TENSOR, _TENSOR, _PLAIN)).map(
        lambda entries: b"}(" + b"".join(pickle.dumps(k, 2)[2:-1] + v for k, v in entries.items())
        + b"u"
    ),
    st.lists(st.one_of(_PLAIN, _TENSOR, _OPCODES, st.binary(max_size=5)), max_size=9).map(b"".join),
)  # fmt: skip
_PICKLES = _PROGRAM.map(lambda content: b"\x80\x02" + content + b".")
_NUMBERS_STORED = np.arange(6, dtype=np.float32).tobytes()


@st.composite
def _weight_files(draw: Any) -> bytes:
    """Both formats of torch.save and safetensors, with a program or a header of any kind."""
    kind = draw(st.sampled_from(["zip", "zip", "deflated", "legacy", "legacy", "safetensors"]))
    if kind == "safetensors":
        sizes = st.lists(st.one_of(st.integers(0, 24), _NUMBERS), max_size=3)
        entry = st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "I64", 3]),
                "shape": st.one_of(st.just([2, 3]), sizes),
                "data_offsets": st.one_of(st.just([0, 24]), sizes),
            }
        )
        names = st.sampled_from(["a", "b", "__metadata__"])
        header = json.dumps(draw(st.dictionaries(names, st.one_of(entry, entry, _JSON)))).encode()
        return struct.pack("<Q", len(header)) + header + _NUMBERS_STORED
    program = draw(st.one_of(_PICKLES, _PICKLES, _mutated(_PICKLES)))
    if kind == "legacy":
        start = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        length = draw(st.sampled_from([6, 6, 6, -1, 2**60]))
        end = pickle.dumps(["0"], 2) + struct.pack("<q", length) + _NUMBERS_STORED
        return b"".join(pickle.dumps(value, 2) for value in start) + program + end
    stream = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", _NUMBERS_STORED)
    return stream.getvalue()


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """Returns a TIFF of (H, W, K) values as its specification says; few programs write all such.

    Args:
      values: of any type of NumPy.
      tags: numbers to be put into the header in place of the right ones, as t259=8.
    """
    height, width, channels = values.shape
    form = {"u": 1, "i": 2, "f": 3, "c": 6}[values.dtype.kind]
    bits = 8 * values.itemsize
    body = values.astype(values.dtype.newbyteorder("<")).tobytes()
    entries = {
        256: width, 257: height, 258: [bits] * channels, 259: 1,
        262: 1, 273: 8, 277: channels, 278: height, 279: len(body), 284: 1,
        338: [0] * (channels - 1), 339: [form] * channels,
    } | {int(name[1:]): number for name, number in tags.items()}  # fmt: skip
    at = 8 + len(body)
    lists, rows = b"", b""
    for tag, given in sorted(entries.items()):
        numbers = given if isinstance(given, list) else [given]
        if not numbers:
            continue
        kind, packed = 4, struct.pack(f"<{len(numbers)}I", *(n % 2**32 for n in numbers))
        if len(packed) > 4:
            packed, lists = struct.pack("<I", at + len(lists)), lists + packed
        rows += struct.pack("<HHI", tag, kind, len(numbers)) + packed
    start = struct.pack("<2sHI", b"II", 42, at + len(lists))
    return start + body + lists + struct.pack("<H", len(rows) // 12) + rows + bytes(4)


@st.composite
def _tiffs(draw: Any) -> bytes:
    """A small TIFF, mostly right, of a number of channels and a type."""
    kind = draw(st.sampled_from(["u1", "u2", "f4", "f4", "f8", "i2", "u4", "f2", "c8"]))
    shape = (3, 4, draw(st.sampled_from([1, 1, 2, 3, 3, 4, 5])))
    values = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    if draw(st.integers(0, 9)) == 0:
        values[0] = np.float32("nan") if values.dtype.kind == "f" else 0
    numbers = st.sampled_from([0, 1, 2, 3, 5, 6, 8, 16, 70000, 2**31, 2**32 - 1])
    wrong = st.dictionaries(
        st.sampled_from([f"t{tag}" for tag in (254, 256, 257, 258, 259, 262, 273, 274, 277, 278)]
                        + ["t279", "t284", "t317", "t322", "t323", "t338", "t339"]),
        numbers, max_size=2,
    )  # fmt: skip
    return tiff(values, **draw(st.one_of(st.just({}), wrong)))


_TIFFS = _tiffs()
_PAGES = st.builds(
    lambda count, kind: cv2.imencodemulti(".tiff", [np.eye(4, 5, dtype=kind)] * count)[1].tobytes(),
    st.integers(1, 5),
    st.sampled_from([np.uint8, np.uint16, np.float32]),
)
_ANYTHING = st.binary(max_size=200)
_IMAGE_FILES = st.one_of(
    *(_LABEL_FILES, _mutated(_LABEL_FILES), _pngs(), _mutated(_pngs()), _ANYTHING)
)
READERS: dict[str, tuple[Reader, st.SearchStrategy[bytes]]] = {
    "split list": (read_split_list, st.one_of(_mutated(_lists()), _lists(), _ANYTHING)),
    "VOC list": (read_voc_list, st.one_of(_mutated(_lists()), _lists(), _ANYTHING)),
    "class list": (
        read_class_list,
        st.one_of(
            *(_GOOD_LINES, _mutated(_GOOD_LINES), _CLASS_LINES, _mutated(_CLASS_LINES)),
            *(_CLASS_JSON, _mutated(_CLASS_JSON), _ANYTHING),
        ),
    ),
    "label values": (read_label_values, _VALUES),
    "label": (read_label, _IMAGE_FILES),
    "colour mask": (read_color_mask, _IMAGE_FILES),
    "image": (read_image, _IMAGE_FILES),
    "bands": (
        read_bands,
        st.one_of(_TIFFS, _mutated(_TIFFS), _PAGES, _mutated(_PAGES), _IMAGE_FILES),
    ),
    "annotations": (
        read_annotations,
        st.one_of(_ANNOTATIONS, _ANNOTATIONS, _mutated(_ANNOTATIONS), _ANYTHING),
    ),
    "weights": (
        read_weight_file,
        st.one_of(_weight_files(), _weight_files(), _mutated(_weight_files()), _ANYTHING),
    ),
}


if __name__ == "__main__":
    sys.exit(run())
