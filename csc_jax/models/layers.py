"""What backbones and decoder share: convolution and normalisation as PyTorch has them."""

from functools import partial
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from csc_jax.models.convolution import convolve
from csc_jax.models.normalization import batch_normalize, normalize, update_running


class Features(NamedTuple):
    """What a backbone returns: feature maps (B, h, w, K) in the compute dtype."""

    # What the decoder reads, shallow to deep. Of a convolutional network two: stride 4 (layer1 of a
    # ResNet), edges for the decoder, and the last stage (layer4), at the output stride, the input
    # of ASPP. Of a vision transformer four, all at the stride of its patches.
    levels: tuple[jax.Array, ...]
    # Before the last stride (layer3): input of the auxiliary head; None without such a stage.
    middle: jax.Array | None


class Outputs(NamedTuple):
    """Results of a network; (h, w) is the size of its finest map, see `logits_size`."""

    logits: jax.Array  # (B, h, w, C) float32
    # (B, h, w, D) in the compute dtype, not normalised, since few pixels of it are ever looked at;
    # with `model.projection_stride` s each s-th row and column of that. None where not asked for.
    projection: jax.Array | None
    # (B, h', w', C) float32 at the stride of `Features.middle`; None without that head.
    aux: jax.Array | None
    # (B, h'', w'', `encoded_width`) float32: what the decoder makes the rest of, at the deepest
    # level's size.
    encoded: jax.Array


def checkpoint_block(block: type[nn.Module]) -> type[nn.Module]:
    """Returns a block (x, train) whose inside is computed again for the gradient, not kept."""
    return nn.remat(block, static_argnums=(2,))  # self, x and train: 2 is `train`


@partial(jax.jit, static_argnums=(1, 2))  # so that JAX traces it once for all layers of a shape
def draw_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initializer of kernels for `network.init`; `models.initialize` draws them otherwise."""
    return nn.initializers.lecun_normal()(key, shape, dtype)


def parameter(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]
) -> jax.Array:
    """Returns `module.param(name, initializer, shape)`, float32.

    Flax traces the initializer to learn the shape of a parameter that is there: a sixth of the time
    to trace a ResNet-101's training step. Here the shapes are compared.

    Raises:
      flax.errors.ScopeParamShapeError: the parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, initializer, shape)
    value: jax.Array = module.get_variable("params", name)
    if value.shape != shape:
        path = "/".join(module.path)
        raise flax.errors.ScopeParamShapeError(name, path, value.shape, shape)
    return value


@jax.custom_vjp
def gradients_together(*arrays: Any) -> tuple[Any, ...]:
    """Returns its arguments, arrays or None; no gradient of one goes on before all are there.

    Nothing waits for the gradient of a kernel but the optimizer, so XLA may leave it for the end of
    the step, and the maps that it is made of are kept until then: at stride 4 large ones.
    """
    return arrays


gradients_together.defvjp(
    lambda *arrays: (arrays, None), lambda _, gradients: jax.lax.optimization_barrier(gradients)
)


class Conv(nn.Module):
    """`convolve` with its parameters: (B, h, w, K) -> (B, h', w', features)."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32  # compute type; parameters are float32
    together: bool = False  # `gradients_together` of input and parameters

    @nn.compact
    def __call__(self, x: jax.Array, *, learn_bias: bool = True) -> jax.Array:
        """Returns the convolution; learn_bias=False gives the bias a gradient of zero."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", draw_kernel, shape)
        bias = None
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            bias = (bias if learn_bias else jax.lax.stop_gradient(bias)).astype(self.dtype)
        if self.together:
            x, kernel, bias = gradients_together(x, kernel, bias)
        y = convolve(x.astype(self.dtype), kernel, self.stride, self.dilation)
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm2d: momentum 0.9 (0.1 in its sense) and an unbiased running variance.

    Flax's running variance is the biased one, which is smaller by a factor of 1 - 1/n for n pixels
    of a batch: nothing where n is 10,000, but half in the pooled branch of ASPP, where n is the
    number of images, for two of them. Statistics are float32 and run over the whole batch, all
    devices together. Variables have Flax's names.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32  # of the result

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(..., K) -> (..., K)."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        variance = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = parameter(self, "scale", nn.initializers.ones, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, shape)
        running = mean.value, variance.value
        form = {"epsilon": self.epsilon, "dtype": self.dtype}
        if not train:
            return normalize(x, running, scale, bias, **form)
        y, now = batch_normalize(x, scale, bias, **form)
        if not self.is_initializing():
            pixels = x.size // x.shape[-1]
            mean.value, variance.value = update_running(
                running, now, pixels, momentum=self.momentum
            )
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
    together: bool = False  # as in `Conv`

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        # The mean takes a bias out again, so that its gradient is zero. Left to itself it would be
        # a sum of rounding errors, for which a GPU keeps the map's gradient to the end of the step.
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.dilation,
            use_bias=self.use_bias,
            dtype=self.dtype,
            together=self.together,
            name="conv",
        )(x, learn_bias=not train)
        x = BatchNorm(dtype=self.dtype, name="bn")(x, train)
        return nn.relu(x) if self.relu else x


def drop_maps(rate: float, train: bool) -> nn.Dropout:
    """Drops whole channels of an image (Dropout2d, lineage)."""
    return nn.Dropout(rate, broadcast_dims=(1, 2), deterministic=not train)
