"""Every row of the tables of docs/data.md, "What is read", by an example of it."""

import importlib.util
import io
import json
import logging
import re
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import fuzz
import numpy as np
import pytest
import trees
from data_cases import counted_dataset, data_config
from PIL import Image, ImageOps
from trees import SIZE, picture

from csc_jax import data
from csc_jax.data import annotations, class_list, codec, raster
from csc_jax.errors import UserError

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text()
SECTION = PAGE.split("\n## What is read\n")[1].split("\n## ")[0]
ROWS = [
    (title, row.split(" | ")[0].removeprefix("| "))
    for title, body in re.findall(r"^### ([^\n]*)\n(.*?)(?=^### |\Z)", SECTION, re.M | re.S)
    for row in re.findall(r"^\|(?!---| format).*", body, re.M)
]
CHECKS = {}


def row(title, begin):
    """Marks the check of the row of a table that begins so."""

    def register(check):
        assert (title, begin) not in CHECKS
        CHECKS[title, begin] = check
        return check

    return register


def find(title, cell):
    keys = [key for key in CHECKS if key[0] == title and cell.startswith(key[1])]
    return sorted(keys, key=lambda key: len(key[1]))[-1:]  # "a folder without", not "a folder"


@pytest.mark.parametrize(("title", "cell"), ROWS)
def test_row(title, cell, tmp_path, caplog):
    (key,) = find(title, cell)
    caplog.set_level(logging.INFO, "csc_jax")
    CHECKS[key](Case(tmp_path, caplog))


def test_every_check_is_of_one_row():
    found = [key for title, cell in ROWS for key in find(title, cell)]
    assert sorted(found) == sorted(CHECKS)


class Case:
    """A data set of six scenes, one file of which a check replaces."""

    def __init__(self, tmp_path, caplog):
        self.tmp = tmp_path
        self.root = tmp_path / "root"
        self.caplog = caplog
        self.ids = trees.blocks(0, (0, 1, 2, 255))
        for i in range(6):
            for split in ("train",) if i < 4 else ("val",):
                self.image(f"{split}/{i}.png", encode(picture(i)))
                self.label(f"{split}/{i}.png", encode(trees.blocks(i, (0, 1, 2, 255))))
        self.classes("sky\nroad\ncar\n")

    def image(self, name, content):
        return self._write(self.root / "images" / name, content)

    def label(self, name, content):
        return self._write(self.root / "labels" / name, content)

    def classes(self, content, name="classes.txt"):
        (self.root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    @staticmethod
    def _write(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def load(self, **fields):
        return data.load(data_config(self.tmp, name="folder", **fields).data)

    def first(self, **fields):
        """Returns the first train image, as training sees it."""
        return self.load(**fields).sources["train"][0]

    def replaced(self, suffix, content, kind="image", **fields):
        """Returns the first train image after its file is another one."""
        (self.root / f"{kind}s/train/0.png").unlink()
        getattr(self, kind)(f"train/0{suffix}", content)
        return self.first(**fields)[kind]

    def refused(self, message, **fields):
        with pytest.raises(UserError, match=message):
            self.load(**fields)


def encode(pixels, kind="png", mode=None, **options):
    """Returns an array or an image as Pillow writes it."""
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def raw_png(values, bits, kind=0):
    """Returns a PNG of values packed as its specification says; Pillow writes few such files."""
    height, width = values.shape[:2]
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in values]
    else:
        depth = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        lines = [np.packbits(row.ravel()).tobytes() for row in depth]
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line for line in lines))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )


def with_alpha(pixels):
    alpha = np.random.default_rng(5).integers(0, 256, (*pixels.shape[:2], 1), np.uint8)
    return np.concatenate([pixels.reshape(*pixels.shape[:2], -1), alpha], axis=-1)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


same = np.testing.assert_array_equal

# ---- Files and folders ---------------------------------------------------------------------------

FILES = "Files and folders"


@row(FILES, "a folder")
def _(case):
    (case.root / "images").rename(case.root / "Images")
    (case.root / "labels").rename(case.root / "LABELS")
    case._write(case.root / "Images/train/deep/er/x.PNG", encode(picture(9)))
    case._write(case.root / "LABELS/train/deep/er/x.Png", encode(case.ids))
    source = case.load().sources["train"]
    assert source.ids[-1] == "train/deep/er/x"
    same(source[len(source) - 1]["label"], case.ids)


@row(FILES, "a link to a folder")
def _(case):
    for kind in ("images", "labels"):
        (case.root / kind).rename(case.tmp / kind)
        (case.root / kind).symlink_to(case.tmp / kind)
    (case.tmp / "images/train/again").symlink_to(case.tmp / "images/train")
    assert len(case.load().sources["train"]) == 4
    assert "again, which is" in case.caplog.text
    (case.tmp / "images/train/again").unlink()
    (case.tmp / "images/train/more").symlink_to("/nowhere")
    case.refused("more is a link to '/nowhere', which leads nowhere")


