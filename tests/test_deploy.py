"""A trained network as a user has it: images of all kinds in, classes and confidence out."""

import json
import subprocess
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image
from saved_run import STEP, save_run
from tiny import tiny_config

import csc_jax
from csc_jax import evaluation, main, stored_config
from csc_jax.data import codec, transforms
from csc_jax.deploy import description as description_lib
from csc_jax.deploy import weights
from csc_jax.deploy.description import Description
from csc_jax.deploy.model import Model
from csc_jax.deploy.predict_files import predict_files
from csc_jax.errors import UserError
from csc_jax.evaluation import score
from csc_jax.evaluation.predict import Extras

PALETTE = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose networks have both heads that only training needs."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, method__name="csc", loss__aux_weight=0.4)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return csc_jax.load(run)


def toy(seen=None, **fields):
    """A model whose logits are the channels of the image, divided by 50."""
    config = tiny_config(**fields)

    def scores(images):
        if seen is not None:
            seen.append(images.shape)
        return jnp.asarray(images, jnp.float32) / 50

    return Model(Description(NAMES, PALETTE, config, STEP), scores)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_importing_the_package_leaves_jax_alone():
    code = "import sys, csc_jax; assert 'jax' not in sys.modules; csc_jax.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no attribute 'nothing'" in done.stderr


def test_a_run_predicts_what_its_evaluation_does(run, model):
    image = picture(40, 56)
    result = model.predict(image, probabilities=True)
    experiment, network, _ = score.load(stored_config.get_config(str(run)), run, "latest")
    np.testing.assert_array_equal(result.classes, experiment.segment(network, image))
    logits = np.asarray(experiment.predict_logits(network.variables, image[None]))[0]
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
    for each in (result, model.predict(image)):  # computed on the host and on the device
        assert (each.classes.dtype, each.confidence.dtype) == (np.uint8, np.float32)
        np.testing.assert_allclose(each.confidence, expected.max(axis=-1), atol=1e-5)
        np.testing.assert_array_equal(each.classes, result.classes)
    assert model.description.step == STEP
    assert len(model.class_names) == len(model.palette) == logits.shape[-1]


def test_fields_of_the_evaluation_can_be_others(run):
    mirrored = csc_jax.load(run, flip=True, size_multiple=16)
    image = picture(20, 28)
    result = mirrored.predict(image, probabilities=True)
    assert result.classes.shape == (20, 28)
    np.testing.assert_allclose(result.probabilities.sum(axis=-1), 1, atol=1e-5)
    other = mirrored.predict(image[:, ::-1], probabilities=True).probabilities[:, ::-1]
    np.testing.assert_allclose(result.probabilities, other, atol=1e-4)
    with pytest.raises(UserError, match=r"size is no field of config\.eval"):
        csc_jax.load(run, size=3)
    with pytest.raises(UserError, match=r"eval\.mode is 'all'; it takes one of"):
        csc_jax.load(run, mode="all")
    with pytest.raises(UserError, match=r"eval\.mode is 'center_crop'\. Set it to"):
        csc_jax.load(run, mode="center_crop")


def test_all_that_is_an_image_is_one(tmp_path):
    model, image = toy(), picture(7, 9)
    grey = image[..., 0]
    path = tmp_path / "an image.png"
    path.write_bytes(codec.encode_png(image))
    alpha = np.concatenate([image, grey[..., None]], axis=-1)
    for given in (image, path, str(path), Image.fromarray(image), alpha, image[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(model.predict(given).image, image)
    for given in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(model.predict(given).image, np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "array of float32; it takes uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\); it takes"),
        (np.zeros((2, 4, 4, 3), np.uint8), "Several images are given as a list"),
        (np.zeros((0, 4, 3), np.uint8), "0x4 px; it needs at least one"),
        (Image.fromarray(np.zeros((4, 4), np.int32)), "Pillow's mode 'I'; it takes 8 bits"),
        (3, "not 'int'"),
        ("no such file.png", "no such file.png cannot be read"),
        ("a\0b", "no path holds a NUL"),
    ],
)
def test_what_is_no_image_is_an_error(given, message):
    with pytest.raises(UserError, match=message):
        toy().predict(given)
    with pytest.raises(UserError, match=f"Image 1 of 2: .*{message}"):
        toy().predict([picture(4, 4), given])


