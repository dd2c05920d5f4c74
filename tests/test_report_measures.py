"""Calibration and boundary IoU against hand-made cases and slow, independent versions."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from csc_jax.evaluation import Scores
from csc_jax.evaluation.boundary import BoundaryIoU, boundary_iou, near_outline
from csc_jax.evaluation.calibration import Calibration, calibration_of, sort_into_bins


def slow_boundary(mask, distance):
    """Pixels of a mask within `distance`, as a king moves, of what is not of it."""
    padded = np.pad(mask, 1)  # the image's surroundings are not
    steps = ndimage.distance_transform_cdt(padded, metric="chessboard")[1:-1, 1:-1]
    return mask & (steps <= distance)


@pytest.mark.parametrize("shape", [(40, 56), (7, 90), (1, 1), (64, 64)])
@pytest.mark.parametrize("seed", [0, 1])
def test_boundary_iou_equals_a_slow_one_of_each_class(shape, seed):
    rng = np.random.default_rng(seed)

    def blobs():
        noise = ndimage.gaussian_filter(rng.normal(size=(4, *shape)), (0, 4, 4))
        return noise.argmax(axis=0).astype(np.uint8)

    label, found = blobs(), blobs()
    label[rng.random(shape) < 0.01] = 255
    found[: shape[0] // 9] = 255  # not predicted, as around a centre crop
    counts = boundary_iou(label, found, 3)  # so that class 3 is to be ignored as well
    distance = max(1, round(0.02 * (shape[0] ** 2 + shape[1] ** 2) ** 0.5))
    scored = (label < 3) & (found < 3)
    for c in range(3):
        true = slow_boundary(scored & (label == c), distance)
        predicted = slow_boundary(scored & (found == c), distance)
        assert counts.intersection[c] == (true & predicted).sum()
        assert counts.union[c] == (true | predicted).sum()


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_pixels_near_an_outline_are_those_that_erosion_takes(distance):
    rng = np.random.default_rng(distance)
    classes = np.kron(rng.integers(0, 3, (4, 5)), np.ones((13, 13))).astype(np.uint8)
    expected = np.zeros(classes.shape, bool)
    for c in range(3):
        expected |= slow_boundary(classes == c, distance)
    np.testing.assert_array_equal(near_outline(classes, distance), expected)
    assert 0 < expected.sum() < expected.size


def test_boundary_iou_of_a_shifted_square_by_hand():
    # 50 x 50 px: d = round(0.02 * 70.7) = 1. The outline of a 10 x 10 square has 36 px. Moved by
    # one column, the two outlines share the 9 upper and the 9 lower px of their common columns.
    label, found = (np.zeros((50, 50), np.uint8) for _ in range(2))
    label[20:30, 20:30] = found[20:30, 21:31] = 1
    counts = boundary_iou(label, found, 2)
    assert (counts.intersection[1], counts.union[1]) == (18, 54)
    assert counts.iou[1] == pytest.approx(1 / 3)
    assert boundary_iou(label, label, 2).mean == 1
    total = BoundaryIoU.nothing(2) + counts + counts
    np.testing.assert_array_equal(total.union, 2 * counts.union)


def test_a_class_that_occurs_nowhere_has_no_boundary_iou():
    counts = boundary_iou(np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8), 2)
    assert np.isnan(counts.iou[1])
    assert counts.mean == 1
    assert np.isnan(BoundaryIoU.nothing(2).mean)


def calibrate(confidence, right, counted=None):
    confidence = jnp.asarray(confidence, jnp.float32)[None]
    counted = jnp.ones(confidence.shape, bool) if counted is None else jnp.asarray(counted)[None]
    return calibration_of(np.asarray(sort_into_bins(confidence, jnp.asarray(right)[None], counted)))


def test_ece_of_a_hand_made_case():
    # Bins of 1/15: 0.95 and 0.99 lie in the last one, (14/15, 1], and 0.5 in (7/15, 8/15].
    found = calibrate(
        [[0.95, 0.99, 0.99, 0.5], [0.5, 0.5, 0.5, 0.3]],
        [[True, True, False, True], [False, False, False, True]],
        [[True, True, True, True], [True, True, True, False]],
    )
    assert found.count[14] == 3
    assert found.count[7] == 4
    assert found.count.sum() == 7  # the last pixel has no label
    # (|2 - 2.93| + |1 - 2|) / 7
    assert found.ece == pytest.approx((0.93 + 1.0) / 7, rel=1e-6)
    np.testing.assert_allclose(found.accuracy[[7, 14]], [1 / 4, 2 / 3])
    assert np.isnan(found.accuracy[0])


def test_bins_are_closed_above_and_add_up():
    confidence = np.array([[0.0, 1.0, 0.2, 0.2000001]])  # 0.2 = 3/15, the upper end of bin 2
    found = calibrate(confidence, np.ones((1, 4), bool))
    assert found.count.nonzero()[0].tolist() == [0, 2, 3, 14]
    twice = Calibration.nothing() + found + found
    np.testing.assert_array_equal(twice.count, 2 * found.count)
    assert twice.ece == found.ece
    assert np.isnan(Calibration.nothing().ece)


def test_ece_equals_a_loop_over_random_pixels():
    rng = np.random.default_rng(0)
    confidence = rng.random((40, 50)).astype(np.float32)
    right = rng.random((40, 50)) < confidence**2
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        gap = right[inside].mean() - confidence[inside].mean(dtype=np.float64)
        expected += inside.mean() * abs(gap)
    assert calibrate(confidence, right).ece == pytest.approx(expected, abs=1e-5)


def test_precision_recall_and_f1_of_a_hand_made_confusion_matrix():
    scores = Scores(np.array([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 4, 0, 0]]))
    np.testing.assert_allclose(scores.precision, [6 / 7, 3 / 9, np.nan, np.nan])
    np.testing.assert_allclose(scores.recall, [6 / 8, 3 / 4, np.nan, 0])
    np.testing.assert_allclose(scores.f1, [12 / 15, 6 / 13, np.nan, 0])
    np.testing.assert_allclose(scores.f1, 2 * scores.iou / (1 + scores.iou))  # Dice of Jaccard
