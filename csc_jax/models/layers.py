"""What backbones and decoder share: convolution and normalisation as PyTorch has them."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from csc_jax.models.convolution import convolve


class Features(NamedTuple):
    """What a backbone returns: feature maps (B, h, w, K) in the compute dtype."""

    low: jax.Array  # stride 4 (layer1 of a ResNet): edges for the decoder
    middle: jax.Array  # before the last stride (layer3): input of the auxiliary head
    deep: jax.Array  # last stage (layer4), at the output stride: input of ASPP


def checkpoint_block(block: type[nn.Module]) -> type[nn.Module]:
    """Returns a block (x, train) whose inside is computed again for the gradient, not kept."""
    return nn.remat(block, static_argnums=(2,))  # self, x and train: 2 is `train`


class Conv(nn.Module):
    """`convolve` with its parameters: (B, h, w, K) -> (B, h', w', features)."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32  # compute type; parameters are float32

    @nn.compact
    def __call__(self, x: jax.Array, convolved: jax.Array | None = None) -> jax.Array:
        """`convolved`, (B, h', w', features), is taken for x with the kernel where it is given."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        y = convolved
        if y is None:
            y = convolve(x.astype(self.dtype), kernel, self.stride, self.dilation)
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
    def __call__(self, x: jax.Array, train: bool, convolved: jax.Array | None = None) -> jax.Array:
        """`convolved` as in `Conv`."""
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.dilation,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="conv",
        )(x, convolved)
        x = BatchNorm(dtype=self.dtype, name="bn")(x, train)
        return nn.relu(x) if self.relu else x
