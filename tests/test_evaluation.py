"""Confusion matrix, IoU and inference against slow NumPy versions and hand-made cases."""

import jax.numpy as jnp
import numpy as np
import pytest

from csc_jax import evaluation
from csc_jax.errors import UserError
from csc_jax.evaluation.predictor import window_starts

NAMES = ("road", "sky", "car")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_confusion_matrix_equals_a_loop(dtype):
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 7, 255], size=(2, 9, 5)).astype(dtype)
    predictions = rng.integers(0, 4, size=labels.shape).astype(np.uint8)
    expected = np.zeros((4, 4), np.int64)
    for truth, predicted in zip(labels.flat, predictions.flat, strict=True):
        if truth < 4:
            expected[truth, predicted] += 1
    counted = evaluation.confusion_matrix(jnp.asarray(labels), jnp.asarray(predictions), 4)
    assert counted.dtype == jnp.int32
    np.testing.assert_array_equal(counted, expected)


def test_negative_labels_are_ignored():
    labels = jnp.array([-1, -4, 1])
    counted = evaluation.confusion_matrix(labels, jnp.array([0, 1, 0]), 2)
    np.testing.assert_array_equal(counted, [[0, 0], [1, 0]])


def test_scores_of_a_hand_made_confusion_matrix():
    scores = evaluation.Scores(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    np.testing.assert_allclose(scores.iou, [6 / 9, 3 / 6, np.nan])
    assert scores.miou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert scores.pixel_accuracy == pytest.approx(9 / 12)
    assert scores.as_dict(NAMES) == {
        "miou": pytest.approx(7 / 12),
        "pixel_accuracy": 0.75,
        "iou/road": pytest.approx(2 / 3),
        "iou/sky": 0.5,
        "iou/car": None,
    }


def test_a_class_that_is_only_predicted_counts_as_zero():
    scores = evaluation.Scores(np.array([[3, 0, 1], [0, 4, 0], [0, 0, 0]]))
    np.testing.assert_allclose(scores.iou, [3 / 4, 1, 0])
    assert scores.miou == pytest.approx(1.75 / 3)


def test_nothing_but_ignored_pixels_has_no_score():
    scores = evaluation.Scores(np.zeros((3, 3), np.int64))
    assert np.isnan(scores.miou)
    assert np.isnan(scores.pixel_accuracy)
    assert scores.as_dict(NAMES)["miou"] is None


def test_table_names_absent_classes():
    table = evaluation.Scores(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])).table(NAMES)
    lines = table.splitlines()
    assert "road             66.67" in lines
    assert "car                  -" in lines
    assert "mean IoU         58.33" in lines
    assert lines[-1].endswith("left out of the mean: car")


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


def predictor(mesh, mode="whole", window=(0, 0)):
    return evaluation.make_predictor(
        fake_logits, num_classes=3, mode=mode, window=window, mesh=mesh
    )


def resized(logits, height, width):
    """Bilinear with aligned corners, pixel by pixel; (h, w, C) -> (height, width, C)."""
    h, w, _ = logits.shape
    out = np.zeros((height, width, logits.shape[2]))
    for y in range(height):
        for x in range(width):
            v, u = y * (h - 1) / (height - 1), x * (w - 1) / (width - 1)
            top, left = min(int(v), h - 2), min(int(u), w - 2)
            a, b = v - top, u - left
            out[y, x] = (
                (1 - a) * (1 - b) * logits[top, left]
                + (1 - a) * b * logits[top, left + 1]
                + a * (1 - b) * logits[top + 1, left]
                + a * b * logits[top + 1, left + 1]
            )
    return out


def test_whole_image_is_the_argmax_of_resized_logits(mesh1, variables, images):
    found = predictor(mesh1)(variables, images)
    assert (found.shape, found.dtype) == ((4, 20, 28), jnp.uint8)
    logits = np.asarray(fake_logits(variables, jnp.asarray(images)))
    expected = np.stack([resized(image, 20, 28).argmax(-1) for image in logits])
    np.testing.assert_array_equal(found, expected)


def test_one_window_over_the_image_equals_the_whole(mesh1, variables, images):
    whole = predictor(mesh1)(variables, images)
    for window in [(20, 28), (100, 100)]:  # the larger one is cut to the image
        sliding = predictor(mesh1, "sliding", window)(variables, images)
        np.testing.assert_array_equal(sliding, whole)


def test_sliding_window_averages_overlapping_logits(mesh1, variables, images):
    total = np.zeros((4, 20, 28, 3))
    covered = np.zeros((20, 28, 1))
    for top in (0, 8):
        for left in (0, 8, 16):
            piece = images[:, top : top + 12, left : left + 12]
            logits = np.asarray(fake_logits(variables, jnp.asarray(piece)))
            total[:, top : top + 12, left : left + 12] += [resized(x, 12, 12) for x in logits]
            covered[top : top + 12, left : left + 12] += 1
    assert set(covered.flat) == {1, 2, 4}
    found = predictor(mesh1, "sliding", (12, 12))(variables, images)
    np.testing.assert_array_equal(found, (total / covered).argmax(-1))
    assert (np.asarray(found) != np.asarray(predictor(mesh1)(variables, images))).any()


@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_four_devices_predict_and_score_as_one(mesh1, mesh4, mode, variables, images):
    rng = np.random.default_rng(3)
    batch = {
        "image": images,
        "label": rng.choice([0, 1, 2, 255], size=images.shape[:3]).astype(np.uint8),
        "valid": np.array([True, True, True, False]),
    }
    one, four = (predictor(mesh, mode, (12, 12)) for mesh in (mesh1, mesh4))
    predictions = four(variables, images)
    assert len(predictions.sharding.device_set) == 4
    np.testing.assert_array_equal(predictions, one(variables, images))
    np.testing.assert_array_equal(
        evaluation.evaluate(one, variables, [batch], 3).confusion,
        evaluation.evaluate(four, variables, [batch], 3).confusion,
    )


def test_evaluate_sums_over_batches_of_other_sizes_and_skips_invalid_rows(mesh1, variables, images):
    rng = np.random.default_rng(4)
    labels = rng.choice([0, 1, 2, 255], size=images.shape[:3]).astype(np.uint8)
    small = {"image": images[:, :12, :16], "label": labels[:, :12, :16], "valid": np.full(4, True)}
    large = {"image": images, "label": labels, "valid": np.array([True, False, True, False])}
    predict = predictor(mesh1)
    expected = np.zeros((3, 3), np.int64)
    for batch in (small, large, large):
        rows = batch["valid"]
        predictions = np.asarray(predict(variables, batch["image"]))[rows]
        np.add.at(
            expected,
            tuple(x[batch["label"][rows] != 255] for x in (batch["label"][rows], predictions)),
            1,
        )
    scores = evaluation.evaluate(predict, variables, iter([small, large, large]), 3)
    assert scores.confusion.dtype == np.int64
    np.testing.assert_array_equal(scores.confusion, expected)


def test_errors_name_the_field(mesh1, mesh4, variables, images):
    with pytest.raises(UserError, match=r"eval\.mode is 'center'"):
        predictor(mesh1, "center")
    with pytest.raises(UserError, match=r"eval\.window is \(0, 12\)"):
        predictor(mesh1, "sliding", (0, 12))
    with pytest.raises(UserError, match=r"3 images does not divide by the 4 devices.*batch\.eval"):
        predictor(mesh4)(variables, images[:3])
