"""The images that a run looks at again and again."""

import numpy as np
import pytest

from csc_jax.probe import _centre_crops


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
