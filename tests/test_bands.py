"""Images that keep the values of their files: grey, multispectral, of 16 bits and of floats."""

import importlib.util
import logging

import cells
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_cases import data_config, take
from PIL import Image
from safetensors.numpy import save_file
from tiny import CLASSES, tiny_config
from toy_network import ToyNetwork

import csc_jax
from csc_jax import augment, data, methods, models
from csc_jax import config as config_lib
from csc_jax.config import bands as fields
from csc_jax.config import checks as config_checks
from csc_jax.data import codec, moments, raster, transforms
from csc_jax.deploy import export as export_lib
from csc_jax.deploy import predict_files as predict_files_lib
from csc_jax.deploy import tiles, video, weights
from csc_jax.deploy.label import label
from csc_jax.errors import UserError
from csc_jax.evaluation.predict import Extras
from csc_jax.models import first_layer
from csc_jax.models.weights import load_pretrained, to_torch_state_dict
from csc_jax.optimizer import combine
from csc_jax.reporting import visualize
from csc_jax.training.loop import train
from csc_jax.training.step import init_state, train_step

TYPES = ("uint8", "uint16", "float32")


def bands_config(tmp_path, **values):
    return data_config(tmp_path, name="folder", labeled_fraction="1", **values)


def random(dtype, size=(12, 10), bands=5, seed=0):
    values = np.random.default_rng(seed).random((*size, bands)) * 250
    return values.astype(dtype)


# ---- Config --------------------------------------------------------------------------------------


