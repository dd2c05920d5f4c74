"""Masks and overlays of a network that names the brightest channel; images of any size."""

import dataclasses
import functools
import io
import json

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from tiny import tiny_config

from csc_jax import config as config_lib
from csc_jax import evaluation
from csc_jax.data import codec
from csc_jax.deploy import Result
from csc_jax.errors import UserError
from csc_jax.evaluation import polygons
from csc_jax.evaluation.predict import Extras, predict_folder
from csc_jax.state import Network
from csc_jax.training.experiment import build

PALETTE = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
NAMES = ("red", "green", "blue")


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


def result_of(image, classes):
    """What a network of 60% confidence says."""
    confidence = np.full(classes.shape, 0.6, np.float32)
    others = np.where(np.eye(3, dtype=bool)[classes], np.float32(0.6), np.float32(0.2))
    return Result(image, classes, confidence, others, NAMES, PALETTE)


def run(predict, images, out, **options):
    return predict_folder(
        lambda image: result_of(image, predict(image)), images, out, class_names=NAMES, **options
    )


def save(path, classes):
    """Writes an image whose brightest channel is the class id of each pixel."""
    image = 40 + 180 * np.eye(3, dtype=np.uint8)[classes]
    encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    path.write_bytes(encoded.tobytes())
    return image


def read(path):
    """Returns the values that a PNG stores, and its palette."""
    with Image.open(path) as image:
        palette = image.getpalette() or []
        return np.asarray(image), np.array(palette, np.uint8).reshape(-1, 3)


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
        index, palette = read(path)
        assert index.dtype == np.uint8
        np.testing.assert_array_equal(index, classes[name])
        np.testing.assert_array_equal(palette[:3], PALETTE)  # a viewer shows colours
        overlay, _ = read(out / f"{path.stem}_overlay.png")
        halves = images[name].astype(int) + PALETTE[classes[name]]
        height, width = index.shape
        np.testing.assert_array_equal(overlay[:height, :width], halves // 2)
        for color in PALETTE:  # the legend
            assert (overlay[height:] == color).all(axis=-1).sum() == 14 * 14
    assert len(list(out.iterdir())) == 4


def test_one_file_is_enough(predict, folder, tmp_path):
    classes = np.array([[0, 1], [2, 0]]).repeat(30, 0).repeat(50, 1)
    save(folder / "one.jpg", classes)
    (index,) = run(predict, folder / "one.jpg", tmp_path / "out")
    np.testing.assert_array_equal(read(index)[0], classes)


@pytest.mark.parametrize("count", [2, 3, 21, 255])
def test_index_pngs_hold_ids_for_any_number_of_classes(count):
    """Pillow would write 1, 2 or 4 bits a pixel for a short palette."""
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (count, 3), np.uint8)
    classes = np.append(rng.integers(0, count, 99), 255).astype(np.uint8).reshape(10, 10)
    encoded = evaluation.encode_with_palette(classes, palette)
    assert encoded[24] == 8  # bits, in the header
    values, stored = read(io.BytesIO(encoded))
    np.testing.assert_array_equal(values, classes)
    np.testing.assert_array_equal(stored[:count], palette)


@pytest.mark.parametrize("size", [(40, 60), (9, 61), (5, 7), (10, 15)])
def test_enlarged_logits_decide_at_the_size_of_the_image(size):
    """Pixel centres lie at halves, as where the image was made smaller; SciPy interpolates."""
    logits = np.random.default_rng(0).normal(size=(10, 15, 5)).astype(np.float32)
    rows, columns = (
        (np.arange(new) + 0.5) * old / new - 0.5
        for new, old in zip(size, logits.shape, strict=False)
    )
    grid = np.meshgrid(rows, columns, indexing="ij")
    planes = [
        ndimage.map_coordinates(logits[..., c].astype(float), grid, order=1, mode="nearest")
        for c in range(5)
    ]
    best, second = np.sort(planes, axis=0)[[-1, -2]]
    ids = evaluation.enlarge(logits, size)
    assert (ids.shape, ids.dtype) == (size, np.uint8)
    decided = best - second > 1e-4
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(ids[decided], np.argmax(planes, axis=0)[decided])


def test_a_border_within_a_pixel_stays_where_the_logits_have_it():
    """Class 1 leads from x = 1.2 on; four times as wide that is 6.3, where ids would jump at 8."""
    logits = np.stack([np.zeros((1, 4)), np.arange(4)[None] - 1.2], axis=-1).astype(np.float32)
    np.testing.assert_array_equal(evaluation.enlarge(logits, (1, 16))[0], np.arange(16) > 6.3)


