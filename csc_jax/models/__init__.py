"""Networks: `build` makes the one that a config describes, `DeepLabV3Plus` takes every choice."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from csc_jax.errors import UserError
from csc_jax.models import backbones
from csc_jax.models.deeplabv3plus import DeepLabV3Plus, Outputs
from csc_jax.models.initialize import initialize
from csc_jax.models.layers import Features
from csc_jax.models.resize import resize_aligned
from csc_jax.models.resnet import DEPTHS, STEMS

__all__ = [
    "DeepLabV3Plus",
    "Features",
    "Outputs",
    "build",
    "count_parameters",
    "initialize",
    "resize_aligned",
]


def build(config: ConfigDict, num_classes: int, aux_head: bool) -> DeepLabV3Plus:
    """Returns the network that `config` (config.model) describes.

    Args:
      config: the section `model` of the config.
      num_classes: C.
      aux_head: whether there is an auxiliary head on layer3 (decisions.md 21).

    Raises:
      UserError: no such backbone, stem or output stride, or dilations that do not fit it.
    """
    _check_choice("backbone", config.backbone, backbones.names())
    _check_choice("stem", config.stem, STEMS)
    _check_choice("output_stride", config.output_stride, (8, 16, 32))
    for field in ("multi_grid", "aspp_rates"):
        if any(dilation < 1 for dilation in config[field]):
            raise UserError(f"model.{field} is {config[field]}; a dilation is at least 1.")
    if config.backbone in DEPTHS and config.multi_grid:
        blocks = DEPTHS[config.backbone][1][-1]
        if len(config.multi_grid) < blocks:
            raise UserError(
                f"model.multi_grid is {config.multi_grid}, but the last stage of "
                f"{config.backbone} has {blocks} blocks; give as many numbers, or () for none."
            )
    return DeepLabV3Plus(
        num_classes=num_classes,
        backbone=config.backbone,
        stem=config.stem,
        output_stride=config.output_stride,
        projection_dim=config.projection_dim,
        aux_head=aux_head,
        width=config.width,
        multi_grid=tuple(config.multi_grid),
        aspp_rates=tuple(config.aspp_rates),
        decoder_width=config.decoder_width,
        dropout=config.dropout,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )


def count_parameters(params: Any) -> int:
    """Returns the number of scalars in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _check_choice(field: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), map(str, choices), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(map(repr, choices))
        raise UserError(f"model.{field} is {value!r}; it takes one of {known}.{hint}")