def test_what_an_image_holds_follows_from_bands_mean_and_type():
    c = config_lib.default_config().data
    assert not fields.keeps_values(c)
    for name, value in (("bands", 1), ("pixel_type", "uint16"), ("mean", ())):
        other = c.copy_and_resolve_references()
        other[name] = value
        assert fields.keeps_values(other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bands": 4, "mean": (1.0, 2.0), "std": (1.0, 2.0)}, "it takes a number for each band"),
        ({"mean": ()}, "give both, or"),
        ({"bands": 2, "mean": (1.0, 2.0), "std": (1.0, 0.0)}, "a deviation is above 0"),
        ({"bands": 1, "mean": (float("nan"),), "std": (1.0,)}, "finite"),
        ({"bands": 1, "image_bits": 12}, r"image_bits is 12.*keep their values"),
        ({"bands": 1, "name": "camvid"}, "goes with data.name=folder, not with 'camvid'"),
        ({"bands": 65}, "data.bands is 65; it must be between 1 and 64"),
        ({"pixel_type": "int16"}, "data.pixel_type is 'int16'; it takes one of"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(values, message):
    c = config_lib.default_config()
    c.data.name = "folder"
    c.data.update(values)
    with pytest.raises(UserError, match=message):
        config_checks.validate(c)


def test_what_is_measured_fills_what_is_not_given():
    found = {"mean": [5, 6], "std": [1, 2], "pixel_type": "uint16"}
    c = config_lib.default_config()
    assert fields.with_measured(c, found).data == c.data  # RGB of 8 bits is as it was
    c.data.name, c.data.bands = "folder", 2
    filled = fields.with_measured(c, found)
    assert (filled.data.mean, filled.data.std, filled.data.pixel_type) == ((5, 6), (1, 2), "uint16")
    fields.check(filled.data)
    again = config_lib.from_plain(config_lib.to_plain(filled))
    other = {"mean": [0, 0], "std": [9, 9], "pixel_type": "uint8"}
    assert fields.with_measured(again, other).data == filled.data
    assert fields.found_by(config_lib.to_plain(filled), 2)["mean"] == [5, 6]
    assert fields.found_by(config_lib.to_plain(filled), 1) is None
    assert fields.found_by(config_lib.to_plain(c), 2) is None
    c.data.mean = c.data.std = (3.0, 4.0)
    assert fields.with_measured(c, found).data.mean == (3, 4)


# ---- Data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bands", [1, 3, 5])
def test_what_is_stored_comes_back(dtype, bands):
    image = random(dtype, bands=bands)
    stored = codec.encode_image(image)
    found = codec.decode_image(stored)
    assert found.dtype == image.dtype
    np.testing.assert_array_equal(found, image)
    for damaged in (stored[:-5], stored[:15], stored[:21], stored[:9] + b"\xff" * 12 + stored[21:]):
        found = codec.decode_image(damaged)
        assert found is None or (found.shape == image.shape and dtype == "uint8" and bands == 3)


def test_moments_of_parts_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(moments, "_AT_ONCE", 7)
    images = [random("float32", (n, 9), bands=2, seed=n) + 1e6 for n in (3, 1, 8)]
    total = moments.nothing(2)
    for image in images:
        total = total.joined(moments.of_image(image))
    pixels = np.concatenate([image.reshape(-1, 2) for image in images]).astype(np.float64)
    assert total.pixels == len(pixels)
    np.testing.assert_allclose(total.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.deviation, pixels.std(axis=0), rtol=1e-9)
    assert moments.constant([1.0, 0.0, float("nan")]) == [2, 3]


@pytest.mark.parametrize(("bands", "dtype"), [(1, "uint16"), (4, "float32"), (2, "uint8")])
def test_a_folder_is_stored_without_loss_and_measured(tmp_path, bands, dtype, caplog):
    caplog.set_level(logging.INFO, "csc_jax")
    root = cells.tree(tmp_path / "root", 7, 3, (40, 36), bands, dtype)
    config = bands_config(tmp_path, bands=bands)
    dataset = data.load(config.data)
    assert dataset.pixels["pixel_type"] == dtype
    images = [dataset.sources["train"][i]["image"] for i in range(5)]
    pages = cv2.imdecodemulti(
        np.fromfile(root / "images/train/002.tif", np.uint8), cv2.IMREAD_UNCHANGED
    )[1]
    np.testing.assert_array_equal(images[0], np.stack(pages, axis=-1))
    assert images[0].dtype == dtype
    pixels = np.stack(images).reshape(-1, bands).astype(np.float64)  # of train alone
    np.testing.assert_allclose(dataset.pixels["mean"], pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(dataset.pixels["std"], pixels.std(axis=0), rtol=1e-9)
    assert f"{dtype} of {bands} band" in caplog.text
    again = data.load(fields.with_measured(config, dataset.pixels).data)
    assert dict(again.pixels) == dict(dataset.pixels)


def test_a_preparation_that_was_cut_off_measures_all_images(tmp_path, monkeypatch):
    cells.tree(tmp_path / "root", 7, 3, (24, 24))
    config = bands_config(tmp_path, bands=1)
    (tmp_path / "root/images/val/001.tif").rename(tmp_path / "kept")
    (tmp_path / "root/images/val/001.tif").write_bytes(b"II*\0")
    with pytest.raises(UserError, match=r"val/001\.tif is corrupt"):
        data.load(config.data)
    (tmp_path / "kept").rename(tmp_path / "root/images/val/001.tif")
    read = []
    decode = raster.decode
    monkeypatch.setattr(raster, "decode", lambda *a: read.append(0) or decode(*a))
    found = data.load(config.data).pixels
    assert len(read) == 1  # the others were checked before
    other = bands_config(tmp_path, bands=1, cache_dir=str(tmp_path / "other"))
    assert dict(found) == dict(data.load(other.data).pixels)


def test_images_that_do_not_belong_together_are_named(tmp_path):
    root = cells.tree(tmp_path / "root", 7, 3, (24, 24))
    one = root / "images/train/003.tif"
    cells.write(one, random("uint8", (24, 24), 1), "uint8")
    with pytest.raises(
        UserError, match=r"images of uint16 .* and of uint8 \(the first is train/003"
    ):
        data.load(bands_config(tmp_path, bands=1).data)
    cells.write(one, np.full((24, 24, 1), np.inf, np.float32), "float32")
    with pytest.raises(UserError, match=r"003\.tif holds 576 values that are NaN or infinite"):
        data.load(bands_config(tmp_path, bands=1).data)
    cells.write(one, random("uint16", (24, 24), 2), "uint16")
    with pytest.raises(
        UserError, match=r"003\.tif holds 2 pages of 1 channels, but data.bands is 1"
    ):
        data.load(bands_config(tmp_path, bands=1).data)


def test_a_band_that_tells_nothing_and_another_type_are_refused(tmp_path):
    root = tmp_path / "root"
    cells.tree(root, 7, 3, (24, 24), 2)
    for path in root.glob("images/train/*.tif"):
        image = random("uint16", (24, 24), 2)
        image[..., 1] = 7
        cells.write(path, image, "uint16")
    with pytest.raises(UserError, match="Band 2 of the 2 holds one value in all train images"):
        data.load(bands_config(tmp_path, bands=2).data)
    given = {"mean": (100.0, 7.0), "std": (50.0, 1.0)}
    data.load(bands_config(tmp_path, bands=2, **given).data)
    with pytest.raises(UserError, match=r"pixel_type is .float32., but .* are of uint16"):
        data.load(bands_config(tmp_path, bands=2, pixel_type="float32", **given).data)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bands", [1, 2, 5])
def test_geometry_is_that_of_each_band(dtype, bands):
    """Each band is cropped, scaled, padded and resized as a grey image of its own would be."""
    image, label = random(dtype, (20, 30), bands), np.zeros((20, 30), np.uint8)
    fill = tuple(float(10 + k) for k in range(bands))

    def crop(part, values):
        rng = np.random.default_rng(3)
        return transforms.random_resized_crop(part, label, rng, (0.5, 2.0), (24, 20), values)[0]

    whole = crop(image, fill)
    assert whole.shape == (24, 20, bands)
    assert whole.dtype == dtype
    small, (mirrored,) = transforms.resize_image(image, (9, 11)), flipped(image)
    for k in range(bands):
        one = image[..., k : k + 1]
        np.testing.assert_array_equal(whole[..., k : k + 1], crop(one, fill[k : k + 1]))
        expected = cv2.resize(one[..., 0], (11, 9), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(small[..., k], expected)
        assert (crop(one, fill[k : k + 1]) == fill[k]).any()
    np.testing.assert_array_equal(mirrored, image[:, ::-1])


def flipped(image):
    class Always:
        def random(self):
            return 0.0

    return transforms.random_flip((image,), Always())


def test_batches_are_of_the_bands_and_padded_with_the_mean(tmp_path):
    cells.tree(tmp_path / "root", 7, 3, (30, 30), 2, "float32")
    config = bands_config(tmp_path, bands=2, crop_size=(28, 28), scale_range=(0.5, 1.0))
    dataset = data.load(config.data)
    config = fields.with_measured(config, dataset.pixels)
    partition = data.partition(config.data, dataset, seed=0)
    batches = take(data.train_iterator(config, dataset, partition), 3)
    expected = data.abstract_batch(config)
    for batch in batches:
        for half, values in batch.items():
            for name, array in values.items():
                like = expected[half][name]
                assert (array.shape, array.dtype) == (like.shape, like.dtype)
            outside = values["image"][~values["inside"]]
            np.testing.assert_allclose(outside, np.tile(config.data.mean, (len(outside), 1)), 1e-6)
    assert any(not b["labeled"]["inside"].all() for b in batches)


# ---- Views ---------------------------------------------------------------------------------------


def test_brightness_and_contrast_belong_to_each_band_in_its_units():
    view = tiny_config(method__color_jitter=1.0, method__grayscale=1.0).method
    images = random("float32", (8, 8), 3)[None] + 100
    std = (10.0, 20.0, 30.0)
    key = jax.random.key(0)
    found = np.asarray(augment.photometric_bands(key, images, view, std))[0]
    factors, shifts = [], []
    for k in range(3):
        before, after = images[0, ..., k].ravel(), found[..., k].ravel()
        factor, rest = np.polyfit(before, after, 1)
        np.testing.assert_allclose(after, factor * before + rest, rtol=1e-4)
        factors.append(factor)
        shifts.append((after.mean() - before.mean()) / std[k])
    assert all(0.5 <= factor <= 1.5 for factor in factors)
    assert all(-1 <= shift <= 1 for shift in shifts)
    assert len({round(float(n), 3) for n in factors + shifts}) == 6
    # In other units of the same images the view is the same.
    units = augment.photometric_bands(key, images * 4 - 7, view, tuple(4 * s for s in std))
    np.testing.assert_allclose(units[0], found * 4 - 7, rtol=1e-4)
    off = tiny_config(method__grayscale=1.0).method
    np.testing.assert_array_equal(augment.photometric_bands(key, images, off, std), images)


# ---- Networks ------------------------------------------------------------------------------------


def test_a_first_convolution_of_rgb_sees_grey_and_repeated_bands_as_before():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    patch = rng.normal(size=(3, 3, 3)).astype(np.float32)  # channels first

    def seen(weight, image):
        return np.einsum("oikl,ikl->o", weight, image)

    grey = patch[:1]
    found = seen(first_layer.adapt(kernel, 1), grey)
    np.testing.assert_allclose(found, seen(kernel, np.repeat(grey, 3, 0)), rtol=1e-4)
    twice = first_layer.adapt(kernel, 6)
    np.testing.assert_allclose(
        seen(twice, np.concatenate([patch, patch])), seen(kernel, patch), rtol=1e-4
    )
    four = first_layer.adapt(kernel, 4)
    np.testing.assert_allclose(four[:, 3], kernel[:, 0] * 0.75, rtol=1e-6)
    assert first_layer.adapt(kernel, 3) is kernel
    own = np.zeros((4, 5, 3, 3), np.float32)
    assert first_layer.adapt(own, 2) is own


@pytest.mark.parametrize("backbone", ["resnet10", "efficientnet_lite0", "vit_tiny"])
@pytest.mark.parametrize("bands", [1, 4])
def test_pretrained_weights_of_rgb_start_a_network_of_bands(backbone, bands, tmp_path, caplog):
    caplog.set_level(logging.INFO, "csc_jax")
    config = tiny_config(model__backbone=backbone, data__crop_size=(64, 64)).model
    rgb, network = (models.build(config, 3, False, bands=n) for n in (3, bands))
    shapes = [
        jax.eval_shape(lambda key, n=n: models.initialize(n, key), jax.random.key(0))
        for n in (rgb, network)
    ]
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes[0])
    save_file(to_torch_state_dict(drawn), tmp_path / "rgb.safetensors")
    found = load_pretrained(str(tmp_path / "rgb.safetensors"), shapes[1])
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, shapes[1])
    changed = [
        path
        for (path, a), b in zip(
            jax.tree.leaves_with_path(found["params"]),
            jax.tree.leaves(drawn["params"]),
            strict=True,
        )
        if a.shape != b.shape
    ]
    assert len(changed) == 1
    first, before = (
        jax.tree.leaves({"x": tree["params"]["backbone"][changed[0][1].key]})
        for tree in (found, drawn)
    )
    (kernel,), (old,) = ([leaf for leaf in leaves if leaf.ndim == 4] for leaves in (first, before))
    expected = old.sum(axis=2, keepdims=True) if bands == 1 else old[:, :, [0, 1, 2, 0]] * 0.75
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)
    assert "The first convolution, of RGB, is" in caplog.text


def test_a_stem_of_one_band_is_no_depthwise_convolution():
    config = tiny_config(model__width=64).model
    network = models.build(config, 3, False, bands=1)
    kernel = models.initialize(network, jax.random.key(0))["params"]["backbone"]["stem1"]["conv"][
        "kernel"
    ]
    assert kernel.shape == (7, 7, 1, 64)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (64 * 49)), rtol=0.05)