def test_an_image_of_another_size_is_seen_at_that_of_the_training(mesh1):
    seen = []

    def spy(variables, images):
        seen.append(images.shape)
        return jnp.asarray(images, jnp.float32)  # brightness of a channel as the class's logit

    config = tiny_config(data__image_size=(12, 20))
    experiment = build(config_lib.resolve(config, steps_per_epoch=1), NAMES, PALETTE)
    segment = dataclasses.replace(experiment, predict=None, predict_logits=spy).segment
    columns = np.where(np.arange(100) < 37, 0, 2)  # no multiple of 5, the ratio of the sizes
    image = 40 + 180 * np.eye(3, dtype=np.uint8)[np.tile(columns, (60, 1))]
    classes = segment(Network({}, {}), image)
    assert seen == [(1, 12, 20, 3)]
    # The averaged column has 2 of 5 parts of class 0: the border lies at 37 px; ids have 35 or 40.
    np.testing.assert_array_equal(classes, np.tile(columns, (60, 1)))


def test_an_image_of_that_size_is_left_as_it_is():
    config = tiny_config(data__image_size=(12, 20))
    experiment = build(config_lib.resolve(config, steps_per_epoch=1), NAMES, PALETTE)

    def ids(variables, images):
        return jnp.argmax(images, axis=-1).astype(jnp.uint8)

    segment = dataclasses.replace(experiment, predict=ids, predict_logits=None).segment
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    np.testing.assert_array_equal(segment(Network({}, {}), image), image.argmax(-1))


def test_a_predictor_gives_the_logits_that_its_class_ids_come_from(mesh1):
    def logits(variables, images):
        return images[:, ::2, ::2].astype(jnp.float32)

    def half(size):
        return (size + 1) // 2

    options = {"num_classes": 3, "mode": "sliding", "window": (8, 8), "mesh": mesh1, "flip": True}
    ids = evaluation.make_predictor(logits, half, **options)
    values = evaluation.make_predictor(logits, half, **options, as_logits=True)
    images = np.random.default_rng(0).integers(0, 256, (1, 13, 11, 3), np.uint8)
    found = np.asarray(values({}, images))
    assert (found.shape, found.dtype) == ((1, 13, 11, 3), np.float32)
    np.testing.assert_allclose(found.sum(axis=-1), 2.0, rtol=1e-5)  # probabilities of two views
    np.testing.assert_array_equal(found.argmax(axis=-1), np.asarray(ids({}, images)))


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


def test_images_are_found_and_read_as_in_training(predict, folder, tmp_path, caplog):
    """Links in a circle, hidden files, deep images and those that EXIF turns."""
    caplog.set_level("INFO", "csc_jax")
    classes = np.array([[0, 1, 2], [2, 0, 1]]).repeat(8, 0).repeat(8, 1)
    brightest = 40 + 180 * np.eye(3, dtype=np.uint8)[classes]
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned right by a quarter
    (folder / "deep").mkdir()
    Image.fromarray(brightest).save(folder / "deep/turned.png", exif=tags)
    (folder / "deep/loop").symlink_to(folder)
    (folder / "._turned.png").write_bytes(b"no image")
    (folder / "film.gif").write_bytes(b"GIF89a")
    deep = np.uint16(16) * brightest[..., 1].astype(np.uint16)  # 12 bits, green alone
    cv2.imwrite(str(folder / "twelve.tif"), np.stack([deep * 0, deep, deep * 0], -1))
    (index, other) = run(
        predict, folder, tmp_path / "out", read=functools.partial(codec.read_photo, bits=12)
    )
    assert index == tmp_path / "out/deep/turned.png"
    np.testing.assert_array_equal(read(index)[0], np.rot90(classes, -1))
    np.testing.assert_array_equal(read(other)[0], np.ones_like(classes))
    assert "1 images were turned upright" in caplog.text
    assert "passed over 1 .gif" in caplog.text


