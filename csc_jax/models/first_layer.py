"""The first convolution of pretrained weights, for images of another number of bands."""

import logging
import math
from typing import Any

import numpy as np

log = logging.getLogger("csc_jax")

_RGB = 3


def adapt(weight: Any, bands: int) -> Any:
    """Returns the kernel of a first convolution for `bands` channels, by the rule of timm.

    One band gets the sum over red, green and blue: the network sees it as it would a grey RGB
    image. K bands get red, green, blue, red, … times 3 / K, so that the sums keep their scale. It
    is `adapt_input_conv` of timm.

    Args:
      weight: (K', 3, h, w), PyTorch's layout; anything else is returned as it is.
      bands: K.
    """
    if np.ndim(weight) != 4 or np.shape(weight)[1] != _RGB or bands == _RGB:
        return weight
    rgb = np.asarray(weight, np.float32)
    if bands == 1:
        log.info("The first convolution, of RGB, is summed over its channels for one band")
        return rgb.sum(axis=1, keepdims=True)
    log.info(
        "The first convolution, of RGB, is repeated for %d bands and multiplied by %d/%d",
        *(bands, _RGB, bands),
    )
    repeated = np.tile(rgb, (1, math.ceil(bands / _RGB), 1, 1))[:, :bands]
    return repeated * np.float32(_RGB / bands)
