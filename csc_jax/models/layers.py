"""What backbones and decoder share: the convolution with its fast paths, and ConvNorm."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

# Share of useful products below which `_convolve_by_taps` is taken. With its gradients it was 1.8
# times as fast on a CPU at a share of 0.4, 4 times at 0.2, 13 times at 0.11; XLA won above 0.5.
_TAPS_BELOW = 0.45


class Features(NamedTuple):
    """What a backbone returns: feature maps (B, h, w, K) in the compute dtype."""

    low: jax.Array  # stride 4 (layer1 of a ResNet): edges for the decoder
    middle: jax.Array  # before the last stride (layer3): input of the auxiliary head
    deep: jax.Array  # last stage (layer4), at the output stride: input of ASPP


def checkpoint_block(block: type[nn.Module]) -> type[nn.Module]:
    """Returns a block (x, train) whose inside is computed again for the gradient, not kept."""
    return nn.remat(block, static_argnums=(2,))  # self, x and train: 2 is `train`


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """PyTorch's `conv2d(padding=dilation * (k - 1) / 2)` for odd k, without a bias.

    Args:
        x: (B, h, w, K).
        kernel: (k, k, K, F), of the dtype of `x`.
        stride: of both axes.
        dilation: of both axes.

    Returns:
        (B, h', w', F) with h' = ceil(h / stride), w' = ceil(w / stride).
    """
    size = kernel.shape[0]
    if size == 1:
        # As a matrix product: on a CPU, XLA's weight gradient of a 1x1 convolution is slower.
        return jnp.einsum("bhwi,io->bhwo", x[:, ::stride, ::stride], kernel[0, 0])
    if stride == 1 and _share_inside(x, size, dilation) < _TAPS_BELOW:
        return _convolve_by_taps(x, kernel, dilation)
    pad = dilation * (size - 1) // 2  # explicit: "SAME" shifts a strided one on even sizes
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _share_inside(x: jax.Array, size: int, dilation: int) -> float:
    """Share of a convolution's products that read a pixel of `x` and not the zero padding."""
    share = 1.0
    for length in x.shape[1:3]:
        offsets = [abs(i - size // 2) * dilation for i in range(size)]
        share *= sum(max(0, length - offset) for offset in offsets) / (size * length)
    return share


def _convolve_by_taps(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """The convolution as one matrix product per kernel element, over the pixels it reaches.

    ASPP's dilations come near the size of the map or exceed it, so that most products of a plain
    convolution are with padding.
    """
    size, height, width = kernel.shape[0], x.shape[1], x.shape[2]
    out = jnp.zeros((*x.shape[:3], kernel.shape[-1]))  # float32: nine roundings to bfloat16 add up
    for i in range(size):
        for j in range(size):
            dy, dx = (i - size // 2) * dilation, (j - size // 2) * dilation
            if abs(dy) >= height or abs(dx) >= width:
                continue
            seen = x[:, max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)]
            tap = jnp.einsum(
                "bhwi,io->bhwo", seen, kernel[i, j], preferred_element_type=jnp.float32
            )
            pad_y, pad_x = (max(0, -dy), max(0, dy)), (max(0, -dx), max(0, dx))
            out = out + jnp.pad(tap, ((0, 0), pad_y, pad_x, (0, 0)))
    return out.astype(x.dtype)


class Conv(nn.Module):
    """`convolve` with its parameters: (B, h, w, K) -> (B, h', w', features)."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32  # compute type; parameters are float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.dilation)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return y


class BatchNorm(nn.BatchNorm):
    """PyTorch's BatchNorm2d: momentum 0.9 (0.1 in its sense) and an unbiased running variance.

    Flax's running variance is the biased one, which is smaller by a factor of 1 - 1/n for n pixels
    of a batch: nothing where n is 10,000, but half in the pooled branch of ASPP, where n is the
    number of images, for two of them. Statistics are float32 and run over the whole batch, all
    devices together.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:  # type: ignore[override]
        before: Any = self.get_variable("batch_stats", "var")
        y = super().__call__(x, use_running_average=not train)
        if train and not self.is_initializing():
            n = x.size // x.shape[-1]
            kept = self.momentum * before
            added = self.get_variable("batch_stats", "var") - kept
            self.put_variable("batch_stats", "var", kept + added * (n / max(n - 1, 1)))
        return y


class ConvNorm(nn.Module):
    """Convolution, batch normalisation and, by default, ReLU; shapes as in `Conv`."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    relu: bool = True
    use_bias: bool = False  # without effect on the output, but lineage checkpoints hold some
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.dilation,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = BatchNorm(dtype=self.dtype, name="bn")(x, train)
        return nn.relu(x) if self.relu else x
