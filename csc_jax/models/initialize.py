"""Initial weights of a network, cut from one stream of random numbers."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from csc_jax.models.segmenter import Segmenter

_TOKENS = ("cls_token", "pos_embed", "register_tokens")


@partial(jax.jit, static_argnums=0, static_argnames="projection")
def initialize(network: Segmenter, key: jax.Array, *, projection: bool = True) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} of a network, all float32; without BatchNorm {"params"}.

    Convolution kernels are normal: in the backbone with variance 2 / fan-out (lineage,
    torchvision), elsewhere with 1 / (3 fan-in), the variance of PyTorch's default. A transformer's
    kernels and tokens have a deviation of 0.02 (DINOv2's code), its patch embedding PyTorch's.
    Normalisations and LayerScale start as the identity, in the last layer of a block too; biases
    start at 0.

    `network.init` compiles a random generator per kernel, half a minute for a ResNet-18 on a CPU;
    here one draw serves them all.

    Args:
      network: one that `models.build` makes.
      key: the same key gives the same values with and without the projection head.
      projection: whether to create that head.
    """
    image = jnp.zeros((1, 64, 64, network.bands))  # no parameter depends on the size
    init = partial(network.init, train=False, projection=projection)
    shapes = flatten_dict(jax.eval_shape(init, key, image))
    # Sorted, the projection head comes last and so does not shift the others' numbers.
    kernels = sorted(path for path in shapes if path[-1] in ("kernel", *_TOKENS))
    noise = jax.random.normal(key, (sum(shapes[path].size for path in kernels),))
    variables = {}
    start = 0
    for path in kernels:
        end = start + shapes[path].size
        values = noise[start:end].reshape(shapes[path].shape)
        variables[path] = values * _deviation(path, shapes[path].shape)
        start = end
    # Sorted, as the compilation cache knows the program by its text.
    for path in sorted(shapes.keys() - variables.keys()):
        fill = 1.0 if path[-1] in ("scale", "var") else 0.0
        # With a dtype: a weakly typed leaf would have the train step compiled again.
        variables[path] = jnp.full(shapes[path].shape, fill, jnp.float32)
    return unflatten_dict(variables)


def _deviation(path: tuple[str, ...], shape: tuple[int, ...]) -> float:
    if len(shape) != 4:
        return 0.02
    height, width, inputs, outputs = shape
    if path[1] == "backbone" and "patch_embed" not in path:
        fan_out = 1 if "depthwise" in path else outputs  # depthwise: a channel feeds one other
        variance = 2 / fan_out
    else:
        variance = 1 / (3 * inputs)
    return math.sqrt(variance / (height * width))
