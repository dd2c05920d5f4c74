"""Colour jitter against torchvision, blur against SciPy and Pillow, boxes against a plain loop."""

from itertools import permutations

import color_jitter_record
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from parity_torchvision import load_torchvision
from PIL import Image, ImageFilter

from csc_jax import augment
from csc_jax.config import default_config

VIEW = default_config().method.unimatch_view


@pytest.fixture(scope="module")
def recorded():
    with np.load(color_jitter_record.RECORD) as record:
        return dict(record)


def as_batch(image, size):
    return jnp.broadcast_to(jnp.asarray(image), (size, *image.shape))


@pytest.mark.parity
def test_the_record_is_torchvisions(recorded):
    load_torchvision()
    for name, value in color_jitter_record.record().items():
        np.testing.assert_allclose(value, recorded[name], atol=1e-6, err_msg=name)


def test_color_jitter_in_every_order(recorded):
    image = jnp.asarray(recorded["image"] / np.float32(255))
    cases = (jnp.asarray(recorded[name]) for name in ("order", "factors", "hue"))
    after = jax.jit(jax.vmap(augment.color_jitter, (None, 0, 0, 0)))(image, *cases)
    np.testing.assert_allclose(after, recorded["after"], atol=1e-5)


@pytest.mark.parity
def test_color_jitter_on_whole_grey_levels():
    """UniMatch's own pipeline has Pillow's images, rounded after every change, hues to 1/256."""
    functional = load_torchvision().transforms.functional
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    for order in list(permutations(range(4)))[::5]:
        factors, hue = rng.uniform(0.5, 1.5, 3), rng.uniform(-0.25, 0.25)
        theirs = Image.fromarray(image)
        for i in order:
            name = ("brightness", "contrast", "saturation", "hue")[i]
            theirs = getattr(functional, f"adjust_{name}")(theirs, (*factors, hue)[i])
        ours = augment.color_jitter(
            jnp.asarray(image / np.float32(255)),
            jnp.asarray(order),
            jnp.asarray(factors, jnp.float32),
            jnp.float32(hue),
        )
        gap = np.abs(255 * np.asarray(ours) - np.asarray(theirs))
        assert np.mean(gap) < 2.5
        assert np.max(gap) < 20


def test_grey_scale():
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    config = default_config().method
    config.grayscale = 1.0
    (grey,) = augment.photometric(jax.random.key(0), as_batch(image, 1), config)
    expected = np.asarray(Image.fromarray(image).convert("L").convert("RGB"), float)
    np.testing.assert_allclose(grey, expected, atol=0.6)  # theirs is rounded


