"""DeepLabv3+'s backbones by name; a new one is a module (x, train) -> Features, named here."""

from typing import Any

import flax.linen as nn

from csc_jax.models import efficientnet_lite, resnet
from csc_jax.models.efficientnet_lite import EfficientNetLite0
from csc_jax.models.resnet import DEPTHS, ResNet


def names() -> tuple[str, ...]:
    """Returns those of `model.backbone` that DeepLabv3+ is built on."""
    return (*DEPTHS, "efficientnet_lite0")


def make_backbone(
    name: str,
    *,
    stem: str,
    width: int,
    output_stride: int,
    multi_grid: tuple[int, ...],
    dtype: Any,
    remat: bool = False,
) -> nn.Module:
    """Returns the module called "backbone"; `stem`, `width` and `multi_grid` are for ResNets."""
    if name == "efficientnet_lite0":
        return EfficientNetLite0(output_stride, dtype, remat, name="backbone")
    return ResNet(name, stem, width, output_stride, multi_grid, dtype, remat, name="backbone")


def low_size(name: str, stem: str, size: Any) -> Any:
    """Returns the sides of the first level of images with sides `size`, int or int array, px."""
    if name == "efficientnet_lite0":
        return efficientnet_lite.low_size(size)
    return resnet.low_size(stem, size)