@row(FILES, "hidden files")
def _(case):
    hidden = (".ipynb_checkpoints/0-checkpoint.png", "._0.png", "__MACOSX/train/._0.png")
    for name in (*hidden, "@eaDir/0.png/thumb.jpg"):
        case.image(f"train/{name}", b"no image")
        case.label(f"train/{name}", b"no image")
    for name in (".DS_Store", "Thumbs.db"):
        case.image(name, b"")
    assert len(case.load().sources["train"]) == 4
    assert "passed over" not in case.caplog.text


@row(FILES, "names in decomposed")
def _(case):
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    case.image(f"train/{apart}.png", encode(picture(9)))
    case.label(f"train/{composed}.png", encode(case.ids))
    dataset = case.load(labeled_list=str(case.tmp / "list.txt"))
    (case.tmp / "list.txt").write_text(f"train/{apart}\n")
    config = data_config(case.tmp, labeled_list=str(case.tmp / "list.txt"))
    assert data.partition(config.data, dataset, 0).labeled == (f"train/{composed}",)
    case.image(f"train/{composed}.png", encode(picture(9)))
    case.refused("twice, in two Unicode forms")


@row(FILES, "`images/train`, `images/val`")
def _(case):
    for train, val in (("Train", "Val"), ("training", "validation"), ("train2017", "val2017")):
        other = Case(case.tmp / train, case.caplog)
        for name, now in (("train", train), ("val", val)):
            (other.root / "images" / name).rename(other.root / "images" / now)
        (other.root / "labels/val").rename(other.root / "labels/valid")
        sources = other.load().sources
        assert sources["train"].ids == tuple(f"{train}/{i}" for i in range(4))
        assert sources["val"].ids == (f"{val}/4", f"{val}/5")
        assert not sources["val"].without_label
        assert f"images/{val} is val (2)" in other.caplog.text
    case.image("train/city/validation/a.png", encode(picture(9)))
    case.refused("a folder validation below images/train, as a split would be called")
    (case.root / "images/train/city/validation/a.png").unlink()
    case.image("Training/a.png", encode(picture(9)))
    case.refused("images/Training and images/train, both of them folders for the split train")


@row(FILES, "a folder without such names")
def _(case):
    for kind in ("images", "labels"):
        (case.root / kind / "train").rename(case.root / kind / "a")
        (case.root / kind / "val").rename(case.root / kind / "b")
    sources = case.load().sources
    assert sources["val"].ids == ("b/4",)
    assert len(sources["train"]) == 5
    assert "every fifth labelled image in the order of the names is val (1)" in case.caplog.text
    case.image("a/test/x.png", encode(picture(9)))
    case.refused("a folder test below images/a")


@row(FILES, "`images/test` without labels")
def _(case):
    case.image("test/a.png", encode(picture(9)))
    case.image("test/b.png", encode(picture(8)))
    assert set(case.load().sources) == {"train", "val"}
    assert "The 2 images of test have no labels" in case.caplog.text
    case.label("test/a.png", encode(case.ids))
    case.refused(r"no label labels/test/b\.png \(1 of the 2 images of test lack theirs")


@row(FILES, "a train image that is in val")
def _(case):
    case.image("val/5.png", encode(picture(2)))
    case.load()
    assert "1 train images are also images of val or test" in case.caplog.text
    assert "train/2.png, which is" in case.caplog.text


# ---- Images --------------------------------------------------------------------------------------

IMAGES = "Images"
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:240:24j, 0:240:32j], 80), -1).astype(np.uint8)


@row(IMAGES, "JPEG")
def _(case):
    for mode in ("RGB", "L", "CMYK"):
        stored = encode(SMOOTH, "jpeg", mode, quality=95)
        expected = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB")).astype(int)
        found = Case(case.tmp / mode, case.caplog).replaced(".jpg", stored)
        assert abs(found - expected).max() <= 3
    phone = encode(SMOOTH, "mpo", save_all=True, append_images=[Image.fromarray(picture(0))])
    assert abs(case.replaced(".jpg", phone).astype(int) - SMOOTH).max() <= 12