def test_a_large_image_is_refused(monkeypatch):
    monkeypatch.setattr(codec, "MAX_PIXELS", 1199)
    for image in (picture(30, 40), Image.fromarray(picture(30, 40))):
        with pytest.raises(UserError, match="30x40 px, more than the 1199"):
            toy().predict(image)


def test_a_list_keeps_its_order_and_sizes_run_together():
    seen = []
    model = toy(seen, batch__eval=2)
    sizes = [(4, 6), (5, 5), (4, 6), (4, 6), (5, 5)]
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    results = model.predict(images)
    assert seen == [(2, 4, 6, 3), (1, 4, 6, 3), (2, 5, 5, 3)]
    for image, result in zip(images, results, strict=True):
        np.testing.assert_array_equal(result.image, image)
        np.testing.assert_array_equal(result.classes, image.argmax(axis=-1))
    assert model.predict([]) == []


def test_an_image_of_another_size_comes_back_at_its_own():
    seen = []
    model = toy(seen, data__image_size=(12, 20))
    image = cv2.resize(picture(6, 10), (100, 60), interpolation=cv2.INTER_NEAREST)
    result = model.predict(image, probabilities=True)
    assert seen == [(1, 12, 20, 3)]
    logits = transforms.resize_image(image, (12, 20)).astype(np.float32) / 50
    logits = cv2.resize(logits, (100, 60), interpolation=cv2.INTER_LINEAR)
    expected = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(result.confidence, expected.max(axis=-1), atol=1e-5)
    np.testing.assert_array_equal(result.classes, logits.argmax(axis=-1))


def test_an_overlay_shows_the_classes_colours():
    image = picture(20, 200)
    result = toy().predict(image)
    expected = (image.astype(float) + PALETTE[image.argmax(axis=-1)]) / 2
    np.testing.assert_allclose(result.overlay(), expected, atol=0.5)
    with_legend = result.overlay(legend=True)
    assert len(with_legend) > 20
    np.testing.assert_array_equal(with_legend[:20], result.overlay())


def test_weights_and_bundle_are_the_run(run, model, tmp_path):
    """The evaluated network alone: no head of the training, no path of the machine."""
    source = csc_jax.load(run)
    arrays = source.arrays
    heads = {name.split("/")[1] for name in arrays}
    assert {"backbone", "classifier"} <= heads
    assert not heads & {"projection", "auxiliary"}
    weights.write_file(tmp_path / "w.safetensors", source.description, arrays)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    weights.write_bundle(bundle, source.description, arrays, "# Card\n")
    image = picture(24, 36)
    expected = model.predict(image)
    for path in (tmp_path / "w.safetensors", bundle):
        loaded = csc_jax.load(path)
        np.testing.assert_array_equal(loaded.predict(image).confidence, expected.confidence)
        assert loaded.class_names == model.class_names
        assert loaded.description.step == STEP
        np.testing.assert_array_equal(loaded.palette, model.palette)
    assert str(run) not in (bundle / "config.json").read_text()
    assert str(run).encode() not in (tmp_path / "w.safetensors").read_bytes()


@pytest.fixture
def bundle(run, model, tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    weights.write_bundle(folder, model.description, model.arrays, "")
    return folder


def with_values(bundle, file, **values):
    content = json.loads((bundle / file).read_text())
    for name, value in values.items():
        if "__" in name:
            content["config"][name.replace("__", ".")] = value
        else:
            content[name] = value
    (bundle / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"format": 2}, "has the format 2, this version of csc_jax reads 1"),
        ("config.json", {"config": 3}, "does not describe a network"),
        ("config.json", {"model__width": 8}, "weights in .* are not those of its config"),
        ("config.json", {"model__width": 10**9}, "model.width is 1000000000; at most"),
        ("config.json", {"model__width": "4"}, "does not describe a network"),
        ("config.json", {"model__backbone": "vgg"}, "model.backbone is 'vgg'"),
        ("config.json", {"model__aspp_rates": [1] * 99}, "model.aspp_rates has 99 values"),
        ("config.json", {"eval__scales": [1000.0]}, "eval.scales"),
        ("config.json", {"data__image_size": [10**6, 10**6]}, "data.image_size is 1000000"),
        ("config.json", {"model__nothing": 1}, "the field 'model.nothing'"),
        ("classes.json", {"classes": []}, "0 classes"),
        ("classes.json", {"classes": [{"name": "a", "color": [1, 2, 300]}]}, "is no colour"),
        ("classes.json", {"classes": [{"name": "a"}]}, "does not describe a network"),
        ("classes.json", {"classes": [{"name": "a", "color": [1, 2, 3]}]}, "classifier/out"),
    ],
)
def test_a_bundle_from_anywhere_ends_in_an_error_of_ours(bundle, file, values, message):
    with_values(bundle, file, **values)
    with pytest.raises(UserError, match=message):
        csc_jax.load(bundle)


