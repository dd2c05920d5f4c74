"""Inference in every mode against slow NumPy versions; padding that changes nothing by itself."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config
from toy_network import ToyNetwork

from csc_jax import config as config_lib
from csc_jax import evaluation, models
from csc_jax.errors import UserError
from csc_jax.evaluation.predictor import pad_to_multiple, window_starts
from csc_jax.training import experiment

FILL = (120, 110, 100)


@pytest.mark.parametrize(
    ("length", "window", "expected"),
    [
        (10, 10, [0]),
        (10, 6, [0, 4]),
        (16, 6, [0, 4, 8, 10]),  # the last one is flush with the border
        (1024, 640, [0, 384]),
        (2048, 640, [0, 427, 854, 1281, 1408]),
    ],
)
def test_windows_are_two_thirds_apart_and_cover_the_axis(length, window, expected):
    assert window_starts(length, window) == expected


def fake_logits(variables, images):
    """Logits at stride 4 that depend on the pixels and on the place within the piece."""
    rows = images[:, ::4, ::4, :].astype(jnp.float32)
    place = jnp.cos(jnp.arange(rows.shape[2]) * 1.7)[None, None, :, None]
    return rows @ variables["w"] / 64 + place * jnp.array([1.0, -1.0, 0.5]).reshape(1, 1, 1, 3)


@pytest.fixture(scope="module")
def variables():
    return {"w": np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).integers(0, 256, size=(4, 20, 28, 3), dtype=np.uint8)


def size_at_stride_4(size):
    return -(-size // 4)


def predictor(
    mesh,
    mode="whole",
    window=(0, 0),
    logits=fake_logits,
    logits_size=size_at_stride_4,
    **options,
):
    return evaluation.make_predictor(
        logits,
        logits_size,
        num_classes=3,
        mode=mode,
        window=window,
        mesh=mesh,
        fill=FILL,
        **options,
    )


def resized(x, height, width):
    """Bilinear with aligned corners, pixel by pixel; (h, w, K) -> (height, width, K)."""
    h, w, _ = x.shape
    out = np.zeros((height, width, x.shape[2]))
    for i in range(height):
        for j in range(width):
            v, u = i * (h - 1) / (height - 1), j * (w - 1) / (width - 1)
            top, left = min(int(v), h - 2), min(int(u), w - 2)
            a, b = v - top, u - left
            out[i, j] = (
                (1 - a) * (1 - b) * x[top, left]
                + (1 - a) * b * x[top, left + 1]
                + a * (1 - b) * x[top + 1, left]
                + a * b * x[top + 1, left + 1]
            )
    return out


def slow_whole(variables, image):
    logits = np.asarray(fake_logits(variables, jnp.asarray(image, jnp.float32)[None]))[0]
    return resized(logits, *image.shape[:2])


def slow_sliding(variables, image, window):
    height, width, _ = image.shape
    h, w = min(window[0], height), min(window[1], width)
    total, covered = np.zeros((height, width, 3)), np.zeros((height, width, 1))
    for top in window_starts(height, h):
        for left in window_starts(width, w):
            piece = slice(top, top + h), slice(left, left + w)
            total[piece] += slow_whole(variables, image[piece])
            covered[piece] += 1
    return total / covered


def slow_views(logits, image, scales, flip):
    height, width, _ = image.shape
    total = np.zeros((height, width, 3))
    for scale in scales:
        view = resized(image, int(height * scale + 0.5), int(width * scale + 0.5))
        for mirrored in (False, True)[: 1 + flip]:
            found = logits(view[:, ::-1])[:, ::-1] if mirrored else logits(view)
            exponential = np.exp(resized(found, height, width))
            total += exponential / exponential.sum(-1, keepdims=True)
    return total


def test_whole_image_is_the_argmax_of_resized_logits(mesh1, variables, images):
    found = predictor(mesh1)(variables, images)
    assert (found.shape, found.dtype) == ((4, 20, 28), jnp.uint8)
    expected = np.stack([slow_whole(variables, image).argmax(-1) for image in images])
    np.testing.assert_array_equal(found, expected)


def test_one_window_over_the_image_equals_the_whole(mesh1, variables, images):
    whole = predictor(mesh1)(variables, images)
    for mode in ("sliding", "center_crop"):
        for window in [(20, 28), (100, 100)]:  # the larger one is cut to the image
            found = predictor(mesh1, mode, window)(variables, images)
            np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("window", [(12, 12), (9, 40)])
def test_sliding_window_averages_overlapping_logits(mesh1, variables, images, window):
    found = predictor(mesh1, "sliding", window)(variables, images)
    expected = [slow_sliding(variables, image, window).argmax(-1) for image in images]
    np.testing.assert_array_equal(found, np.stack(expected))
    assert (np.asarray(found) != np.asarray(predictor(mesh1)(variables, images))).any()


def test_center_crop_predicts_the_middle_and_nothing_around_it(mesh1, variables, images):
    found = np.asarray(predictor(mesh1, "center_crop", (11, 40))(variables, images))
    middle = images[:, 4:15]  # (20 - 11) // 2 = 4, as in the lineage; 40 is wider than the image
    expected = [slow_whole(variables, image).argmax(-1) for image in middle]
    np.testing.assert_array_equal(found[:, 4:15], np.stack(expected))
    assert (found[:, :4] == 255).all()
    assert (found[:, 15:] == 255).all()


@pytest.mark.parametrize(
    ("mode", "scales", "flip"),
    [("whole", (0.75, 1.3), False), ("whole", (1.0, 1.3), True), ("sliding", (1.0,), True)],
)
def test_views_average_softmax_probabilities(mesh1, variables, images, mode, scales, flip):
    def logits(view):
        if mode == "whole":
            return slow_whole(variables, view)
        return slow_sliding(variables, view, (12, 12))

    predict = predictor(mesh1, mode, (12, 12), scales=scales, flip=flip)
    found = np.asarray(predict(variables, images))
    expected = [slow_views(logits, image, scales, flip).argmax(-1) for image in images[:2]]
    np.testing.assert_array_equal(found[:2], np.stack(expected))
    plain = np.asarray(predictor(mesh1, mode, (12, 12))(variables, images))
    assert (found != plain).any()


@pytest.mark.parametrize(
    ("mode", "window", "options"),
    [
        ("whole", (0, 0), {}),
        ("sliding", (12, 12), {}),
        ("sliding", (24, 10), {}),  # higher than the image, not than the padded one
        ("center_crop", (11, 40), {}),
        ("sliding", (12, 12), {"flip": True, "scales": (1.3,)}),
    ],
)
def test_padding_moves_nothing(mesh1, variables, images, mode, window, options):
    # The fake network sees no further than a pixel, so padding may not change any class id.
    exact = predictor(mesh1, mode, window, **options)(variables, images)
    padded = predictor(mesh1, mode, window, size_multiple=16, **options)(variables, images)
    assert padded.shape == (4, 32, 32)
    np.testing.assert_array_equal(padded[:, :20, :28], exact)
    outside = np.ones((32, 32), bool)
    outside[:20, :28] = False
    assert (np.asarray(padded)[:, outside] == 255).all()


def test_the_network_sees_the_mean_colour_on_the_padding(mesh1, images):
    seen = []

    def spy(variables, x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return x.astype(jnp.float32)

    predict = predictor(mesh1, logits=spy, logits_size=lambda size: size, size_multiple=16)
    jax.block_until_ready(predict({}, images))
    jax.effects_barrier()
    (whole,) = seen
    np.testing.assert_array_equal(whole[:, :20, :28], images)
    np.testing.assert_array_equal(whole[:, 20:], np.broadcast_to(FILL, (4, 12, 32, 3)))


@pytest.mark.parametrize(("multiple", "programs"), [(1, 8), (16, 2)])
def test_padded_images_share_few_programs(mesh1, caplog, multiple, programs):
    traced = []

    def logits(variables, x):
        traced.append(x.shape)
        return x.astype(jnp.float32)

    predict = predictor(mesh1, logits=logits, logits_size=lambda size: size, size_multiple=multiple)
    with caplog.at_level(logging.WARNING, "csc_jax"):
        for width in (*range(28, 36), 30):
            image = np.random.default_rng(width).integers(0, 256, (1, 20, width, 3), np.uint8)
            found = np.asarray(predict({}, image))[:, :20, :width]
            np.testing.assert_array_equal(found, image.argmax(-1))
    assert len(traced) == programs
    warned = [r for r in caplog.records if "eval.size_multiple" in r.getMessage()]
    assert len(warned) == (programs == 8)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("whole", {}), ("sliding", {"flip": True, "size_multiple": 16}), ("center_crop", {})],
)
def test_four_devices_predict_and_score_as_one(mesh1, mesh4, mode, options, variables, images):
    rng = np.random.default_rng(3)
    batch = {
        "image": images,
        "label": rng.choice([0, 1, 2, 255], size=images.shape[:3]).astype(np.uint8),
        "valid": np.array([True, True, True, False]),
        "ids": list("abcd"),
    }
    one, four = (predictor(mesh, mode, (12, 12), **options) for mesh in (mesh1, mesh4))
    predictions = four(variables, images)
    assert len(predictions.sharding.device_set) == 4
    np.testing.assert_array_equal(predictions, one(variables, images))
    a, b = (evaluation.evaluate(p, variables, [batch], 3) for p in (one, four))
    np.testing.assert_array_equal(a.confusion, b.confusion)
    assert a.confusion.sum() > 0
    assert list(a.per_image) == ["a", "b", "c"]
    np.testing.assert_allclose(list(a.per_image.values()), list(b.per_image.values()))


def test_errors_name_the_field(mesh1, mesh4, variables, images):
    with pytest.raises(UserError, match=r"eval\.mode is 'center'"):
        predictor(mesh1, "center")
    for mode in ("sliding", "center_crop"):
        with pytest.raises(UserError, match=r"eval\.window is \(0, 12\)"):
            predictor(mesh1, mode, (0, 12))
    with pytest.raises(UserError, match=r"3 images does not divide by the 4 devices.*batch\.eval"):
        predictor(mesh4)(variables, images[:3])


def test_logits_of_a_pooling_in_ceil_mode_are_placed_by_their_own_size(mesh1):
    """Of 12 px they are 4, of 9 px 3: more than a quarter, as those of the deep stem."""

    def logits(variables, images):
        size = [-(-n // 2) // 2 + 1 for n in images.shape[1:3]]
        return models.resize_aligned(images.astype(jnp.float32), size)

    images = np.random.default_rng(0).integers(0, 256, (1, 12, 9, 3), np.uint8)
    for multiple in (1, 4, 9):
        padded = pad_to_multiple(images, multiple, FILL)
        expected = models.resize_aligned(logits({}, padded)[:, :4, :3], (12, 9)).argmax(-1)
        predict = predictor(
            mesh1,
            logits=logits,
            size_multiple=multiple,
            logits_size=lambda size: -(-size // 2) // 2 + 1,
        )
        np.testing.assert_array_equal(np.asarray(predict({}, images))[:, :12, :9], expected)


@pytest.mark.parametrize("stem", ["deep", "7x7"])
def test_an_experiment_scores_the_logits_of_its_network(stem):
    config = config_lib.resolve(tiny_config(model__stem=stem), steps_per_epoch=4)
    built = experiment.build(config, tuple("abc"), np.zeros((3, 3), np.uint8))
    network = built.compile_init()().student
    image = np.random.default_rng(0).integers(0, 256, (64, 50, 3), np.uint8)

    @jax.jit
    def expected(network):
        outputs = built.method.task.eval_forward(network, image[None], projection=False)
        return models.resize_aligned(outputs.logits, (64, 50)).argmax(-1)[0]

    np.testing.assert_array_equal(built.predict_image(network, image), expected(network))


def test_eval_batches_grow_to_the_devices_and_score_the_same(monkeypatch, tmp_path):
    """batch.eval = 1, as in the recipes for images of many sizes, on eight devices."""
    monkeypatch.setattr(models, "build", lambda config, classes, **_: ToyNetwork(classes))
    scores = {}
    for devices in (1, 8):
        config = tiny_config(
            tmp_path,
            batch__labeled=8,
            batch__unlabeled=8,
            batch__eval=1,
            model__projection_dim=4,
            parallel__devices=devices,
        )
        dataset = experiment.load_data(config)
        config = config_lib.resolve(config, steps_per_epoch=4)
        built = experiment.build(config, dataset.class_names, dataset.palette)
        network = built.compile_init()().teacher
        scores[devices] = built.evaluate(network, dataset.source("val"))
    np.testing.assert_array_equal(scores[8].confusion, scores[1].confusion)
    assert scores[1].confusion.sum() > 0
    assert len(scores[8].per_image) == len(scores[1].per_image) == config.data.synthetic.val
