"""The images that a run looks at again and again, and what is written above them."""

from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.data import Source
from csc_jax.evaluation import Scores
from csc_jax.reporting.probe import Probe, _centre_crops
from csc_jax.training.experiment import build
from csc_jax.training.loop import _draw

PALETTE = np.zeros((7, 3), np.uint8)


def experiment(tmp_path, **fields):
    config = config_lib.resolve(tiny_config(tmp_path, **fields), steps_per_epoch=1)
    return build(config, tuple("abcdefg"), PALETTE)


@pytest.mark.parametrize(
    ("images", "count", "expected"),
    [
        (101, 4, [0, 33, 67, 100]),  # CamVid's val split, frames of one video
        (500, 4, [0, 166, 333, 499]),
        (3, 4, [0, 1, 2]),
        (101, 1, [0]),
        (101, 0, []),
        (0, 4, []),
    ],
)
def test_images_to_look_at_are_spread_over_the_split(images, count, expected):
    source = Source(tuple(map(str, range(images))), (1, 1), [{}] * images)
    assert source.spread(count) == expected


def test_panels_and_cons_look_at_images_spread_over_the_split(tmp_path):
    """Nothing of a run of other images is compared with."""
    built = experiment(tmp_path, train__panels=2, train__consistency_lag=2)
    val = data.load(built.config.data).source("val")
    probe = Probe(built, val)
    assert probe.ids == [val.ids[0], val.ids[-1]]
    np.testing.assert_array_equal(probe._images[1]["image"], val[len(val) - 1]["image"])
    state = built.compile_init()()
    assert probe.measure(0, state) is None
    kept = np.asarray(probe.features_to_keep(1))

    again = Probe(built, val)
    again.resume(kept, probe.ids)
    assert again.measure(2, state) == pytest.approx(1.0, abs=1e-5)  # the same network
    more = experiment(tmp_path, train__panels=3, train__consistency_lag=2)
    for images in (probe.ids, None):  # of another number, and of a version that did not say which
        other = Probe(more, val)
        other.resume(kept, images)
        assert other.measure(2, state) is None
        assert other.measure(4, state) == pytest.approx(1.0, abs=1e-5)


def test_pictures_name_method_data_and_seed(tmp_path, monkeypatch):
    built = experiment(tmp_path, method__name="unimatch", method__contrast="csc", seed=3)
    drawn = {}
    monkeypatch.setattr(
        "csc_jax.reporting.visualize.save_panel",
        lambda path, panel, palette, names, title, hatched: drawn.update({title: hatched}),
    )
    monkeypatch.setattr(
        "csc_jax.reporting.visualize.save_curves",
        lambda path, records, title: drawn.update({title: ""}),
    )
    confusion = np.zeros((7, 7), np.int64)
    confusion[0, 0], confusion[1, 0] = 1, 3  # IoU 1/4 and 0
    for columns in ({}, {"pseudo-label, hatched where M = 0": []}):
        panels = type("Panels", (), {"panel": lambda self, state, c=columns: c})()
        _draw(built, None, 40, panels, Scores(confusion, note="center_crop"), Path("unused"))
        title = "unimatch+csc on synthetic, seed 3"
        assert drawn == {
            f"{title}, step 40: mIoU 12.5% (2 of 7 classes) on val (center_crop)": (
                "ignored or not kept" if columns else "ignored"
            ),
            f"{title} (center_crop)": "",
        }


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (4, 20), (20, 4), (3, 5)])
def test_the_middle_of_each_image_is_taken_whatever_its_size(size):
    height, width = size
    image = np.zeros((height, width, 3), np.uint8)
    image[...] = np.arange(1, height + 1)[:, None, None] * 10 + np.arange(width)[None, :, None]
    large = np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3)
    crop, other = _centre_crops([{"image": image}, {"image": large}], (6, 8))
    assert crop.shape == (6, 8, 3)
    np.testing.assert_array_equal(other, large[7:13, 6:14])
    # Below the crop's size a picture goes on with its last row and column.
    rows = (np.arange(6) + max(height - 6, 0) // 2).clip(max=height - 1)
    columns = (np.arange(8) + max(width - 8, 0) // 2).clip(max=width - 1)
    np.testing.assert_array_equal(crop, image[rows[:, None], columns])
