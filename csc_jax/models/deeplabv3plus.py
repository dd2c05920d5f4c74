"""DeepLabv3+ with a projection head (decisions.md 16 and decisions.md#recipe)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from csc_jax.contrast import devices
from csc_jax.models.backbones import low_size, make_backbone
from csc_jax.models.layers import Conv, ConvNorm, Features, Outputs, drop_maps
from csc_jax.models.resize import resize_aligned


class DeepLabV3Plus(nn.Module):
    """Segmentation network: (B, H, W, K) normalised image -> `Outputs`.

    Top-level parameter keys: `backbone`, `low_level`, `aspp`, `fuse`, `classifier`, `projection`
    and, with `aux_head`, `auxiliary`. Initialise with projection=True to create all of them.
    """

    num_classes: int  # C
    backbone: str = "resnet101"  # one of backbones.names()
    stem: str = "deep"  # ResNets only: deep | 7x7
    output_stride: int = 8  # 8, 16 or 32
    projection_dim: int = 256  # D
    aux_head: bool = False  # on the third stage (decisions.md 21)
    width: int = 64  # ResNets only: channels of the first stage
    multi_grid: tuple[int, ...] = (2, 2, 4)  # ResNets only
    aspp_rates: tuple[int, ...] = (12, 24, 36)  # at output stride 8; see `rates_at`
    decoder_width: int = 256  # channels of each ASPP branch and of the heads
    dropout: float = 0.1  # probability, after `fuse` and in the heads
    dtype: Any = jnp.float32  # compute type; parameters and statistics are float32
    remat: bool = False  # trade time for memory: the backbone's blocks are computed twice
    # The same for the projection head: two 3x3 convolutions more, and none of its maps is there
    # when memory is tightest, in the loss at full size. None: unless the device is a CPU.
    remat_projection: bool | None = None
    frozen: bool = False  # the backbone does in training what it does in evaluation
    bands: int = 3  # K, channels of an image

    @property
    def patch(self) -> int:
        """Sides of an image are multiples of so many px; 1 = any size is taken as it is."""
        return 1

    @property
    def encoded_width(self) -> int:
        """Channels of `Outputs.encoded`."""
        return self.decoder_width

    @property
    def encoded_scale(self) -> int:
        """How much finer the logits are than `Outputs.encoded`, about; a power of 2."""
        return self.output_stride // 4

    def without_dropout(self) -> "DeepLabV3Plus":
        """Returns the same network without any random choice."""
        return self.clone(dropout=0.0)

    def logits_size(self, size: Any) -> Any:
        """Returns the sides of the logits of images with sides `size`, int or int array, px."""
        return low_size(self.backbone, self.stem, size)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        projection: bool = True,
        perturb: Callable[[Features], Features] | None = None,
    ) -> Outputs:
        """Runs the network; train=True needs a "dropout" key and mutable "batch_stats".

        Args:
          x: (B, H, W, K) normalised image.
          train: whether dropout and batch statistics are on.
          projection: whether the projection is computed.
          perturb: changes the backbone's features before anything is made of them; they may come
            out for another number of images, as where each is decoded with and without noise.
        """
        features = make_backbone(
            self.backbone,
            stem=self.stem,
            width=self.width,
            output_stride=self.output_stride,
            multi_grid=self.multi_grid,
            dtype=self.dtype,
            remat=self.remat,
        )(x, train and not self.frozen)
        if perturb is not None:
            features = perturb(features)

        conv = partial(ConvNorm, self.decoder_width, dtype=self.dtype)
        rates = rates_at(self.output_stride, self.aspp_rates)
        low, deep = features.levels
        deep = ASPP(self.decoder_width, rates, self.dtype, name="aspp")(deep, train)
        deep = conv(name="fuse")(deep, train)
        deep = encoded = drop_maps(self.dropout, train)(deep)
        low = conv(kernel_size=1, use_bias=True, name="low_level")(low, train)
        deep = resize_aligned(deep, (low.shape[1], low.shape[2]))
        fused = jnp.concatenate([low, deep], axis=-1)  # (B, h, w, 2 decoder_width)

        form = {"width": self.decoder_width, "dropout": self.dropout, "dtype": self.dtype}
        aux = Head(self.num_classes, depth=1, name="auxiliary", **form) if self.aux_head else None
        classify = Head(self.num_classes, depth=2, name="classifier", **form)
        twice = train and self._remat_projection()
        kind = nn.remat(Head, static_argnums=(2,)) if twice else Head
        project = kind(self.projection_dim, depth=2, name="projection", **form)
        return Outputs(
            logits=classify(fused, train).astype(jnp.float32),
            projection=project(fused, train) if projection else None,
            aux=aux(features.middle, train).astype(jnp.float32) if aux else None,
            encoded=encoded.astype(jnp.float32),
        )

    def _remat_projection(self) -> bool:
        if self.remat_projection is None:
            return devices.platform() != "cpu"
        return self.remat_projection


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: (B, h, w, K) -> (B, h, w, (2 + len(rates)) * width)."""

    width: int
    rates: Sequence[int]  # dilations of the 3x3 branches
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, self.width, dtype=self.dtype)
        mean = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
        pooled = conv(kernel_size=1, name="pool")(mean, train)
        branches = [jnp.broadcast_to(pooled, (*x.shape[:3], self.width))]
        branches.append(conv(kernel_size=1, name="point")(x, train))
        for i, rate in enumerate(self.rates):
            branches.append(conv(dilation=rate, name=f"atrous{i}")(x, train))
        return jnp.concatenate(branches, axis=-1)


class Head(nn.Module):
    """`depth` 3x3 convolutions with BN, ReLU and dropout, then a 1x1: (B, h, w, K) -> (B, h, w, F).

    Computes in `dtype`; F is `features`.
    """

    features: int
    width: int
    depth: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        form = {"dtype": self.dtype, "together": True}
        for i in range(1, self.depth + 1):
            conv = ConvNorm(self.width, use_bias=True, name=f"conv{i}", **form)
            x = drop_maps(self.dropout, train)(conv(x, train))
        return Conv(self.features, kernel_size=1, name="out", **form)(x)


def rates_at(output_stride: int, rates: Sequence[int]) -> tuple[int, ...]:
    """Scales ASPP dilations given for output stride 8, so that they span the same image pixels."""
    return tuple(max(1, rate * 8 // output_stride) for rate in rates)