@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize("method", methods.available())
def test_every_method_steps_on_images_of_bands(method, bands):
    """Traced, not compiled: all shapes and types of a step, its strong views included."""
    config = tiny_config(
        method__name=method,
        data__name="folder",
        data__bands=bands,
        data__mean=(300.0,) * bands,
        data__std=(20.0,) * bands,
        data__pixel_type="uint16",
        method__color_jitter=0.5,
        method__grayscale=0.2,
        method__blur=0.5,
    )
    config = config_lib.resolve(config, steps_per_epoch=4)
    model = ToyNetwork(CLASSES, config.model.projection_dim, bands=bands)
    built = methods.build(methods.Task(config, model, CLASSES, config.train.steps))
    tx = combine(built.optimizers())
    state = jax.eval_shape(lambda: init_state(built, tx, 0, {}))
    batch = data.abstract_batch(config)
    after, metrics = jax.eval_shape(lambda s, b: train_step(built, tx, 0, s, b), state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == ()


# ---- Drawing -------------------------------------------------------------------------------------


def test_bands_are_drawn_by_their_percentiles():
    grey = random("uint8", bands=1)
    np.testing.assert_array_equal(visualize.as_rgb(grey), grey.repeat(3, axis=-1))
    rgb = random("uint8", bands=3)
    np.testing.assert_array_equal(visualize.as_rgb(rgb), rgb)
    ramp = np.linspace(0, 1, 101 * 4, dtype=np.float32).reshape(101, 4)
    deep = np.stack([ramp, 1000 - 300 * ramp, np.full_like(ramp, 7), ramp, ramp], axis=-1)
    drawn = visualize.as_rgb(deep)
    assert drawn.shape == (101, 4, 3)
    np.testing.assert_allclose(drawn[..., 0], np.clip((ramp - 0.005) / 0.99, 0, 1) * 255, atol=1)
    np.testing.assert_allclose(drawn[..., 1].astype(int), 255 - drawn[..., 0].astype(int), atol=1)
    assert not drawn[..., 2].any()
    two = visualize.as_rgb(deep[..., :2])
    np.testing.assert_array_equal(two[..., :2], drawn[..., :2])
    assert not two[..., 2].any()
    overlay = visualize.overlay(deep, np.zeros((101, 4), np.uint8), np.zeros((1, 3), np.uint8))
    assert overlay.shape == (101, 4, 3)


# ---- A run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training on a grey data set of 16 bits, and its config."""
    folder = tmp_path_factory.mktemp("run")
    cells.tree(folder / "data", 8, 4, (40, 40))
    config = tiny_config(
        folder,
        data__name="folder",
        data__root=str(folder / "data"),
        data__bands=1,
        data__labeled_fraction="1",
        method__name="cutmix_mean_teacher",
        method__color_jitter=0.5,
        train__steps=2,
        train__eval_every=2,
        train__panels=1,
    )
    train(config, folder / "w")
    return folder, config


@pytest.mark.slow
def test_a_run_carries_what_it_measured(run, caplog):
    folder, config = run
    model = csc_jax.load(folder / "w")
    found = data.load(config.data).pixels
    of_model = model.description.config.data
    assert list(of_model.mean) == found["mean"]
    assert list(of_model.std) == found["std"]
    assert of_model.pixel_type == "uint16"
    assert (folder / "w/plots").is_dir()
    # New images change what is measured, not how the network sees them.
    extra = folder / "data/images/train/new.tif"
    cells.write(extra, np.full((40, 40, 1), 4000), "uint16")
    try:
        other = config.copy_and_resolve_references()
        other.train.steps, other.checkpoint.allow_new_unlabeled = 3, True
        train(other, folder / "w")
    finally:
        extra.unlink()
    again = csc_jax.load(folder / "w")
    assert again.description.step == 3
    assert again.description.config.data == of_model


def test_a_network_takes_images_of_its_bands_and_type(run):
    folder, _ = run
    model = csc_jax.load(folder / "w")
    path = folder / "data/images/val/000.tif"
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    expected = model.predict(path)
    assert expected.image.shape == (40, 40, 1)
    assert expected.overlay().shape == (40, 40, 3)
    for given in (image, image[..., None], Image.fromarray(image), image.astype(">u2")):
        np.testing.assert_array_equal(model.predict(given).classes, expected.classes)
    for given, message in (
        (image.astype(np.uint8), "is of uint8; the network was trained on uint16"),
        (image.astype(np.float32), "is of float32; the network was trained on uint16"),
        (np.repeat(image[..., None], 3, -1), "has 3 bands; the network was trained on 1"),
        (image[None, ..., None], r"takes \(H, W, 1\), or \(H, W\)"),
    ):
        with pytest.raises(UserError, match=message):
            model.predict(given)


def test_what_to_label_next_is_asked_of_the_network_as_it_was_trained(run, tmp_path):
    folder, config = run  # whose config leaves mean, deviation and type to be measured
    label(config, folder / "w", "latest", tmp_path)
    model = csc_jax.load(folder / "w")
    masks = [tmp_path / f"masks/train/{image}.png" for image in ("006", "007")]
    for path in masks:
        expected = model.predict(folder / f"data/images/train/{path.stem}.tif").classes
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)


