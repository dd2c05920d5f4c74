"""The evaluated network as one function of its weights and images: what exported files hold."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from csc_jax import models
from csc_jax.augment import normalize_images
from csc_jax.deploy.description import Description
from csc_jax.models.resize import nearest_multiple, resize_aligned

Function = Callable[[Mapping[str, Any], jax.Array], tuple[jax.Array, jax.Array]]


def function(description: Description) -> Function:
    """Returns (weights by name, images (B, H, W, K)) -> class ids and probabilities.

    Normalisation and the resize to the image's own size are inside, the projection head is not. A
    transformer sees its images at the nearest size of whole patches, as in evaluation.
    Class ids are (B, H, W) uint8, probabilities (B, H, W, C) float32.

    Raises:
      UserError: a config that no network fits.
    """
    config = description.config
    classes, bands = len(description.class_names), config.data.bands
    model = models.build(config.model, classes, aux_head=False, bands=bands)

    def segment(weights: Mapping[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        variables = unflatten_dict({tuple(name.split("/")): w for name, w in weights.items()})
        own = images.shape[1], images.shape[2]
        whole, pixels = own, images.astype(jnp.float32)
        if model.patch > 1:  # as in evaluation: `make_predictor`
            height, width = (nearest_multiple(side, model.patch) for side in own)
            whole, pixels = (height, width), resize_aligned(pixels, (height, width))
        pixels = normalize_images(pixels, config.data.mean, config.data.std)
        logits = model.apply(variables, pixels, train=False, projection=False).logits
        logits = resize_aligned(resize_aligned(logits, whole), own)
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8), jax.nn.softmax(logits)

    return segment