def test_sub_folders_are_searched_and_kept(predict, folder, tmp_path):
    names = ("a.png", "day/a.png", "day/deep/b.png", "night/a.png")
    for name in (*names, ".hidden/a.png", "day/._a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save(folder / name, np.zeros((8, 8), int))
    out = tmp_path / "out"
    written = run(predict, folder, out)
    assert [path.relative_to(out).as_posix() for path in written] == sorted(names)
    assert (out / "day/deep/b_overlay.png").is_file()
    # What lies in the folder of the images is no input of the next call.
    inside = folder / "predictions"
    assert len(run(predict, folder, inside)) == 4
    assert len(run(predict, folder, inside)) == 4
    (folder / "predictions 2").mkdir()
    save(folder / "predictions 2/c.png", np.zeros((8, 8), int))
    assert len(run(predict, folder, inside)) == 5


def test_images_turned_by_exif_are_counted(predict, folder, tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right shows it upright
    with Image.fromarray(np.full((8, 16, 3), 90, np.uint8)) as image:
        image.save(folder / "a.jpg", exif=exif)
    (index,) = run(predict, folder, tmp_path / "out")
    assert read(index)[0].shape == (16, 8)
    assert "1 images were turned upright" in caplog.text


def test_a_link_to_itself_is_named(predict, folder, tmp_path):
    save(folder / "a.png", np.zeros((8, 8), int))
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(UserError, match=r"--out=.*out cannot be"):
        run(predict, folder, tmp_path / "out")


def test_confidence_and_probabilities_lie_beside_the_masks(predict, folder, tmp_path):
    (folder / "deep").mkdir()
    classes = np.array([[0, 1], [2, 0]]).repeat(6, 0).repeat(8, 1)
    save(folder / "deep" / "a.png", classes)
    out = tmp_path / "out"
    run(predict, folder, out, extras=Extras(confidence=True, soft=True))
    assert sorted(path.name for path in (out / "deep").iterdir()) == [
        *("a.png", "a_confidence.png", "a_overlay.png", "a_probabilities.npz")
    ]
    confidence, _ = read(out / "deep" / "a_confidence.png")
    assert confidence.dtype == np.uint8
    np.testing.assert_array_equal(confidence, np.full(classes.shape, 153))
    with np.load(out / "deep" / "a_probabilities.npz", allow_pickle=False) as stored:
        probabilities, names = stored["probabilities"], stored["class_names"]
    assert probabilities.dtype == np.float16
    np.testing.assert_allclose(probabilities, np.eye(3)[classes] * 0.4 + 0.2, atol=1e-3)
    assert tuple(names) == NAMES
    save(folder / "deep" / "a_confidence.jpg", classes)
    run(predict, folder, tmp_path / "other")  # no such file is written there
    with pytest.raises(UserError, match=r"would be written to one file, deep/a_confidence\.png"):
        run(predict, folder, out, extras=Extras(confidence=True))


def painted(shapes, size):
    """Paints polygons one after the other, as labelling tools do."""
    canvas = np.full(size, 255, np.uint8)
    for class_id, points in shapes:
        cv2.fillPoly(canvas, [np.array(points, np.int32)], class_id)
    return canvas


def nested(height, width):
    """Class 0 around class 1, in it class 2 and in that class 1 again; a notch at a side."""
    classes = np.zeros((height, width), np.uint8)
    for margin, class_id in ((4, 1), (9, 2), (14, 1)):
        classes[margin:-margin, margin:-margin] = class_id
    classes[:6, 30:37] = 2
    return classes


def test_polygons_of_both_tools_make_the_mask_again(predict, folder, tmp_path):
    (folder / "deep").mkdir()
    masks = {"b.png": nested(40, 60), "deep/a.png": nested(44, 50)[::-1]}
    for name, classes in masks.items():
        save(folder / name, classes)
    out = tmp_path / "out"
    run(predict, folder, out, extras=Extras(polygons="labelme"))
    for name, classes in masks.items():
        path = (out / name).with_suffix(".json")
        content = json.loads(path.read_text())
        assert (path.parent / content["imagePath"]).resolve() == (folder / name).resolve()
        assert (content["imageHeight"], content["imageWidth"]) == classes.shape
        shapes = [(NAMES.index(s["label"]), s["points"]) for s in content["shapes"]]
        np.testing.assert_array_equal(painted(shapes, classes.shape), classes)

    run(predict, folder, out, extras=Extras(polygons="coco"))
    content = json.loads((out / "polygons.json").read_text())
    assert content["categories"] == [{"id": i + 1, "name": n} for i, n in enumerate(NAMES)]
    assert [image["file_name"] for image in content["images"]] == list(masks)
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        shapes = [(a["category_id"] - 1, np.reshape(a["segmentation"][0], (-1, 2))) for a in own]
        classes = masks[image["file_name"]]
        assert (image["height"], image["width"]) == classes.shape
        np.testing.assert_array_equal(painted(shapes, classes.shape), classes)
        (outermost,) = (a for a in own if a["category_id"] == 1)
        assert outermost["bbox"] == [0, 0, *classes.shape[::-1]]
        for annotation, (_, points) in zip(own, shapes, strict=True):
            x, y = points.T
            twice = np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))  # the shoelace formula
            assert annotation["area"] == abs(twice) / 2
    assert not list(out.glob("*.unfinished"))


def test_specks_and_what_is_no_class_have_no_polygon():
    classes = np.full((20, 20), 255, np.uint8)
    classes[3, 3] = 0
    classes[10, 2:9] = 1  # a line has two ends
    classes[5:8, 12:15] = 2
    (region,) = polygons.regions(classes, 3)
    assert region.class_id == 2
    assert region.area == 4
    assert sorted(region.points.tolist()) == [[12, 5], [12, 7], [14, 5], [14, 7]]


def test_a_list_of_polygons_is_whole_or_not_there(predict, folder, tmp_path):
    save(folder / "a.png", np.zeros((8, 8), int))

    def fails(image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(fails, folder, tmp_path / "out", extras=Extras(polygons="coco"))
    assert not list((tmp_path / "out").iterdir())
