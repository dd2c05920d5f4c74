"""TIFFs in tiles: each pixel once, with its surroundings; large ones in little memory."""

import types

import numpy as np
import pytest

from csc_jax.config import default_config
from csc_jax.deploy import tiles
from csc_jax.errors import UserError
from csc_jax.evaluation.predict import Extras, predict_folder

PALETTE = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [(100, 130, 32, 8), (32, 31, 32, 8), (33, 1, 32, 31), (200, 96, 32, 0)],
)
def test_tiles_cover_each_pixel_once_with_its_surroundings(height, width, tile, overlap):
    times = np.zeros((height, width), int)
    for part in tiles.plan(height, width, tile, overlap):
        assert (part.height, part.width) == (min(tile, height), min(tile, width))
        top, bottom, left, right = part.inner
        times[top:bottom, left:right] += 1
        for first, last, start, size, length in (
            (top, bottom, part.top, part.height, height),
            (left, right, part.left, part.width, width),
        ):
            assert 0 <= start <= first < last <= start + size <= length
            assert first == 0 or first - start >= overlap // 2
            assert last == length or start + size - last >= overlap // 2
    assert (times == 1).all()


RGB = default_config().data


def brightest(image):
    """The class is the brightest channel, and its probability that channel's share of 255."""
    return types.SimpleNamespace(
        classes=image.argmax(axis=-1).astype(np.uint8),
        confidence=image.max(axis=-1).astype(np.float32) / 255,
    )


@pytest.fixture
def rasterio():
    library = pytest.importorskip("rasterio", reason="rasterio is not installed (extra tiles)")
    pytest.importorskip("rasterio.errors")
    return library


def save(rasterio, path, image, **profile):
    profile = {"driver": "GTiff", "dtype": image.dtype, "count": image.shape[-1]} | profile
    height, width, _ = image.shape
    with rasterio.open(path, "w", height=height, width=width, **profile) as file:
        file.write(image.transpose(2, 0, 1))
    return path


def picture(height=150, width=210, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_tiff_comes_back_whole_and_where_it_was(rasterio, tmp_path):
    image = picture()
    place = rasterio.Affine(0.2, 0, 500_000, 0, -0.2, 5_400_000)
    path = save(rasterio, tmp_path / "a.tif", image, crs="EPSG:32632", transform=place)
    out, confidence = tmp_path / "ids.tif", tmp_path / "confidence.tif"
    size = tiles.segment(brightest, PALETTE, path, out, confidence, tile=64, overlap=16, data=RGB)
    assert size == (150, 210)
    with rasterio.open(out) as file:
        np.testing.assert_array_equal(file.read(1), image.argmax(axis=-1))
        assert file.crs.to_epsg() == 32632
        assert file.transform == place
        assert file.colormap(1)[2][:3] == (0, 0, 200)
        assert file.profile["tiled"]
    with rasterio.open(confidence) as file:
        np.testing.assert_array_equal(file.read(1), image.max(axis=-1))
    grey = save(rasterio, tmp_path / "grey.tif", picture(70, 80, 1))
    tiles.segment(brightest, PALETTE, grey, out, tile=64, data=RGB)
    with rasterio.open(out) as file:
        assert not file.read(1).any()  # equal channels: the first
        assert file.crs is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("a.tif", "confidence.tif", "grey.tif", "ids.tif")
    ]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_what_cannot_go_in_tiles_is_named(rasterio, tmp_path, monkeypatch):
    out = tmp_path / "out.tif"
    deep = save(rasterio, tmp_path / "deep.tif", picture().astype(np.uint16))
    with pytest.raises(UserError, match="3 channels of uint16; it takes uint8"):
        tiles.segment(brightest, PALETTE, deep, out, data=RGB)
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes(b"II*\0" + b"\xff" * 40)
    with pytest.raises(UserError, match=r"damaged\.tif cannot be segmented in tiles"):
        tiles.segment(brightest, PALETTE, damaged, out, data=RGB)
    # A virtual format would have GDAL open whatever file it names.
    virtual = tmp_path / "virtual.tif"
    virtual.write_text(
        '<VRTDataset rasterXSize="210" rasterYSize="150"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{deep}</SourceFilename><SourceBand>1</SourceBand>"
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(UserError, match=r"virtual\.tif cannot be segmented in tiles"):
        tiles.segment(brightest, PALETTE, virtual, out, data=RGB)
    path = save(rasterio, tmp_path / "strip.tif", picture(), blockysize=150, compress="deflate")
    monkeypatch.setattr(tiles, "_MOST_BLOCK", 150 * 210 * 3 - 1)
    with pytest.raises(UserError, match="stored in blocks of 31500 px"):
        tiles.segment(brightest, PALETTE, path, out, data=RGB)
    with pytest.raises(UserError, match="The overlap is 64 px; it is at least 0"):
        tiles.segment(brightest, PALETTE, path, out, tile=64, overlap=64, data=RGB)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_predict_hands_tiffs_to_the_tiles_and_reads_the_others(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.TIFF").write_bytes(b"not read")
    calls = []

    def in_tiles(image, index, confidence):
        assert index.parent.is_dir()
        calls.append((image.name, index, confidence))

    out = tmp_path / "out"
    options = {"class_names": ("a", "b", "c"), "in_tiles": in_tiles}
    predict_folder(brightest, folder, out, extras=Extras(confidence=True), **options)
    assert calls == [("a.TIFF", out / "deep" / "a.tif", out / "deep" / "a_confidence.tif")]
    with pytest.raises(UserError, match="--tile goes with --confidence, but not with --soft"):
        predict_folder(brightest, folder, out, extras=Extras(soft=True), **options)

    def refuses(image, index, confidence):
        raise UserError("it has 2 channels")

    with pytest.raises(UserError, match=r"could not be read: deep/a\.TIFF \(it has 2 channels\)"):
        predict_folder(brightest, folder, out, **options | {"in_tiles": refuses})
