"""The drawn street scenes: reproducible, varied, and not to be told apart by colour alone."""

import numpy as np
import pytest

from csc_jax.config import default_config
from csc_jax.data import synthetic
from csc_jax.errors import UserError


@pytest.fixture(scope="module")
def drawn():
    """Images (40, 64, 64, 3) and labels (40, 64, 64)."""
    pairs = [synthetic.Scene(0, "train", i, (64, 64)).read()[:2] for i in range(40)]
    images, labels = zip(*pairs, strict=True)
    return np.stack(images), np.stack(labels)


def test_a_scene_depends_on_seed_split_and_index_alone(drawn):
    images, labels = drawn
    again, again_label, _ = synthetic.Scene(0, "train", 3, (64, 64)).read()
    np.testing.assert_array_equal(again, images[3])
    np.testing.assert_array_equal(again_label, labels[3])
    for other in (("train", 4, 0), ("val", 3, 0), ("train", 3, 1)):
        split, index, seed = other
        image, _, _ = synthetic.Scene(seed, split, index, (64, 64)).read()
        assert np.abs(image.astype(int) - images[3]).mean() > 5, other


def test_weather_changes_the_light_and_nothing_else():
    def brightness(weather):
        scenes = [synthetic.Scene(0, "train", i, (64, 64), weather).read() for i in range(12)]
        return [image.mean() for image, _, _ in scenes], [label for _, label, _ in scenes]

    (clear, labels), (mixed, same) = brightness(0.0), brightness(1.0)
    np.testing.assert_array_equal(labels, same)
    assert np.std(clear) < 0.8 * np.std(mixed)


def test_every_pixel_has_a_class_and_every_class_its_share(drawn):
    images, labels = drawn
    assert images.dtype == labels.dtype == np.uint8
    share = np.bincount(labels.ravel(), minlength=7) / labels.size
    assert len(share) == len(synthetic.CLASS_NAMES) == len(synthetic.PALETTE) == 7
    assert share.min() > 0.01  # the rarest, pedestrians
    assert share.max() < 0.4


def test_sky_is_above_and_road_below(drawn):
    _, labels = drawn
    row = np.broadcast_to(np.arange(64)[:, None], labels.shape)
    sky, road = row[labels == 0].mean(), row[labels == 2].mean()
    assert sky < 32 < road


def test_size_is_free_and_not_square():
    image, label = synthetic.draw(np.random.default_rng(0), (48, 96))
    assert image.shape == (48, 96, 3)
    assert label.shape == (48, 96)


def test_colour_alone_does_not_tell_the_classes(drawn):
    """A table of the most frequent class of each colour, from half of the images, is poor."""
    images, labels = drawn
    codes = (images >> 5).astype(int) @ np.array([64, 8, 1])  # 512 colours
    votes = np.zeros((512, 7), int)
    np.add.at(votes, (codes[::2], labels[::2]), 1)
    predicted, truth = votes.argmax(1)[codes[1::2]], labels[1::2]
    iou = [
        ((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum()
        for c in range(7)
    ]
    assert np.mean(iou) < 0.3


def test_lighting_differs_between_scenes(drawn):
    images, _ = drawn
    assert images.mean((1, 2, 3)).std() > 15
    assert images.std((1, 2)).mean(1).min() > 5  # and none is a blank


def test_impossible_wishes_name_the_field():
    config = default_config().data.synthetic
    config.size = (8, 64)
    with pytest.raises(UserError, match=r"data\.synthetic .*\(8, 64\)"):
        synthetic.scenes(config)
