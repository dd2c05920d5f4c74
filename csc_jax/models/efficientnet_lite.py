"""EfficientNet-Lite0 as a backbone: light enough to train from pretrained weights on a CPU."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from csc_jax.models.convolution import convolve
from csc_jax.models.depthwise import convolve_depthwise
from csc_jax.models.layers import BatchNorm, Features, checkpoint_block, draw_kernel, parameter


class Stage(NamedTuple):
    """Blocks of one width."""

    blocks: int
    kernel_size: int  # of the depthwise convolutions
    stride: int  # of the first block
    expansion: int  # channels inside a block, as a ratio to its input's
    features: int  # channels


STAGES = (  # of the published network (efficientnet_lite_builder.py)
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """Backbone without its classifier: (B, H, W, K) normalised image -> `Features`.

    A stage that would go beyond the output stride is dilated instead, by the rule of `ResNet`.
    Strided convolutions are padded as in TensorFlow and BatchNorm has epsilon 1e-3, as the
    published weights need it; their images were normalised with mean 127 and std 128.

    Its features end in a linear layer, not in a ReLU: its levels have 24 and 320 channels, `middle`
    112.
    """

    output_stride: int = 8  # 8, 16 or 32
    dtype: Any = jnp.float32
    remat: bool = False  # keep only the blocks' inputs for the gradient, compute the rest again

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> Features:
        block = checkpoint_block(InvertedResidual) if self.remat else InvertedResidual
        x = ConvNormRelu6(32, 3, stride=2, dtype=self.dtype, name="stem")(x, train)
        maps = []
        index = 0
        reached, dilation = 2, 1  # stride of the map and dilation so far
        for stage in STAGES:
            stride, first = 1, dilation
            if stage.stride == 2 and reached < self.output_stride:
                stride, reached = 2, 2 * reached
            elif stage.stride == 2:
                dilation = 2 * dilation
            for _ in range(stage.blocks):
                x = block(
                    stage.features,
                    stage.expansion,
                    stage.kernel_size,
                    stride=stride,
                    dilation=first,
                    dtype=self.dtype,
                    name=f"block{index}",
                )(x, train)
                stride, first = 1, dilation
                index += 1
            maps.append(x)
        return Features(levels=(maps[1], maps[6]), middle=maps[4])


def low_size(size: Any) -> Any:
    """Returns the sides of the first level of images with sides `size`, int or int array, px."""
    return -(-size // 4)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1: to (B, h/stride, w/stride, features)."""

    features: int
    expansion: int
    kernel_size: int
    stride: int
    dilation: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y, wide = x, self.expansion * x.shape[-1]
        if self.expansion > 1:
            y = ConvNormRelu6(wide, 1, dtype=self.dtype, name="expand")(y, train)
        y = ConvNormRelu6(
            wide,
            self.kernel_size,
            self.stride,
            self.dilation,
            depthwise=True,
            dtype=self.dtype,
            name="depthwise",
        )(y, train)
        y = ConvNormRelu6(self.features, 1, relu=False, dtype=self.dtype, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class ConvNormRelu6(nn.Module):
    """Convolution padded as in TensorFlow, BatchNorm with epsilon 1e-3 and, by default, ReLU6."""

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False  # the input then has `features` channels
    relu: bool = True
    dtype: Any = jnp.float32  # compute type; parameters and statistics are float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        inputs = 1 if self.depthwise else x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        kernel = parameter(self, "kernel", draw_kernel, shape)
        narrow, x = kernel.astype(self.dtype), x.astype(self.dtype)
        if self.depthwise:
            x = convolve_depthwise(x, narrow, self.stride, self.dilation)
        elif self.kernel_size == 1:
            x = convolve(x, kernel)
        else:
            strides, numbers = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, narrow, strides, "SAME", dimension_numbers=numbers)
        x = BatchNorm(epsilon=1e-3, dtype=self.dtype, name="bn")(x, train)
        return nn.relu6(x) if self.relu else x
