"""Annotation files to labels: masks as the formats' own libraries make them, and hostile files."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_cases import data_config
from PIL import Image, ImageDraw
from trees import write_png

from csc_jax import data
from csc_jax.commands.import_annotations import import_annotations
from csc_jax.data import annotations
from csc_jax.errors import UserError

SIZE = (50, 100)  # (height, width) px
POLYGONS = [
    [10.5, 3.25, 50.75, 8.0, 61.0, 40.5, 33.3, 27.9, 12.0, 44.0],
    [70.0, 10.0, 90.0, 10.0, 90.0, 30.0, 70.0, 30.0],
]
# What pycocotools 2.0.11 makes of them: merge(frPyObjects(POLYGONS, 50, 100))["counts"].
RUNS_OF_POLYGONS = (
    "Ya0j0h0?BN1O1O100O1O1O100O2N1O100O1O1O100O2N1O100O1001O0010O01O001O001O000010O01O0011N3N3L3N2M3"
    "N2M4L3N2MU=c0XB0000000000000000000000000000000000000Z?"
)
# encode(np.asfortranarray(default_rng(0).random((9, 11)) < 0.4))["counts"]
RUNS_OF_NOISE = "1122OO70I00O10O0111OO10O:0E030N14ON0M100320"


def coco(segmentation, size=SIZE, **fields):
    image = {"id": 1, "file_name": "dir/a.jpg", "height": size[0], "width": size[1]}
    return {
        "images": [image | fields],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": segmentation}],
    }


def labelme(**fields):
    shape = {"label": "thing", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"}
    image = {"imagePath": "a.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    return image | {"shapes": [shape | fields.pop("shape", {})]} | fields


def cvat(shape, image='name="a.jpg" width="100" height="50"'):
    return f"<annotations><image {image}>{shape}</image></annotations>"


def write(path, content):
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def mask(tmp_path, content, name="a.json"):
    """Returns the pixels of the one class that a file draws, (H, W) bool."""
    (image,) = annotations.read(write(tmp_path / name, content)).images
    return annotations.draw(image, {"thing": 1}, 0) == 1


# ---- As the libraries ----------------------------------------------------------------------------


def test_compressed_runs_are_those_of_pycocotools(tmp_path):
    expected = np.random.default_rng(0).random((9, 11)) < 0.4
    found = mask(tmp_path, coco({"size": [9, 11], "counts": RUNS_OF_NOISE}, (9, 11)))
    np.testing.assert_array_equal(found, expected)


def test_polygons_are_those_of_pycocotools_but_for_pixels_on_the_outline(tmp_path):
    theirs = mask(tmp_path, coco({"size": list(SIZE), "counts": RUNS_OF_POLYGONS}))
    assert theirs.sum() == 1673  # area(...)
    ours = mask(tmp_path, coco(POLYGONS))
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.98
    assert abs(ours.sum() - 1673) < 0.02 * 1673


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_of_pycocotools_itself(tmp_path):
    library = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        size = tuple(rng.integers(1, 60, 2).tolist())
        expected = rng.random(size) < rng.random()
        runs = library.encode(np.asfortranarray(expected.astype(np.uint8)))
        found = mask(tmp_path, coco(runs | {"counts": runs["counts"].decode()}, size))
        np.testing.assert_array_equal(found, expected)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        points = np.stack([50 + 45 * np.cos(angles), 25 + 22 * np.sin(angles)], 1).ravel().tolist()
        expected = library.decode(library.merge(library.frPyObjects([points], *SIZE))) > 0
        found = mask(tmp_path, coco([points]))
        assert (found & expected).sum() / (found | expected).sum() > 0.97


def test_polygons_of_labelme_are_those_of_its_drawing_but_for_the_outline(tmp_path):
    """Labelme draws with Pillow, which fills what the outline touches as well."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 8))
        points = np.stack([50 + 40 * np.cos(angles), 25 + 20 * np.sin(angles)], 1)
        canvas = Image.new("L", SIZE[::-1])
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], outline=1, fill=1)
        theirs = np.asarray(canvas) > 0
        ours = mask(tmp_path, labelme(shape={"points": points.tolist()}))
        grown = sum(np.roll(theirs, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
        assert not (ours & (grown == 0)).any()
        assert not ((grown == 9) & ~ours).any()


def test_labelmes_masks_and_circles(tmp_path):
    stored = np.random.default_rng(0).random((6, 8)) < 0.5
    stream = io.BytesIO()
    Image.fromarray(stored).save(stream, "png")
    shape = {"shape_type": "mask", "points": [[20, 10], [27, 15]]}
    shape["mask"] = base64.b64encode(stream.getvalue()).decode()
    found = mask(tmp_path, labelme(shape=shape))
    np.testing.assert_array_equal(found[10:16, 20:28], stored)
    assert found.sum() == stored.sum()
    found = mask(tmp_path, labelme(shape={"shape_type": "circle", "points": [[50, 25], [50, 45]]}))
    y, x = np.ogrid[:50, :100]
    distance = np.hypot(y + 0.5 - 25, x + 0.5 - 50)
    assert found[distance < 19.5].all()
    assert not found[distance > 20.5].any()


def test_shapes_of_cvat(tmp_path):
    found = mask(tmp_path, cvat('<box label="thing" xtl="3" ytl="5" xbr="9" ybr="7"/>'), "a.xml")
    expected = np.zeros(SIZE, bool)
    expected[5:7, 3:9] = True
    np.testing.assert_array_equal(found, expected)
    turned = '<box label="thing" xtl="40" ytl="20" xbr="60" ybr="30" rotation="90"/>'
    expected = np.zeros(SIZE, bool)
    expected[15:35, 45:55] = True
    np.testing.assert_array_equal(mask(tmp_path, cvat(turned), "a.xml"), expected)
    runs = '<mask label="thing" rle="1, 2, 3, 2" left="90" top="40" width="4" height="2"/>'
    found = mask(tmp_path, cvat(runs), "a.xml")
    assert found[40:42, 90:94].astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert found.sum() == 4
    found = mask(tmp_path, cvat('<ellipse label="thing" cx="50" cy="25" rx="60" ry="9"/>'), "a.xml")
    assert found[20:30].all()  # it may leave the image, as a whole shape


# ---- The command ---------------------------------------------------------------------------------


def test_a_whole_data_set_from_annotations(tmp_path):
    """Both splits, with one order of classes, prepare and hold what was annotated."""
    root = tmp_path / "root"
    for split in ("train", "val"):
        source = tmp_path / f"labelme_{split}"
        for i in range(3):
            name = f"{split}{i}"
            write_png(
                root / "images" / split / f"{name}.png", np.full((*SIZE, 3), 50 * i, np.uint8)
            )
            shapes = [
                {"label": "road", "points": [[0, 20], [100, 50]], "shape_type": "rectangle"},
                {"label": "car" if i else "road", "points": [[0, 0], [9, 9]],
                 "shape_type": "rectangle"},
                {"label": "void", "points": [[50, 0], [60, 9]], "shape_type": "rectangle"},
                {"label": "pole", "points": [[1, 1], [2, 2]], "shape_type": "line"},
            ]  # fmt: skip
            source.mkdir(exist_ok=True)
            write(source / f"{name}.json", labelme(imagePath=f"..\\{name}.png", shapes=shapes))
    command = [sys.executable, "scripts/import_annotations.py", str(tmp_path / "labelme_train")]
    done = subprocess.run(
        [*command, f"--out={root}", "--subfolder=train"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "3 shapes of the kind line have no area: left out" in done.stdout
    assert (root / "classes.txt").read_text() == "background 0 0 0\ncar 128 0 0\nroad 0 128 0\n"
    import_annotations(
        tmp_path / "labelme_val", root, subfolder="val", classes=root / "classes.txt"
    )
    dataset = data.load(data_config(tmp_path, name="folder").data)
    assert dataset.class_names == ("background", "car", "road")
    label = dataset.sources["val"][1]["label"]
    expected = np.zeros(SIZE, np.uint8)
    expected[20:], expected[:9, :9], expected[:9, 50:60] = 2, 1, 255
    np.testing.assert_array_equal(label, expected)


def test_images_without_a_shape_are_unlabelled_unless_said_otherwise(tmp_path):
    content = coco([[1, 1, 9, 1, 9, 9]])
    content["images"].append({"id": 2, "file_name": "b.jpg", "height": 5, "width": 5})
    source = write(tmp_path / "a.json", content)
    assert [p.name for p in import_annotations(source, tmp_path / "one")] == ["a.png"]
    written = import_annotations(source, tmp_path / "two", label_empty=True)
    assert [path.name for path in written] == ["a.png", "b.png"]
    with Image.open(written[1]) as image:
        assert not np.asarray(image).any()
    (path,) = import_annotations(source, tmp_path / "three", background="", classes=write(
        tmp_path / "classes.txt", "thing\nother\n"))  # fmt: skip
    with Image.open(path) as image:
        assert set(np.unique(np.asarray(image))) == {0, 255}


def test_names_in_either_form_of_unicode_are_one_class(tmp_path):
    """macOS and some tools write é as two characters."""
    shapes = [
        {"label": name, "points": [[0, y], [100, y + 9]], "shape_type": "rectangle"}
        for name, y in (("caf\u00e9", 0), ("cafe\u0301", 20))
    ]
    source = write(tmp_path / "a.json", labelme(shapes=shapes))
    (path,) = import_annotations(source, tmp_path / "out")
    assert (tmp_path / "out/classes.txt").read_text(encoding="utf-8") == (
        "background 0 0 0\ncaf\u00e9 128 0 0\n"
    )
    label = np.asarray(Image.open(path))
    assert (label[:9] == 1).all()
    assert (label[20:29] == 1).all()
    write(tmp_path / "classes.txt", "background\ncafe\u0301\n")
    import_annotations(source, tmp_path / "two", classes=tmp_path / "classes.txt")


def test_what_is_there_is_not_overwritten(tmp_path):
    source = write(tmp_path / "a.json", coco([[1, 1, 9, 1, 9, 9]]))
    out = tmp_path / "out"
    import_annotations(source, out)
    with pytest.raises(UserError, match=r"labels is there and not empty"):
        import_annotations(source, out)
    write(out / "classes.txt", "thing\nbackground\n")
    with pytest.raises(UserError, match=r"classes\.txt is there and has other classes, or another"):
        import_annotations(source, out, subfolder="val")
    with pytest.raises(UserError, match=r"--subfolder=\.\./x is no name of one folder"):
        import_annotations(source, out, subfolder="../x")


NAMES = [
    *("../a.jpg", "/etc/a.jpg", "a/../../b.jpg", "C:\\a.jpg", "..\\a.jpg", "a\0b", "", ".", "a//b"),
    *("a\nb.jpg", 7, None),
]
HOSTILE = {
    **{f"name {name!r}": coco([[1, 1, 9, 1, 9, 9]], file_name=name) for name in NAMES},
    "long name": coco([[1, 1, 9, 1, 9, 9]], file_name="a" * 300 + ".jpg"),
    "huge": coco([[1, 1, 9, 1, 9, 9]], (10**9, 10**9)),
    "long": coco([[1, 1, 9, 1, 9, 9]], (1, 10**8)),
    "no size": coco([[1, 1, 9, 1, 9, 9]], (0, 5)),
    "negative": coco([[-50, -50, 9, 1, 9, 9]]),
    "outside": coco([[1, 1, 1e9, 1, 9, 9]]),
    "not a number": '{"images":[{"id":1,"file_name":"a","height":9,"width":9}],"categories":'
    '[{"id":1,"name":"x"}],"annotations":[{"image_id":1,"category_id":1,'
    '"segmentation":[[NaN,1,2,3,4,1e999]]}]}',
    "odd": coco([[1, 1, 9, 1, 9]]),
    "two points": coco([[1, 1, 9, 1]]),
    "box alone": coco([]),
    "no mask": coco(None),
    "runs too long": coco({"size": list(SIZE), "counts": [0, 5001]}),
    "runs too large": coco({"size": list(SIZE), "counts": [2**64, 5000 - 2**64]}),
    "negative runs": coco({"size": list(SIZE), "counts": [-5, 5005]}),
    "other size": coco({"size": [5, 5], "counts": [25]}),
    "runs cut off": coco({"size": list(SIZE), "counts": RUNS_OF_POLYGONS[:-1]}),
    "runs of others": coco({"size": list(SIZE), "counts": "\u00ff" * 40}),
    "runs without end": coco({"size": list(SIZE), "counts": "o" * 400}),
    "unknown category": coco([[1, 1, 9, 1, 9, 9]]) | {"categories": []},
    "unknown image": coco([[1, 1, 9, 1, 9, 9]]) | {"images": []},
    "class that no list holds": coco([[1, 1, 9, 1, 9, 9]])
    | {"categories": [{"id": 1, "name": "a\nb"}]},
    "half a character": coco([[1, 1, 9, 1, 9, 9]]) | {"categories": [{"id": 1, "name": "\ud800"}]},
    "one class too many": {"images": [], "annotations": [], "categories": [
        {"id": i, "name": f"c{i}"} for i in range(300)]},
    "panoptic": {"images": [], "categories": [], "annotations": [
        {"image_id": 1, "segments_info": []}]},
    "results": [{"image_id": 1, "category_id": 1, "score": 1}],
    "deep": "[" * 100_000,
    "cut off": json.dumps(coco([[1, 1, 9, 1, 9, 9]]))[:-9],
    "empty": "",
    "no text": b"\x89PNG\r\n\x1a\n\0\xff",
    "labelme without size": labelme(imageHeight=None),
    "labelme name": labelme(imagePath=".."),
    "labelme mask": labelme(shape={"shape_type": "mask", "mask": "????"}),
    "labelme mask outside": labelme(
        shape={"shape_type": "mask", "points": [[-9, 1], [3, 3]], "mask": "iVBORw0KGgo="}
    ),
    "labelme shapes": labelme(shapes=[3]),
    "labelme lines alone": labelme(shape={"shape_type": "line"}),
    "cvat name": cvat('<box label="a" xtl="1" ytl="1" xbr="2" ybr="2"/>',
                      'name="../../a.jpg" width="9" height="9"'),
    "cvat huge": cvat("", 'name="a.jpg" width="999999999" height="999999999"'),
    "cvat points": cvat('<polygon label="a" points="1,2;3"/>'),
    "cvat runs": cvat('<mask label="a" rle="1,9999999999" left="0" top="0" width="2" height="2"/>'),
    "cvat mask outside": cvat('<mask label="a" rle="4" left="99" top="0" width="2" height="2"/>'),
    "cvat infinite": cvat('<box label="a" xtl="-inf" ytl="0" xbr="inf" ybr="5"/>'),
    "cvat turned": cvat('<box label="a" xtl="1" ytl="1" xbr="5" ybr="5" rotation="nan"/>'),
    "cvat video": "<annotations><track/></annotations>",
    "laughs": '<!DOCTYPE a [<!ENTITY b "xx"><!ENTITY c "&b;&b;">]>'
    + cvat('<box label="&c;" xtl="1" ytl="1" xbr="5" ybr="5"/>'),
    "file": '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>' + cvat("&b;"),
    "cut off XML": cvat("")[:-4],
    "other XML": "<svg/>",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_nothing_is_left(tmp_path, name):
    source = write(tmp_path / "annotations", HOSTILE[name])
    inside = tmp_path / "inside"
    inside.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        import_annotations(source, inside / "out")
    assert str(caught.value)
    left = [path for path in tmp_path.rglob("*") if path not in before]
    assert [path.name for path in left] in ([], ["out"])


def test_two_images_with_one_label_are_refused(tmp_path):
    content = coco([[1, 1, 9, 1, 9, 9]])
    content["images"].append({"id": 2, "file_name": "DIR/A.png", "height": 5, "width": 5})
    with pytest.raises(UserError, match=r"two images whose label would be dir/a\.png"):
        annotations.read(write(tmp_path / "a.json", content))
