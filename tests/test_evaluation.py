"""Confusion matrix, IoU and scores of a set against slow versions and hand-made cases."""

import jax.numpy as jnp
import numpy as np
import pytest

from csc_jax import evaluation
from csc_jax.evaluation import metrics

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


def test_what_was_not_predicted_is_ignored():
    labels = jnp.array([0, 1, 1, 255])
    counted = evaluation.confusion_matrix(labels, jnp.array([255, 1, 2, 255]), 2)
    np.testing.assert_array_equal(counted, [[0, 0], [0, 1]])


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
    assert lines[-1] == "only 2 of 3 classes occurred, left out of the mean: car"


def test_a_number_that_the_field_does_not_report_says_so():
    scores = evaluation.Scores(np.eye(3, dtype=np.int64), note="center_crop")
    assert "mean IoU (center_crop)  100.00" in scores.table(NAMES).splitlines()


class Given:
    """Stands for a predictor: returns what it was given, each batch padded as a predictor pads."""

    def __init__(self, *predictions):
        self._left = list(predictions)

    def __call__(self, variables, images):
        predictions = self._left.pop(0)
        _, height, width, _ = images.shape
        assert predictions.shape == images.shape[:3]
        pad = ((0, 0), (0, -height % 16), (0, -width % 16))
        return jnp.asarray(np.pad(predictions, pad, constant_values=255))


def make_batch(rng, height, width, valid, first=0):
    labels = rng.choice([0, 1, 2, 255], size=(len(valid), height, width)).astype(np.uint8)
    return {
        "image": np.zeros((*labels.shape, 3), np.uint8),
        "label": labels,
        "valid": np.array(valid),
        "ids": [f"image {first + i}" for i in range(len(valid))],
    }


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    made = [
        make_batch(rng, 12, 20, [True, True], first=0),
        make_batch(rng, 16, 16, [True, True], first=2),
        make_batch(rng, 9, 5, [True, False], first=4),
    ]
    made[1]["label"][1] = 255  # an image without a single label
    predictions = [rng.integers(0, 3, b["label"].shape).astype(np.uint8) for b in made]
    predictions[0][:, :2] = 255  # not predicted, as around a centre crop
    return made, predictions


def slow_confusion(pairs):
    counts = np.zeros((3, 3), np.int64)
    for label, predicted in pairs:
        for truth, found in zip(label.flat, predicted.flat, strict=True):
            if truth < 3 and found < 3:
                counts[truth, found] += 1
    return counts


def test_a_set_is_counted_as_a_whole_and_image_by_image(batches):
    made, predictions = batches
    images = {
        name: (label, predicted)
        for batch, p in zip(made, predictions, strict=True)
        for name, label, predicted, valid in zip(
            batch["ids"], batch["label"], p, batch["valid"], strict=True
        )
        if valid
    }
    assert len(images) == 5
    seen = {}

    def on_image(name, classes, miou):
        seen[name] = classes, miou

    scores = evaluation.evaluate(Given(*predictions), None, iter(made), 3, on_image=[on_image])
    np.testing.assert_array_equal(scores.confusion, slow_confusion(images.values()))
    assert scores.confusion.dtype == np.int64
    assert list(scores.per_image) == list(seen) == list(images)
    for name, (label, predicted) in images.items():
        expected = evaluation.Scores(slow_confusion([(label, predicted)])).miou
        assert scores.per_image[name] == pytest.approx(expected, nan_ok=True)
        np.testing.assert_array_equal(seen[name][0], predicted)
        assert seen[name][1] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(scores.per_image["image 3"])


def test_the_sum_on_the_device_never_overflows(batches, monkeypatch):
    made, predictions = batches
    whole = evaluation.evaluate(Given(*predictions), None, made, 3)
    fetched = []
    fetch = metrics._Counter._fetch

    def spy(self):
        fetched.append(self._pixels)
        fetch(self)

    monkeypatch.setattr(metrics._Counter, "_fetch", spy)
    monkeypatch.setattr(metrics, "_MOST_PIXELS", 1500)  # padded, the batches have 1024, 512, 512
    parts = evaluation.evaluate(Given(*predictions), None, made, 3)
    assert fetched == [1024, 1024]
    np.testing.assert_array_equal(parts.confusion, whole.confusion)


def test_an_empty_set_has_no_score():
    scores = evaluation.evaluate(Given(), None, [], 3)
    assert np.isnan(scores.miou)
    assert scores.per_image == {}
