"""`predict_folder` on a network that names the brightest channel."""

import dataclasses

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from csc_jax import config as config_lib
from csc_jax import evaluation
from csc_jax.errors import UserError
from csc_jax.experiment import build
from csc_jax.predict import predict_folder
from csc_jax.state import Network

PALETTE = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)


@pytest.fixture(scope="module")
def predict(mesh1):
    predictor = evaluation.make_predictor(
        lambda variables, images: images.astype(jnp.float32) * variables["scale"],
        lambda size: size,
        num_classes=3,
        mode="whole",
        window=(0, 0),
        mesh=mesh1,
    )
    return lambda image: np.asarray(predictor({"scale": jnp.float32(2)}, image[None]))[0]


def run(predict, images, out, **options):
    options = {"palette": PALETTE, "image_size": (0, 0)} | options
    return predict_folder(predict, images, out, **options)


def save(path, classes):
    """Writes an image whose brightest channel is the class id of each pixel."""
    image = 40 + 180 * np.eye(3, dtype=np.uint8)[classes]
    encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    path.write_bytes(encoded.tobytes())
    return image


def read(path, flags=cv2.IMREAD_UNCHANGED):
    return cv2.imdecode(np.fromfile(path, np.uint8), flags)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def test_writes_index_and_overlay_at_the_images_own_size(predict, folder, tmp_path):
    rng = np.random.default_rng(0)
    blocks = {"a.png": (16, 24), "größe 2.PNG": (8, 40)}  # non-ASCII, a space, capitals
    classes = {
        name: rng.integers(0, 3, (h // 8, w // 8)).repeat(8, 0).repeat(8, 1)
        for name, (h, w) in blocks.items()
    }
    images = {name: save(folder / name, ids) for name, ids in classes.items()}
    (folder / "notes.txt").write_text("no image")
    out = tmp_path / "deep" / "out"
    written = run(predict, folder, out)
    assert [path.name for path in written] == ["a.png", "größe 2.png"]
    for path, name in zip(written, classes, strict=True):
        index = read(path)
        assert index.dtype == np.uint8
        np.testing.assert_array_equal(index, classes[name])
        overlay = read(out / f"{path.stem}_overlay.png", cv2.IMREAD_COLOR_RGB)
        halves = images[name].astype(int) + PALETTE[classes[name]]
        np.testing.assert_array_equal(overlay, halves // 2)
    assert len(list(out.iterdir())) == 4


def test_one_file_and_a_size_for_the_network(predict, folder, tmp_path):
    classes = np.array([[0, 1], [2, 0]]).repeat(30, 0).repeat(50, 1)
    save(folder / "one.jpg", classes)
    seen = []

    def spy(image):
        seen.append(image.shape)
        return predict(image)

    (index,) = run(spy, folder / "one.jpg", tmp_path / "out", image_size=(12, 20))
    assert seen == [(12, 20, 3)]
    np.testing.assert_array_equal(read(index), classes)


def test_an_image_is_predicted_on_any_number_of_devices():
    config = config_lib.resolve(tiny_config(parallel__devices=4), steps_per_epoch=1)
    seen = []

    def spy(variables, images):
        seen.append(images.shape)
        return jnp.argmax(images, axis=-1).astype(jnp.uint8)

    experiment = dataclasses.replace(build(config, tuple("abcd"), PALETTE), predict=spy)
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    classes = experiment.predict_image(Network({}, {}), image)
    assert seen == [(4, 6, 8, 3)]  # one copy a device
    np.testing.assert_array_equal(classes, image.argmax(-1))


def test_bad_images_are_named_after_the_others_are_done(predict, folder, tmp_path):
    save(folder / "b.png", np.zeros((8, 8), int))
    whole = (folder / "b.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "c.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 3 images.*a\.png.*c\.jpg"):
        run(predict, folder, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b.png", "b_overlay.png"]


def test_a_missing_path_and_an_empty_folder_are_named(predict, folder, tmp_path):
    with pytest.raises(UserError, match=r"--images=.*nowhere does not exist"):
        run(predict, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=r"--images=.*holds no image"):
        run(predict, folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("first", "second"),
    [("a.jpg", "a.png"), ("a.jpg", "A.png"), ("a.jpg", "a_overlay.jpg")],
)
def test_two_images_are_never_written_to_one_file(predict, folder, tmp_path, first, second):
    for name in (first, second):
        save(folder / name, np.zeros((8, 8), int))
    with pytest.raises(UserError, match="written to one file") as caught:
        run(predict, folder, tmp_path / "out")
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_images_are_never_overwritten(predict, folder, tmp_path):
    save(folder / "a.png", np.zeros((8, 8), int))
    before = (folder / "a.png").read_bytes()
    for images in (folder, folder / "a.png"):
        with pytest.raises(UserError, match="Choose another folder"):
            run(predict, images, folder)
    assert (folder / "a.png").read_bytes() == before


def test_an_output_folder_that_cannot_be_made_is_named(predict, folder, tmp_path):
    save(folder / "a.png", np.zeros((8, 8), int))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out=.*cannot be made"):
        run(predict, folder, tmp_path / "file" / "out")
