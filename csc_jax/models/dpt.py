"""A vision transformer with the dense head of UniMatch V2, and a projection head beside it.

Ranftl et al., "Vision Transformers for Dense Prediction" (ICCV 2021), in the form of UniMatch V2's
code: no readout of the class token, no BatchNorm, all resizing with aligned corners.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from csc_jax.models.convolution import convolve
from csc_jax.models.layers import Conv, Features, Outputs, draw_kernel, drop_maps, parameter
from csc_jax.models.resize import nearest_multiple, resize_aligned
from csc_jax.models.vit import FORMS, ViT

_UP = 8  # rows of the logits for one row of patches

# By the width of the transformer: channels of the head's maps, and of each level before (UniMatch
# V2's code; vit_tiny's are in the same ratio).
SIZES: dict[int, tuple[int, tuple[int, int, int, int]]] = {
    64: (16, (8, 16, 32, 64)),
    384: (64, (48, 96, 192, 384)),
    768: (128, (96, 192, 384, 768)),
    1024: (256, (256, 512, 1024, 1024)),
}


class DPT(nn.Module):
    """Segmentation network: (B, H, W, K) normalised image of any size -> `Outputs`.

    Images whose sides are no multiples of a patch are resized to the nearest ones first. The finest
    map has 8 pixels a patch and side: stride 14/8 for DINOv2.

    Top-level parameter keys: `backbone`, `assemble1` to `assemble4`, `fuse1` to `fuse4`,
    `classifier` and `projection`. Initialise with projection=True to create all of them.
    """

    num_classes: int  # C
    backbone: str = "dinov2_small"  # a key of `vit.FORMS`
    projection_dim: int = 256  # D
    projection_stride: int = 1  # of the projection, in pixels of the logits; a divisor of 8
    dropout: float = 0.0  # probability of a channel of the fused map, which both heads read
    drop_path: float = 0.0  # as in `ViT`
    dtype: Any = jnp.float32  # compute type; parameters are float32
    remat: bool = False  # trade time for memory: the transformer's blocks are computed twice
    frozen: bool = False  # the transformer does in training what it does in evaluation
    bands: int = 3  # K, channels of an image

    @property
    def patch(self) -> int:
        """Sides of an image are multiples of so many px, or it is resized to such."""
        return FORMS[self.backbone].patch

    @property
    def encoded_width(self) -> int:
        """Channels of `Outputs.encoded`: the deepest level is handed on as it is."""
        return FORMS[self.backbone].width

    @property
    def encoded_scale(self) -> int:
        """How much finer the logits are than `Outputs.encoded`."""
        return _UP

    def without_dropout(self) -> "DPT":
        """Returns the same network without any random choice."""
        return self.clone(dropout=0.0, drop_path=0.0)

    def logits_size(self, size: Any) -> Any:
        """Returns the sides of the logits of images with sides `size`, int or int array, px."""
        return nearest_multiple(size, self.patch) // self.patch * _UP

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        projection: bool = True,
        perturb: Callable[[Features], Features] | None = None,
    ) -> Outputs:
        """Runs the network; train=True needs a "dropout" key. There are no statistics.

        Args:
          x: (B, H, W, K) normalised image.
          train: whether dropout and drop path are on.
          projection: whether the projection is computed.
          perturb: changes the transformer's features before anything is made of them; they may come
            out for another number of images, as where each is decoded with and without noise.
        """
        form = FORMS[self.backbone]
        height, width = (nearest_multiple(n, form.patch) for n in x.shape[1:3])
        x = resize_aligned(x, (height, width))
        vit = ViT(form, self.dtype, self.remat, self.drop_path, name="backbone")
        features = vit(x, train and not self.frozen)
        if perturb is not None:
            features = perturb(features)

        channels, of_levels = SIZES[form.width]
        maps = [
            Assemble(each, channels, i, self.dtype, name=f"assemble{i}")(level)
            for i, (each, level) in enumerate(zip(of_levels, features.levels, strict=True), 1)
        ]
        sizes = [(x.shape[1], x.shape[2]) for x in maps]
        sizes.insert(0, (2 * sizes[0][0], 2 * sizes[0][1]))
        fused = None
        for i in range(len(maps), 0, -1):
            fuse = Fuse(channels, sizes[i - 1], self.dtype, name=f"fuse{i}")
            fused = fuse(fused, maps[i - 1])
        fused = drop_maps(self.dropout, train)(fused)

        classify = Head(self.num_classes, channels, self.dtype, name="classifier")
        project = Head(
            self.projection_dim, channels, self.dtype, self.projection_stride, name="projection"
        )
        return Outputs(
            logits=classify(fused).astype(jnp.float32),
            projection=project(fused) if projection else None,
            aux=None,
            encoded=features.levels[-1].astype(jnp.float32),
        )


class Assemble(nn.Module):
    """A level (B, r, c, K) as a map of a pyramid: 4 or 2 times its size, its own, or half of it."""

    width: int  # channels before the last convolution
    features: int  # and after it
    level: int  # 1 to 4
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Conv(self.width, kernel_size=1, dtype=self.dtype, name="project")(x)
        if self.level < 3:
            x = Enlarge(self.width, 2 ** (3 - self.level), self.dtype, name="resize")(x)
        elif self.level == 4:
            x = Conv(self.width, stride=2, dtype=self.dtype, name="resize")(x)
        return Conv(self.features, use_bias=False, dtype=self.dtype, name="reduce")(x)


class Enlarge(nn.Module):
    """A transposed convolution of equal size and stride: (B, h, w, K) to (B, s h, s w, F)."""

    features: int
    scale: int  # s
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        images, height, width, channels = x.shape
        scale, shape = self.scale, (self.scale, self.scale, channels, self.features)
        kernel = parameter(self, "kernel", draw_kernel, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        products = kernel.transpose(2, 0, 1, 3).reshape(1, 1, channels, -1)
        y = convolve(x.astype(self.dtype), products)
        y = y.reshape(images, height, width, scale, scale, -1).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(images, height * scale, width * scale, -1)
        return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class Fuse(nn.Module):
    """Adds a level to what the deeper ones have become, and enlarges both."""

    width: int
    size: tuple[int, int]  # of the result
    dtype: Any

    @nn.compact
    def __call__(self, deeper: jax.Array | None, level: jax.Array) -> jax.Array:
        """(B, h, w, width) each, to (B, *size, width); None: there is no deeper one.

        The deepest level lacks the first unit's part. Its parameters are there all the same, as in
        the published checkpoints.
        """
        first = Residual(self.width, self.dtype, name="unit1")(level)
        x = level if deeper is None else deeper + first
        x = Residual(self.width, self.dtype, name="unit2")(x)
        # Theirs comes after the resizing; the two commute, and this is a quarter of the products.
        x = Conv(self.width, kernel_size=1, dtype=self.dtype, name="out")(x)
        return resize_aligned(x, self.size)


class Residual(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, with a shortcut."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Conv(self.width, dtype=self.dtype, name="conv1")(nn.relu(x))
        return x + Conv(self.width, dtype=self.dtype, name="conv2")(nn.relu(y))


class Head(nn.Module):
    """A 3x3 convolution with ReLU, then a 1x1: (B, h, w, K) -> (B, h', w', F), F being `features`.

    With a stride s it computes each s-th pixel of what it is without, h' = ceil(h / s).
    """

    features: int
    width: int
    dtype: Any
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        form = {"dtype": self.dtype, "together": True}
        x = nn.relu(Conv(self.width, stride=self.stride, name="conv1", **form)(x))
        return Conv(self.features, kernel_size=1, name="out", **form)(x)
