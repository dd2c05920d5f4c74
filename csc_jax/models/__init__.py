"""Networks: `build` makes the one of a config; `DeepLabV3Plus` and `DPT` take every choice."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from csc_jax.errors import UserError
from csc_jax.models import backbones
from csc_jax.models.deeplabv3plus import DeepLabV3Plus
from csc_jax.models.dpt import DPT
from csc_jax.models.initialize import initialize
from csc_jax.models.layers import Features, Outputs
from csc_jax.models.resize import nearest_multiple, resize_aligned
from csc_jax.models.resnet import DEPTHS, STEMS
from csc_jax.models.segmenter import Segmenter
from csc_jax.models.vit import FORMS

__all__ = [
    "DPT",
    "DeepLabV3Plus",
    "Features",
    "Outputs",
    "Segmenter",
    "build",
    "check_crop",
    "count_parameters",
    "initialize",
    "names",
    "resize_aligned",
]


def names() -> tuple[str, ...]:
    """Returns what `model.backbone` takes."""
    return (*backbones.names(), *FORMS)


def build(config: ConfigDict, num_classes: int, aux_head: bool, bands: int = 3) -> Segmenter:
    """Returns the network that `config` (config.model) describes.

    Args:
      config: the section `model` of the config.
      num_classes: C.
      aux_head: whether there is an auxiliary head on layer3 (decisions.md 21).
      bands: K, channels of an image (`data.bands`).

    Raises:
      UserError: no such backbone, stem or output stride, dilations that do not fit it, or a head
        that it has no place for.
    """
    _check_choice("backbone", config.backbone, names())
    if config.backbone in FORMS:
        return _build_dpt(config, num_classes, aux_head, bands)
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
    if config.projection_stride != 1:
        raise UserError(
            f"model.projection_stride is {config.projection_stride}, but model.backbone is "
            f"{config.backbone!r}: only the DPT head of a vision transformer has maps fine enough "
            "for that. Set --config.model.projection_stride=1."
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
        frozen=config.freeze_backbone,
        bands=bands,
    )


def _build_dpt(config: ConfigDict, num_classes: int, aux_head: bool, bands: int) -> DPT:
    if aux_head:
        raise UserError(
            f"loss.aux_weight is above 0, but model.backbone is {config.backbone!r}: the auxiliary "
            "head is on the third stage of a convolutional network, and a transformer has no "
            "stages. Set --config.loss.aux_weight=0."
        )
    _check_choice("projection_stride", config.projection_stride, (1, 2, 4, 8))  # divide any map
    return DPT(
        num_classes=num_classes,
        backbone=config.backbone,
        projection_dim=config.projection_dim,
        projection_stride=config.projection_stride,
        dropout=config.dropout,
        drop_path=config.drop_path,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        frozen=config.freeze_backbone,
        bands=bands,
    )


def check_crop(backbone: str, network: Segmenter, size: Sequence[int]) -> None:
    """Raises UserError for a training crop whose sides are no multiples of the network's patch.

    Args:
      backbone: `model.backbone`, for the message.
      network: that `build` made of it.
      size: `data.crop_size`, (height, width) px.
    """
    patch = network.patch
    if all(side % patch == 0 for side in size):
        return
    near = [sorted({max(side // patch, 1) * patch, -(-side // patch) * patch}) for side in size]
    asked = ", ".join(" or ".join(map(str, each)) for each in near)
    nearest = ",".join(str(nearest_multiple(side, patch)) for side in size)
    raise UserError(
        f"data.crop_size is {tuple(size)}, but {backbone} sees patches of {patch} px, and the "
        f"sides of a crop are multiples of that: ({asked}). Set --config.data.crop_size={nearest}."
    )


def count_parameters(params: Any) -> int:
    """Returns the number of scalars in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _check_choice(field: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        words = [choice for choice in choices if isinstance(choice, str)]
        near = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(map(repr, choices))
        raise UserError(f"model.{field} is {value!r}; it takes one of {known}.{hint}")