def test_jitter_is_drawn_as_in_torchvision(recorded, monkeypatch):
    image = as_batch(recorded["image"], color_jitter_record.DRAWS)
    config = default_config().method
    config.color_jitter = 1.0
    after = np.asarray(augment.photometric(jax.random.key(0), image, config)) / 255
    before = recorded["image"] / np.float32(255)
    change, clipped = np.transpose([color_jitter_record.statistics(before, x) for x in after])
    assert scipy.stats.ks_2samp(change, recorded["change"]).pvalue > 0.01
    assert scipy.stats.ks_2samp(clipped, recorded["clipped"]).pvalue > 0.01

    monkeypatch.setattr(augment, "color_jitter", lambda image, *drawn: drawn)
    keys = jax.random.split(jax.random.key(1), 2400)
    order, factors, hue = jax.vmap(augment._random_jitter, (0, None))(keys, image[0])
    orders, counts = np.unique(order, axis=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == sorted(permutations(range(4)))
    assert scipy.stats.chisquare(counts).pvalue > 0.01
    for factor in np.transpose(factors):
        assert scipy.stats.kstest(factor, scipy.stats.uniform(0.5, 1.0).cdf).pvalue > 0.01
    assert scipy.stats.kstest(hue, scipy.stats.uniform(-0.25, 0.5).cdf).pvalue > 0.01


def smooth_image(size):
    noise = np.random.default_rng(0).normal(size=(*size, 3))
    smooth = scipy.ndimage.gaussian_filter(noise, (2, 2, 0))
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur(sigma):
    for size in ((40, 24), (5, 3)):  # the second is smaller than the kernel
        image = smooth_image(size)
        blurred = augment.blur(jnp.asarray(image, jnp.float32), jnp.float32(sigma))
        expected = scipy.ndimage.gaussian_filter(
            image.astype(float), (sigma, sigma, 0), mode="nearest", truncate=10
        )
        np.testing.assert_allclose(blurred, expected, atol=0.01)  # of 255


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_near_pillows(sigma):
    """Which is UniMatch's: three box blurs, the border extended anew for each, rounded."""
    image = smooth_image((40, 24))
    blurred = augment.blur(jnp.asarray(image, jnp.float32), jnp.float32(sigma))
    theirs = Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
    gap = np.abs(blurred - np.asarray(theirs, float))
    assert np.mean(gap) < 1
    assert np.max(gap[8:-8, 8:-8]) < 3
    assert np.max(gap) < 15  # an image that ends in black: 92 at 0.7, 135 at 2


def test_blur_is_drawn_in_its_range(monkeypatch):
    monkeypatch.setattr(augment, "blur", lambda image, sigma: jnp.full_like(image, sigma / 2.5))
    config = default_config().method
    config.blur = 1.0
    images = jnp.zeros((2000, 1, 1, 3))
    sigma = np.asarray(augment.photometric(jax.random.key(0), images, config))[:, 0, 0, 0] / 102
    assert scipy.stats.kstest(sigma, scipy.stats.uniform(0.1, 1.9).cdf).pvalue > 0.01


def boxes_of(mask):
    """(top, left, height, width) of the one filled rectangle in each mask that has any."""
    found = []
    for one in np.asarray(mask)[np.any(mask, axis=(1, 2))]:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert one.sum() == one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].size
        found.append((rows[0], columns[0], len(rows), len(columns)))
    return np.array(found).T


def boxes_by_rejection(rng, count, size):
    """The same of UniMatch's program: sides and place are drawn until the box fits."""
    height, width = size
    found = []
    for area in rng.uniform(0.02, 0.4, count) * height * width:
        while True:
            ratio = rng.uniform(0.3, 1 / 0.3)
            rows, columns = int(np.sqrt(area * ratio)), int(np.sqrt(area / ratio))
            top, left = rng.integers(height), rng.integers(width)
            if top + rows <= height and left + columns <= width:
                break
        found.append((top, left, rows, columns))
    return np.array(found).T


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_boxes_are_drawn_as_by_rejection(size):
    batch = 4000
    mask = augment.unimatch_mask(jax.random.key(0), batch, size, VIEW)
    ours = boxes_of(mask)
    assert scipy.stats.binomtest(ours.shape[1], batch, 0.5).pvalue > 0.01
    theirs = boxes_by_rejection(np.random.default_rng(1), batch, size)
    for name, measure in {
        "top": lambda top, left, rows, columns: top,
        "left": lambda top, left, rows, columns: left,
        "area": lambda top, left, rows, columns: rows * columns,
        "ratio": lambda top, left, rows, columns: rows / columns,
        "below": lambda top, left, rows, columns: size[0] - top - rows,
        "right": lambda top, left, rows, columns: size[1] - left - columns,
    }.items():
        assert scipy.stats.ks_2samp(measure(*ours), measure(*theirs)).pvalue > 0.01, name


def test_boxes_follow_the_config():
    config = VIEW.copy_and_resolve_references()
    config.update({"cutmix": 1.0, "cutmix_area": (0.25, 0.25), "cutmix_ratio": (4.0, 4.0)})
    boxes = boxes_of(augment.unimatch_mask(jax.random.key(0), 50, (32, 32), config))
    assert boxes.shape[1] == 50
    np.testing.assert_array_equal(np.unique(boxes[2:], axis=1), [[32], [8]])
    config.cutmix = 0.0
    assert not np.any(augment.unimatch_mask(jax.random.key(0), 50, (32, 32), config))
    config.update({"cutmix": 1.0, "cutmix_area": (0.5, 0.5)})  # higher than the image
    assert not np.any(augment.unimatch_mask(jax.random.key(0), 50, (32, 32), config))