def test_files_for_a_network_of_bands(run, tmp_path, monkeypatch):
    folder, config = run
    out = tmp_path / "out"

    def predict(images, **options):
        predict_files_lib.predict_files(
            config, folder / "w", "latest", images, out, extras=Extras(), **options
        )

    predict(folder / "data/images/val")
    assert (out / "000.png").is_file()
    assert codec.decode_image((out / "000_overlay.png").read_bytes()).shape[-1] == 3
    (tmp_path / "images").mkdir()
    cells.write(tmp_path / "images/a.tif", random("float32", (20, 20), 1), "float32")
    with pytest.raises(UserError, match=r"a\.tif is of float32; the network was trained on uint16"):
        predict(tmp_path / "images")
    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(video, "library", lambda path: None)  # PyAV need not be installed
    with pytest.raises(UserError, match="frames are RGB of 8 bits, but the network was trained"):
        predict(tmp_path / "a.mp4")


def test_a_file_of_weights_knows_its_bands(run, tmp_path):
    folder, _ = run
    model = csc_jax.load(folder / "w")
    weights.write_file(tmp_path / "net.safetensors", model.description, model.arrays)
    loaded = csc_jax.load(tmp_path / "net.safetensors")
    found, expected = (m.description.config.data for m in (loaded, model))
    for name in ("bands", "mean", "std", "pixel_type"):
        assert found[name] == expected[name]
    with pytest.raises(UserError, match="has 4 bands; the network was trained on 1"):
        loaded.predict(np.zeros((8, 8, 4), np.uint16))