def test_files_that_are_no_bundle_are_named(bundle, tmp_path):
    (bundle / "classes.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no JSON"):
        csc_jax.load(bundle)
    (bundle / "classes.json").write_text("[]")
    with pytest.raises(UserError, match="must each hold a JSON object"):
        csc_jax.load(bundle)
    (bundle / "classes.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(UserError, match="more than 1048576 bytes"):
        csc_jax.load(bundle)
    (bundle / "classes.json").unlink()
    with pytest.raises(UserError, match=r"has no classes\.json and no checkpoints"):
        csc_jax.load(bundle)
    other = bundle / "weights.safetensors"
    with pytest.raises(UserError, match="weights without a config"):
        csc_jax.load(other)
    other.write_bytes(other.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as a file of weights"):
        csc_jax.load(other)
    with pytest.raises(UserError, match=r"is no model\. Give the work directory"):
        csc_jax.load(tmp_path / "nothing")


def test_paths_of_the_machine_stay_here():
    config = tiny_config(data__root="/home/me/secret", model__pretrained="/home/me/w.pth")
    config.data.labeled_list = "/home/me/list"
    text = json.dumps(Description(NAMES, PALETTE, config, 0).as_json())
    assert "/home/me" not in text
    config.model.pretrained = "hf:a/b/c.safetensors"
    values = Description(NAMES, PALETTE, config, 0).as_json()
    assert values["config"]["model.pretrained"] == "hf:a/b/c.safetensors"
    parsed = description_lib.parse(json.loads(json.dumps(values)), "here")
    assert parsed.class_names == NAMES
    assert parsed.config.data.crop_size == config.data.crop_size


def test_the_command_predicts_what_the_model_does(run, model, tmp_path, capsys, monkeypatch):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    image = picture(20, 24)
    (images / "a.png").write_bytes(codec.encode_png(image))
    command = ["csc-jax", "--mode=predict", f"--workdir={run}", f"--out={out}"]
    with flagsaver.flagsaver():
        assert main.main([*command, f"--images={images}", "--confidence", "--soft"]) == 0
    expected = model.predict(image, probabilities=True)
    with Image.open(out / "a.png") as stored:
        np.testing.assert_array_equal(np.asarray(stored), expected.classes)
    with np.load(out / "a_probabilities.npz") as stored:
        np.testing.assert_allclose(stored["probabilities"], expected.probabilities, atol=1e-3)
    assert (out / "a_confidence.png").is_file()

    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    video = tmp_path / "a.mp4"
    video.touch()
    for arguments, message in (
        ([f"--images={video}", "--soft"], "is a video, of which an overlay is written"),
        ([f"--images={video}"], "csc-jax[video]"),
        ([f"--images={images}", "--tile=64"], "csc-jax[tiles]"),
    ):
        with flagsaver.flagsaver():
            assert main.main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    config = tiny_config(data__image_size=(8, 8))
    with pytest.raises(UserError, match=r"--tile is 64, but data\.image_size is \(8, 8\)"):
        predict_files(config, run, "latest", images, out, extras=Extras(), tile=64)


def test_predictions_replace_no_labels(tmp_path):
    """As with --images=DIR/images --out=DIR/labels, whose files have the same names."""
    config = tiny_config(data__name="folder", data__root=str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    images, labels = tmp_path / "Images", tmp_path / "labels"
    images.symlink_to(elsewhere)
    for out in (tmp_path, labels, tmp_path / "link" / "labels" / "new", elsewhere / "new"):
        labels.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"--out=.* lies in data\.root .* replace the labels"):
            predict_files(config, tmp_path, "latest", images, out, extras=Extras())
        assert not (tmp_path / "labels" / "new").exists()
    # What lies beside them is free, but nothing is in a data set of other folders.
    evaluation.check_outside(tmp_path / "runs" / "label", str(tmp_path), "--out")
    labels.rmdir()
    with pytest.raises(UserError, match="replace the labels"):
        evaluation.check_outside(tmp_path / "runs" / "label", str(tmp_path), "--out")