@row(IMAGES, "PNG")
def _(case):
    rgb = picture(0)
    same(Case(case.tmp / "a", case.caplog).replaced(".png", encode(with_alpha(rgb))), rgb)
    grey = rgb[..., 0]
    same(Case(case.tmp / "l", case.caplog).replaced(".png", encode(grey))[..., 2], grey)
    for bits in (1, 2, 4):
        values = grey >> (8 - bits)
        found = Case(case.tmp / str(bits), case.caplog).replaced(".png", raw_png(values, bits))
        same(found[..., 0], values * (255 // (2**bits - 1)))
    path = trees.write_palette_png(case.tmp / "p.png", grey)
    same(case.replaced(".png", path.read_bytes()), trees.VOC_COLORS[grey])


@row(IMAGES, "WebP")
def _(case):
    same(case.replaced(".WEBP", encode(picture(9), "webp", lossless=True)), picture(9))


@row(IMAGES, "BMP")
def _(case):
    same(case.replaced(".bmp", encode(picture(9), "bmp")), picture(9))


@row(IMAGES, "TIFF")
def _(case):
    for i, options in enumerate(({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"})):
        other = Case(case.tmp / str(i), case.caplog)
        same(other.replaced(".tif", encode(picture(9), "tiff", **options)), picture(9))
    grey = picture(9)[..., 0]
    same(Case(case.tmp / "g", case.caplog).replaced(".tiff", encode(grey, "tiff"))[..., 1], grey)
    cmyk = Image.fromarray(SMOOTH).convert("CMYK")
    found = Case(case.tmp / "c", case.caplog).replaced(".tiff", encode(cmyk, "tiff"))
    same(found, np.asarray(cmyk.convert("RGB")))
    deep = np.random.default_rng(0).integers(0, 65536, (*SIZE, 3)).astype(np.uint16)
    content = codec.cv2.imencode(".tiff", deep[..., ::-1])[1].tobytes()
    same(case.replaced(".tiff", content), (deep * (255 / 65535)).round().astype(np.uint8))


@row(IMAGES, "images of 16 bits")
def _(case):
    full = np.random.default_rng(0).integers(0, 65536, SIZE)
    found = Case(case.tmp / "16", case.caplog).replaced(".png", encode(full.astype(np.uint16)))
    same(found[..., 0], np.round(full * 255 / 65535))
    twelve = full >> 4
    for kind in ("png", "tiff"):
        other = Case(case.tmp / kind, case.caplog)
        found = other.replaced(f".{kind}", encode(twelve.astype(np.uint16), kind), image_bits=12)
        same(found[..., 1], np.round(twelve * 255 / 4095))
    other.refused(r"0\.tiff has 16 bits, of which its values use 12 .*image_bits=12")
    other.refused("more than the 10 bits of data.image_bits", image_bits=10)
    found = other.first(image_bits=16)["image"]  # as dark as that
    assert found.max() == 16


@row(IMAGES, "an EXIF orientation")
def _(case):
    for orientation in range(1, 9):
        for kind in ("jpeg", "png", "webp", "tiff"):
            other = Case(case.tmp / f"{orientation}{kind}", case.caplog)
            stored = encode(SMOOTH, kind, exif=exif(orientation))
            with Image.open(io.BytesIO(stored)) as image:
                upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
            photo = codec.decode_photo(stored)  # as predict reads it
            assert abs(photo.pixels - upright).max() <= 3
            assert photo.turned == (orientation > 1)
            if kind == "jpeg":
                other.label("train/0.png", encode(np.zeros(upright.shape[:2], np.uint8)))
                other.caplog.clear()
                same(other.replaced(".jpg", stored), photo.pixels)
                warned = "1 image were turned upright, as their EXIF orientation says"
                assert (warned in other.caplog.text) == (orientation > 1)
    case.image("train/0.png", encode(SMOOTH, exif=exif(6)))
    case.refused("is 24x32 but its image .* is 32x24 .*EXIF orientation turns it upright")


@row(IMAGES, "animations and several pages")
def _(case):
    more = {"save_all": True, "append_images": [Image.fromarray(picture(i)) for i in (1, 2)]}
    for kind in ("png", "webp", "tiff"):
        other = Case(case.tmp / kind, case.caplog)
        with pytest.raises(UserError, match="holds 3 pages or frames"):
            other.replaced(f".{kind}", encode(picture(0), kind, **more))
    pages = [Image.fromarray(picture(0)), Image.fromarray(picture(1)[::2, ::2])]
    pages[1].encoderinfo = {"tiffinfo": {254: 1}}  # a reduced copy
    content = encode(pages[0], "tiff", save_all=True, append_images=pages[1:])
    same(case.replaced(".tif", content), picture(0))


@row(IMAGES, "more than")
def _(case):
    (limit,) = re.findall(r"more than ([\d,]+) px", SECTION)
    assert int(limit.replace(",", "")) == codec.MAX_PIXELS
    content = raw_png(np.zeros((1, 1), np.uint8), 8, kind=2)
    for kind in ("image", "label"):
        header = b"IHDR" + struct.pack(">II", 40000, 40000) + content[24:29]
        huge = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
        other = Case(case.tmp / kind, case.caplog)
        with pytest.raises(UserError, match=r"says that it is 40000x40000 px .*178956970 px"):
            other.replaced(".png", huge, kind)


@row(IMAGES, "any other image")
def _(case):
    case.image("train/x.gif", encode(picture(0), "gif"))
    case.image("train/y.HEIC", b"x")
    assert len(case.load().sources["train"]) == 4
    assert "passed over 1 .gif, 1 .heic" in case.caplog.text
    case.image("train/0.png", encode(picture(0), "gif"))
    case.refused(r"0\.png is corrupt or truncated, or none of JPEG, PNG, WebP, BMP, TIFF")


# ---- Images that keep their values ---------------------------------------------------------------

VALUES = "Images that keep their values"


def deep(bands, dtype="uint16", seed=9):
    values = np.random.default_rng(seed).integers(0, 60000, (*SIZE, bands))
    return values.astype(dtype)


def kept(case, suffix, content, bands):
    """Returns an image as training sees it, in a folder of such images alone."""
    for path in sorted((case.root / "images").rglob("*.*")):
        path.rename(path.with_suffix(suffix))
        path.with_suffix(suffix).write_bytes(content)
    return case.first(bands=bands, **({} if bands != 3 else {"mean": (), "std": ()}))["image"]


def pages(values):
    each = [np.ascontiguousarray(values[..., k]) for k in range(values.shape[-1])]
    return codec.cv2.imencodemulti(".tiff", each)[1].tobytes()


@row(VALUES, "grey PNG")
def _(case):
    grey = deep(1)
    for i, (suffix, content) in enumerate(
        (
            (".png", encode(grey[..., 0])),
            (".tif", encode(grey[..., 0], "tiff")),
            (".tiff", encode(grey[..., 0], "tiff", compression="tiff_lzw")),
        )
    ):
        same(kept(Case(case.tmp / str(i), case.caplog), suffix, content, 1), grey)
    smooth = SMOOTH[..., :1]
    found = kept(Case(case.tmp / "j", case.caplog), ".jpg", encode(smooth[..., 0], "jpeg"), 1)
    assert found.shape == smooth.shape
    assert abs(found.astype(int) - smooth).max() <= 3


@row(VALUES, "RGB whose channels are equal")
def _(case):
    grey = picture(9)[..., :1]
    same(kept(case, ".png", encode(grey.repeat(3, axis=-1)), 1), grey)
    webp = encode(grey.repeat(3, axis=-1), "webp", lossless=True)
    same(kept(Case(case.tmp / "w", case.caplog), ".webp", webp, 1), grey)


@row(VALUES, "grey where three bands")
def _(case):
    same(kept(case, ".tif", encode(deep(1)[..., 0], "tiff"), 3), deep(1).repeat(3, axis=-1))


@row(VALUES, "RGBA")
def _(case):
    rgba = with_alpha(picture(9))
    same(kept(Case(case.tmp / "4", case.caplog), ".png", encode(rgba), 4), rgba)
    same(kept(case, ".png", encode(rgba), 3), rgba[..., :3])


@row(VALUES, "RGB of 16 bits")
def _(case):
    rgb = deep(3)
    png, tiff = (codec.cv2.imencode(s, rgb[..., ::-1])[1].tobytes() for s in (".png", ".tiff"))
    same(kept(Case(case.tmp / "p", case.caplog), ".png", png, 3), rgb)
    same(kept(case, ".tif", tiff, 3), rgb)


@row(VALUES, "TIFF of pages")
def _(case):
    five = deep(5)
    same(kept(Case(case.tmp / "5", case.caplog), ".tif", pages(five), 5), five)
    with pytest.raises(UserError, match="holds 5 pages of 1 channels, but"):
        kept(case, ".tif", pages(five), 4)


@row(VALUES, "TIFF of 2, of more")
def _(case):
    for bands in (2, 5):
        other = Case(case.tmp / str(bands), case.caplog)
        content = fuzz.tiff(deep(bands))
        if importlib.util.find_spec("rasterio"):
            same(kept(other, ".tif", content, bands), deep(bands))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "rasterio", None)
            with pytest.raises(codec.Unusable, match=f"{bands} channels of 16 bits, which needs"):
                raster.decode(content, bands)


@row(VALUES, "TIFF of floats")
def _(case):
    for i, dtype in enumerate(("float32", "float64", "int16", "int32")):
        values = deep(1, dtype, seed=i) - (30000 if dtype == "int16" else 0.0)
        content = fuzz.tiff(values.astype(dtype))
        found = kept(Case(case.tmp / dtype, case.caplog), ".tif", content, 1)
        assert found.dtype == np.float32
        same(found, values.astype(dtype))


@row(VALUES, "NaN or infinity")
def _(case):
    values = deep(1, "float32")
    values[2, :3, 0] = np.nan, np.inf, -np.inf
    with pytest.raises(UserError, match=r"0\.tif holds 3 values that are NaN or infinite; fill"):
        kept(case, ".tif", fuzz.tiff(values), 1)


@row(VALUES, "images of several types")
def _(case):
    for i, path in enumerate(sorted((case.root / "images").rglob("*.png"))):
        path.write_bytes(encode(picture(i)[..., 0] if i else deep(1)[..., 0]))
    case.refused(r"images of uint16 \(the first is train/0\) and of uint8 .* scales", bands=1)


@row(VALUES, "another number of channels")
def _(case):
    with pytest.raises(UserError, match=r"0\.png has 3 channels, but data.bands is 4"):
        kept(case, ".png", encode(picture(9)), 4)


@row(VALUES, "a TIFF whose value 0 means white")
def _(case):
    for tags, message in (
        ({"t262": 0}, "whose value 0 means white"),
        ({"t258": 12}, "has values of 12 bits; save it with 8, 16 or 32"),
    ):
        with pytest.raises(UserError, match=message):
            kept(Case(case.tmp / message[-5:], case.caplog), ".tif", fuzz.tiff(deep(1), **tags), 1)


@row(VALUES, "more than 1 GiB")
def _(case):
    assert raster.MOST_BYTES == 1 << 30
    content = fuzz.tiff(deep(1, "float32"), t256=1 << 13, t257=1 << 14, t277=3)
    with pytest.raises(UserError, match=r"says that it holds 1610612736 bytes"):
        kept(case, ".tif", content, 1)


# ---- Labels --------------------------------------------------------------------------------------

LABELS = "Labels"
COLORS = "sky 0 128 255\nroad 128 64 128\ncar 200 0 0\n"


def painted(ids, void=(9, 9, 9)):
    table = np.full((256, 3), void, np.uint8)
    table[:3] = (0, 128, 255), (128, 64, 128), (200, 0, 0)
    return table[ids]


@row(LABELS, "grey PNG of")
def _(case):
    case.classes("\n".join(f"class {i}" for i in range(16)))
    for bits in (1, 2, 4, 8, 16):
        values = trees.blocks(1, range(min(16, 2**bits)))
        other = Case(case.tmp / str(bits), case.caplog)
        other.classes("\n".join(f"class {i}" for i in range(16)))
        same(other.replaced(".png", raw_png(values, bits), "label"), values)
    same(case.replaced(".png", encode(with_alpha(case.ids)), "label"), case.ids)
    both = np.stack([case.ids.astype(np.uint16), np.full(SIZE, 65535, np.uint16)], -1)
    case.label("train/0.png", raw_png(both, 16, kind=4))
    same(case.first()["label"], case.ids)


@row(LABELS, "PNG with a palette")
def _(case):
    for colors in (4, 256):
        other = Case(case.tmp / str(colors), case.caplog)
        ids = case.ids % 3 if colors == 4 else case.ids
        path = trees.write_palette_png(other.tmp / "p.png", ids, trees.VOC_COLORS[:colors])
        same(other.replaced(".png", path.read_bytes(), "label"), ids)
    palette = painted(np.arange(256))
    case.classes(COLORS)
    path = trees.write_palette_png(case.tmp / "p.png", case.ids, palette)
    same(case.replaced(".png", path.read_bytes(), "label"), case.ids)
    palette[[1, 2]] = palette[[2, 1]]
    trees.write_palette_png(case.root / "labels/train/0.png", case.ids, palette)
    case.refused(r"shows the value 1 as 200 0 0, but .*classes\.txt gives that class .* 128 64 128")


@row(LABELS, "TIFF, BMP")
def _(case):
    for kind, pixels in (
        *(("tiff", case.ids), ("tiff", case.ids.astype(np.uint16)), ("bmp", case.ids)),
        ("tiff", case.ids.astype(np.int32)),
    ):
        other = Case(case.tmp / f"{kind}{pixels.dtype}", case.caplog)
        same(other.replaced(f".{kind}", encode(pixels, kind), "label"), case.ids)
    with pytest.raises(UserError, match="holds floating-point values"):
        case.replaced(".tif", encode(case.ids.astype(np.float32), "tiff"), "label")


@row(LABELS, "RGB and RGBA")
def _(case):
    ids = case.ids % 3
    for name, pixels in (("rgb", painted(ids)), ("rgba", with_alpha(painted(ids)))):
        for kind in ("png", "bmp", "tiff"):
            other = Case(case.tmp / f"{name}{kind}", case.caplog)
            other.classes(COLORS)
            same(other.replaced(f".{kind}", encode(pixels, kind), "label"), ids)
    pixels = painted(ids)
    pixels[3, 4] = pixels[3, 5] = 7, 8, 9
    pixels[0, 0] = 1, 1, 1
    case.classes(COLORS)
    case.label("train/0.png", encode(pixels))
    case.refused(r"train/0\.png holds the colour 7 8 9 \(2 px\).*classes\.txt .*and 1 more")


@row(LABELS, "RGB, all channels equal")
def _(case):
    same(case.replaced(".png", encode(case.ids, mode="RGB"), "label"), case.ids)
    case.classes(COLORS)
    case.refused("holds the colour")


@row(LABELS, "values mapped by")
def _(case):
    masks = {0: np.where(case.ids == 2, 255, 0).astype(np.uint8)}
    for path in (case.root / "labels").rglob("*.png"):
        path.write_bytes(encode(masks[0]))
    case.classes("background\nobject\n")
    same(case.first(folder__label_values="0:0,255:1")["label"], case.ids == 2)
    case.refused(
        r"label id 0 .*which data\.folder\.label_values does not map",
        folder__label_values="1:0,2:1",
    )
    for text in ("0:0,255", "0:0,0:1", "0:7", "a:b", "0:0,70000:1", "0=0", "-1:0"):
        case.refused(r"data\.folder\.label_values is", folder__label_values=text)
    deep = Case(case.tmp / "deep", case.caplog)
    for path in (deep.root / "labels").rglob("*.png"):
        path.write_bytes(encode(np.where(masks[0], 1000, 65535).astype(np.uint16)))
    found = deep.first(folder__label_values="1000:2, 65535:255")["label"]
    same(found, np.where(masks[0], 2, 255))


@row(LABELS, "`void R G B`")
def _(case):
    case.classes(f"void 9 9 9\n{COLORS}Ignore 1 2 3\n")
    pixels = painted(case.ids)
    pixels[0, 0] = 1, 2, 3
    expected = case.ids.copy()
    expected[0, 0] = 255
    for path in (case.root / "labels").rglob("*.png"):
        path.write_bytes(encode(pixels))
    dataset = case.load()
    same(dataset.sources["train"][0]["label"], expected)
    assert dataset.class_names == ("sky", "road", "car")
    case.label("train/0.png", encode(case.ids))
    case.refused("holds class ids, but .*classes.txt has a line for pixels to ignore before that")
    case.classes(f"{COLORS}void 9 9 9\n")
    for path in (case.root / "labels").rglob("*.png"):
        path.write_bytes(encode(np.where(case.ids == 255, 3, case.ids)))
    same(case.first()["label"], case.ids)


@row(LABELS, "JPEG, WebP")
def _(case):
    case.label("train/0.png", encode(case.ids, "jpeg"))
    case.refused("is a JPEG, which need not keep the values")
    case.label("train/0.png", encode(case.ids, "webp", mode="RGB", lossless=True))
    case.refused("is a WebP, which need not keep")


@row(LABELS, "a label with an EXIF")
def _(case):
    case.label("train/0.png", encode(case.ids, exif=exif(3)))
    case.refused("has an EXIF orientation; labels are taken as they are stored")


@row(LABELS, "a file of another format")
def _(case):
    (case.root / "labels/train/0.png").rename(case.root / "labels/train/0.json")
    case.refused(r"0\.json is no label that is read .*import-annotations")
    (case.root / "labels/train/0.json").rename(case.root / "labels/train/0.jpg")
    case.refused(r"0\.jpg is no label that is read")


# ---- Lists of classes ----------------------------------------------------------------------------

CLASSES = "Lists of classes"
NAMES = ("sky", "wide road")
PALETTE = [[0, 128, 255], [128, 64, 128]]


def classes(case, content, name="classes.txt"):
    path = case.tmp / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return class_list.read_classes(path)


@row(CLASSES, "`road`")
def _(case):
    for content in ("sky\nwide road", "\n# ids from 0\r\nsky\r\n  wide road  \r\n\r\n"):
        assert classes(case, content).names == NAMES
    assert classes(case, "class 0\nclass 1\n").names == ("class 0", "class 1")


@row(CLASSES, "`road 128 64 128`")
def _(case):
    for content in (
        *("sky 0 128 255\nwide road 128 64 128", "sky,0,128,255\nwide road, 128, 64, 128"),
        *("sky #0080ff\nwide road\t#804080", "0 128 255 sky\n128 64 128\t\twide road"),
        "sky: 0 128 255\nwide road: 128 64 128",
    ):
        found = classes(case, content)
        assert (found.names, found.palette.tolist()) == (NAMES, PALETTE)
        assert len(found.colors) == 2


@row(CLASSES, "`0: road`")
def _(case):
    for content in (
        *(
            "0: sky\n1: wide road",
            "0 sky\n1 wide road",
            "1\twide road\n0\tsky",
            "0,sky\n1,wide road",
        ),
        *("0=sky\n1=wide road", "0: sky\n1: wide road\n255: void"),
    ):
        assert classes(case, content).names == NAMES
    found = classes(case, "0 sky 0 128 255\n1 wide road 128 64 128")
    assert (found.names, found.palette.tolist()) == (NAMES, PALETTE)
    found = classes(case, "0: void 0 0 0\n1: sky 0 128 255\n2: wide road 128 64 128")
    assert found.names == NAMES
    assert (found.values, found.unclear) == ({0: 255, 1: 0, 2: 1}, "")
    for content, line in (("1: sky\n2: road", "1: sky"), ("0: sky\n2: road", "2: road")):
        with pytest.raises(UserError, match=f"the line '{line}' has the id"):
            classes(case, content)


@row(CLASSES, "`road:128,64,128::`")
def _(case):
    found = classes(
        case, "# label:color_rgb:parts:actions\nsky:0,128,255::\nwide road:128,64,128:a,b:c\ncar:::"
    )
    assert found.names == (*NAMES, "car")
    assert found.palette[:2].tolist() == PALETTE
    assert sorted(found.colors) == [0, 1]


@row(CLASSES, "`__ignore__`")
def _(case):
    found = classes(case, "__ignore__\n_background_\nsky\n")
    assert found.names == ("_background_", "sky")
    assert (found.values, found.unclear) == ({0: 0, 1: 1}, "")


@row(CLASSES, "CSV with a header")
def _(case):
    for content in (
        *("name,r,g,b\nsky,0,128,255\nwide road,128,64,128\n",),
        *("id;name;color\n1;wide road;#804080\n0;sky;#0080ff\n",),
        *('class_name,color,area\nsky,"0, 128, 255",7\n"wide road","(128,64,128)",8\n',),
        *("Name\tRed\tGreen\tBlue\tIdx\nsky\t0\t128\t255\t0\nwide road\t128\t64\t128\t1\n",),
    ):
        found = classes(case, content, "classes.csv")
        assert (found.names, found.palette.tolist()) == (NAMES, PALETTE)


@row(CLASSES, "JSON")
def _(case):
    found = classes(
        case, json.dumps(["sky", {"name": "wide road", "color": [128, 64, 128]}]), "c.json"
    )
    assert (found.names, found.colors) == (NAMES, {1: (128, 64, 128)})


@row(CLASSES, "any other line")
def _(case):
    for line in (
        *(
            "- sky",
            "sky:",
            '"sky",',
            "[sky]",
            "sky: 0",
            "sky,0",
            "sky = 3",
            "<b>sky</b>",
            "{",
            "nc: 3",
        ),
        *("sky\x1b[2J", "sky\x00"),
    ):
        with pytest.raises(UserError, match=r"class list .*read"):
            classes(case, f"road\n{line}\ncar\n")
    for content in (
        *("0: sky\nroad\n", "name\nsky\nroad\n", "sky 0\nroad 1\n", "name r g b\nsky 1 2 3\n"),
        *(
            "name,foo\nsky,1\n",
            "Idx,Ratio,Name\n1,0.2,wall\n2,0.1,sky\n",
            "sky 1 2 3 255\na 4 5 6 255",
        ),
        *("0 0 sky\n1 1 road\n", "id,name\n0\n", 'name,r,g,b\n"sky,0,0,0\n'),
    ):
        with pytest.raises(UserError, match=r"class list .* cannot be read \(the line '|cannot be"):
            classes(case, content)


# ---- Lists of images -----------------------------------------------------------------------------

LISTS = "Lists of images"
CITY = "leftImg8bit/train/ulm/ulm_{:06}_000019_leftImg8bit.png"
DATASETS = {  # ids, and the ways in which published lists write the first of them
    "cityscapes": (
        [CITY.format(i) for i in range(4)],
        [
            CITY.format(0),
            f"{CITY.format(0)} gtFine/train/ulm/ulm_000000_000019_gtFine_labelTrainIds.png",
            "train/ulm/ulm_000000_000019_leftImg8bit.png",
            "ulm/ulm_000000_000019_leftImg8bit.png",
            "ulm_000000_000019",
            "/data/cityscapes/leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
            "leftImg8bit\\train\\ulm\\ulm_000000_000019_leftImg8bit.png",
        ],
    ),
    "pascal_voc": (
        [f"2007_{i:06}" for i in range(4)],
        [
            "2007_000000",
            "2007_000000.jpg",
            "JPEGImages/2007_000000.jpg SegmentationClass/2007_000000.png",
            "/JPEGImages/2007_000000.jpg /SegmentationClassAug/2007_000000.png",
            "/home/test/VOC2012/JPEGImages/2007_000000.jpg",
            "JPEGImages\\2007_000000.jpg\tSegmentationClass\\2007_000000.png",
        ],
    ),
    "camvid": (
        [f"0001TP_{i:06}" for i in range(4)],
        [
            "0001TP_000000.png",
            "images/train/0001TP_000000.png",
            "/SegNet/CamVid/train/0001TP_000000.png /SegNet/CamVid/trainannot/0001TP_000000.png",
        ],
    ),
    "folder": (
        [f"train/a b/{i}" for i in range(4)],
        [
            "train/a b/0",
            "train/a b/0.jpg",
            "images/train/a b/0.JPG labels/train/a b/0.png",
            "images/train/a b/0.tiff,labels/train/a b/0.png",
            "./images/train/a b/0.jpg",
            "C:\\data set\\images\\train\\a b\\0.jpg\tC:\\data set\\labels\\train\\a b\\0.png",
            "a b/0.jpg",
            '"images/train/a b/0.jpg" "labels/train/a b/0.png"',
        ],
    ),
}


def partition(case, ids, content, val=()):
    path = case.tmp / "labeled.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    dataset = counted_dataset(ids)
    dataset.sources["val"] = counted_dataset(val).sources["train"]
    config = data_config(case.tmp, labeled_list=str(path)).data
    return data.partition(config, dataset, 0).labeled


@row(LISTS, "ids")
def _(case):
    for ids, _ in DATASETS.values():
        assert partition(case, ids, f"{ids[2]}\n{ids[0]}\n") == (ids[2], ids[0])


@row(LISTS, "`JPEGImages/a.jpg")
@row(LISTS, "paths with suffix")
def _(case):
    for ids, lines in DATASETS.values():
        for line in lines:
            assert partition(case, ids, f"{line}\n") == (ids[0],), line
            other = line.replace("train", "val")
            if other != line and ids[0] not in line.split():
                with pytest.raises(UserError, match="not in the train split"):
                    partition(case, ids, f"{other}\n")


@row(LISTS, "UTF-8, UTF-16")
def _(case):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
        assert partition(case, ["straße", "b", "c"], "c\r\nstraße\r\n".encode(encoding)) == (
            *("c", "straße"),
        )
        assert classes(case, "straße\r\nb\r\n".encode(encoding)).names == ("straße", "b")


@row(LISTS, "blank lines")
def _(case):
    assert partition(case, ["a", "b", "#c"], "# made by hand\n\n  \nb\n#c\n") == ("b", "#c")


@row(LISTS, "unknown images")
def _(case):
    ids, val = ["train/0", "train/1", "train/2"], ["val/3", "val/4"]
    for content, message in (
        ("images/train/0.jpg\ntrain/9.jpg\n", r"names train/9\.jpg, not in the train split; its"),
        ("train/0\nimages/train/0.jpg\n", "names train/0 more than once"),
        ("train/0\nimages/val/4.jpg\n", "names val/4 of the split val, which is never trained on"),
    ):
        with pytest.raises(UserError, match=message):
            partition(case, ids, content, val)


# ---- Annotation files; tests/test_annotations.py has more ----------------------------------------

FORMATS = "Annotation files"


@row(FORMATS, "COCO JSON")
def _(case):
    runs = [12, 4, 20 * 10 - 16]  # down the columns
    stored = {
        "categories": [{"id": 7, "name": "road"}, {"id": 3, "name": "sky"}],
        "images": [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 20}],
        "annotations": [
            {"image_id": 1, "category_id": 3, "segmentation": [[0, 0, 5, 0, 5, 5, 0, 5]]},
            {
                **{"image_id": 1, "category_id": 7, "iscrowd": 1},
                "segmentation": {"size": [10, 20], "counts": runs},
            },
        ],
    }
    expected = np.zeros((10, 20), np.uint8)
    expected[:5, :5] = 1
    expected[2:6, 1] = 2
    assert_drawn(case, "a.json", json.dumps(stored), expected, ("sky", "road"))


@row(FORMATS, "LabelMe JSON")
def _(case):
    stored = {
        **{"imagePath": "..\\images\\a.jpg", "imageHeight": 10, "imageWidth": 20},
        "shapes": [
            {"label": "b", "points": [[0, 0], [5, 0], [5, 5], [0, 5]], "shape_type": "polygon"},
            {"label": "a", "points": [[12, 8], [10, 2]], "shape_type": "rectangle"},
        ],
    }
    expected = np.zeros((10, 20), np.uint8)
    expected[:5, :5] = 2
    expected[2:8, 10:12] = 1
    assert_drawn(case, "a.json", json.dumps(stored), expected, ("a", "b"))


@row(FORMATS, "CVAT XML")
def _(case):
    content = """<?xml version="1.0" encoding="utf-8"?><annotations><meta><task><labels>
      <label><name>b</name><color>#fa3253</color></label><label><name>a</name></label>
      </labels></task></meta><image id="0" name="a.png" width="20" height="10">
      <polygon label="a" points="0,0;5,0;5,5;0,5" z_order="1"/>
      <box label="b" xtl="3" ytl="0" xbr="8" ybr="2" z_order="0"/></image></annotations>"""
    expected = np.zeros((10, 20), np.uint8)
    expected[:2, 3:8] = 1
    expected[:5, :5] = 2
    assert_drawn(case, "a.xml", content, expected, ("b", "a"))


def assert_drawn(case, name, content, expected, names):
    path = case.tmp / name
    path.write_text(content)
    found = annotations.read(path)
    assert found.names == names
    order = list(annotations.class_order(found, "background"))
    ids, outside = annotations.class_ids(found, order, "background")
    (image,) = found.images
    assert image.name == "a"
    same(annotations.draw(image, ids, outside), expected)
