"""ResNet-18, 34, 50 and 101 with dilated stages (decisions.md#recipe)."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from csc_jax.models.layers import ConvNorm, Features, checkpoint_block

STEMS = ("deep", "7x7")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: to (B, h/stride, w/stride, width)."""

    width: int
    stride: int
    dilations: tuple[int, int]  # of the first, strided convolution and of the second
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, self.width, dtype=self.dtype)
        first, second = self.dilations
        y = conv(stride=self.stride, dilation=first, name="conv1")(x, train)
        y = conv(dilation=second, relu=False, name="conv2")(y, train)
        if x.shape != y.shape:
            shortcut = conv(kernel_size=1, stride=self.stride, relu=False, name="downsample")
            x = shortcut(x, train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with a shortcut: to (B, h/stride, w/stride, 4 width)."""

    width: int
    stride: int
    dilations: tuple[int, int]  # only the first is used: there is one 3x3, and it has the stride
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, dtype=self.dtype)
        dilation = self.dilations[0]
        y = conv(self.width, kernel_size=1, name="conv1")(x, train)
        y = conv(self.width, stride=self.stride, dilation=dilation, name="conv2")(y, train)
        y = conv(4 * self.width, kernel_size=1, relu=False, name="conv3")(y, train)
        if x.shape != y.shape:
            shortcut = conv(
                4 * self.width, kernel_size=1, stride=self.stride, relu=False, name="downsample"
            )
            x = shortcut(x, train)
        return nn.relu(x + y)


DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """Backbone without its classifier: (B, H, W, K) normalised image -> `Features`.

    A stage that would go beyond the output stride keeps its resolution and doubles the dilation
    instead. The convolution that would have had the stride keeps the dilation of the stage before,
    because its input has not been thinned out (torchvision, lineage); BasicBlock, for which
    neither has a dilated form, follows the same rule with its first convolution.

    The deep stem pools in ceil mode (lineage), so that its stride-4 map of an even size has a row
    more: 25 for 96 and for 97 pixels. Sizes of 8 n + 1 fit aligned corners exactly.
    """

    depth: str = "resnet101"  # key of DEPTHS
    stem: str = "deep"  # one of STEMS
    width: int = 64  # channels of the first stage
    output_stride: int = 8  # 8, 16 or 32
    multi_grid: tuple[int, ...] = (2, 2, 4)  # multiplies the dilations of the last stage's blocks
    dtype: Any = jnp.float32
    remat: bool = False  # keep only the blocks' inputs for the gradient, compute the rest again

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> Features:
        x = x.astype(self.dtype)
        x = self._deep_stem(x, train) if self.stem == "deep" else self._plain_stem(x, train)
        kind, depths = DEPTHS[self.depth]
        block: Any = checkpoint_block(kind) if self.remat else kind
        stages = []
        reached, dilation = 4, 1  # stride of the map and dilation so far
        for stage, depth in enumerate(depths, start=1):
            stride, first = 1, dilation
            if stage > 1 and reached < self.output_stride:
                stride, reached = 2, 2 * reached
            elif stage > 1:
                dilation = 2 * dilation
            for i in range(depth):
                grid = self.multi_grid[i] if stage == 4 and self.multi_grid else 1
                x = block(
                    self.width * 2 ** (stage - 1),
                    stride=stride,
                    dilations=(first * grid, dilation * grid),
                    dtype=self.dtype,
                    name=f"layer{stage}_{i}",
                )(x, train)
                stride, first = 1, dilation
            stages.append(x)
        return Features(levels=(stages[0], stages[3]), middle=stages[2])

    def _deep_stem(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, dtype=self.dtype)
        x = conv(self.width, stride=2, name="stem1")(x, train)
        x = conv(self.width, name="stem2")(x, train)
        x = conv(2 * self.width, name="stem3")(x, train)
        return _max_pool(x, ceil_mode=True)

    def _plain_stem(self, x: jax.Array, train: bool) -> jax.Array:
        x = ConvNorm(self.width, kernel_size=7, stride=2, dtype=self.dtype, name="stem1")(x, train)
        return _max_pool(x, ceil_mode=False)


def low_size(stem: str, size: Any) -> Any:
    """Returns the sides of the first level of images with sides `size`, int or int array, px."""
    return _pooled(-(-size // 2), ceil_mode=stem == "deep")


def _pooled(size: Any, ceil_mode: bool) -> Any:
    return size // 2 + 1 if ceil_mode else -(-size // 2)


def _max_pool(x: jax.Array, ceil_mode: bool) -> jax.Array:
    """PyTorch's MaxPool2d(3, stride=2, padding=1) on (B, h, w, K); h becomes `out` below."""
    # As maxima of strided slices, one axis after the other: the gradient of XLA's own pooling
    # (select-and-scatter) takes 17 times as long on a CPU.
    for axis in (1, 2):
        size = x.shape[axis]
        out = _pooled(size, ceil_mode)
        pad = [(0, 0)] * 4
        pad[axis] = (1, 2 * out - size)  # windows i = 0..out-1 cover 2 i - 1 .. 2 i + 1
        x = jnp.pad(x, pad, constant_values=-jnp.inf)
        first, second, third = (
            jax.lax.slice_in_dim(x, i, i + 2 * out - 1, stride=2, axis=axis) for i in range(3)
        )
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x