@pytest.mark.parametrize(
    ("file_format", "packages"),
    [
        pytest.param("stablehlo", ("flatbuffers",), marks=pytest.mark.parity),
        # Not of `make parity`: pip cannot install it beside this package's Orbax (docs/deploy.md).
        ("onnx", ("jax2onnx", "onnxruntime")),
    ],
)
def test_exported_programs_take_the_same_images(run, file_format, packages, tmp_path):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder, config = run
    out = tmp_path / f"net.{file_format}"
    # Compares the file with the run on images of its bands and type, and refuses to keep another.
    export_lib.export(
        config, folder / "w", "latest", file_format=file_format, out=out, size=(32, 32)
    )
    if file_format == "stablehlo":
        loaded = csc_jax.load(out)
        with pytest.raises(UserError, match="has 4 bands; the network was trained on 1"):
            loaded.predict(np.zeros((8, 8, 4), np.uint16))


@pytest.mark.parity
def test_tiles_keep_the_values_of_their_bands(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed (extra tiles)")
    config = tiny_config(data__name="folder", data__bands=5)
    config = fields.with_measured(config, None)
    config.data.pixel_type = "float32"
    image = random("float32", (70, 90), 5)
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "height": 70, "width": 90, "count": 5, "dtype": "float32"}
    with rasterio.open(path, "w", transform=rasterio.Affine(2, 0, 0, 0, -2, 0), **profile) as file:
        file.write(image.transpose(2, 0, 1))
    np.testing.assert_array_equal(raster.decode(path.read_bytes(), 5).pixels, image)

    def brightest(part):
        assert part.dtype == np.float32
        return type("Found", (), {"classes": part.argmax(axis=-1).astype(np.uint8)})

    palette = np.zeros((5, 3), np.uint8)
    out = tmp_path / "out.tif"
    tiles.segment(brightest, palette, path, out, data=config.data, tile=64)
    with rasterio.open(out) as file:
        np.testing.assert_array_equal(file.read(1), image.argmax(axis=-1))
    config.data.bands = 4
    with pytest.raises(UserError, match="has 5 bands; the network was trained on 4"):
        tiles.segment(brightest, palette, path, out, data=config.data, tile=64)
