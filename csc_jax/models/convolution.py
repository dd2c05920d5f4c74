"""The convolution of all networks: PyTorch's, with gradients of its own for the kernel."""

from functools import partial

import jax
import jax.numpy as jnp

from csc_jax.models import plain

# Share of useful products below which `_convolve_by_taps` is taken. With its gradients it was 1.8
# times as fast on a CPU at a share of 0.4, 4 times at 0.2, 13 times at 0.11; XLA won above 0.5.
_TAPS_BELOW = 0.45


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """PyTorch's `conv2d(padding=dilation * (k - 1) / 2)` for odd k, without a bias.

    The factors of all products are of the dtype of `x`. The gradient of the kernel is of that of
    the kernel: for float32 and `x` of bfloat16 it is summed in float32, over devices as well, but
    for what cuDNN computes of it.

    Args:
        x: (B, h, w, K).
        kernel: (k, k, K, F), float32 or of the dtype of `x`.
        stride: of both axes.
        dilation: of both axes.

    Returns:
        (B, h', w', F) with h' = ceil(h / stride), w' = ceil(w / stride).
    """
    if plain.is_on():
        return _plainly(x, kernel, stride, dilation)
    return _convolve_fast(x, kernel, stride, dilation)


@partial(jax.jit, static_argnums=(2, 3))  # so that JAX traces it once for all layers of a shape
def _convolve_fast(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    if kernel.shape[0] == 1:
        x, stride = x[:, ::stride, ::stride], 1
    if stride == 1 and _share_inside(x, kernel.shape[0], dilation) < _TAPS_BELOW:
        return _convolve_by_taps(x, kernel.astype(x.dtype), dilation)
    return _convolve(x, kernel, stride, dilation)


def _by_xla(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    kernel = kernel.astype(x.dtype)
    if kernel.shape[0] == 1:
        return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])
    return _plainly(x, kernel, stride, dilation)


def _plainly(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    kernel = kernel.astype(x.dtype)
    pad = _pad(kernel, dilation)  # explicit: "SAME" shifts a strided one on even sizes
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


_convolve = jax.custom_vjp(_by_xla, nondiff_argnums=(2, 3))


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, dilation: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _by_xla(x, kernel, stride, dilation), (x, kernel)


def _backward(
    stride: int, dilation: int, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    by_x = jax.vjp(lambda x: _by_xla(x, kernel, stride, dilation), x)[1](gradient)[0]

    def by_xla(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: _by_xla(x, kernel, stride, dilation), kernel)[1](gradient)[0]

    as_product = partial(_kernel_gradient_as_product, dilation=dilation)
    if kernel.shape[0] == 1:
        return by_x, as_product(x, kernel, gradient)
    by_kernel = jax.lax.platform_dependent(
        x,
        kernel,
        gradient,
        cuda=as_product if dilation > 1 and stride == 1 else by_xla,
        default=partial(_kernel_gradient_as_convolution, stride=stride, dilation=dilation),
    )
    return by_x, by_kernel


_convolve.defvjp(_forward, _backward)


def _kernel_gradient_as_convolution(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, stride: int, dilation: int
) -> jax.Array:
    """The gradient of the kernel as JAX has it, but summed in the dtype of the kernel."""
    size, pad = kernel.shape[0], _pad(kernel, dilation)
    reach = [(size - 1) * dilation + (n - 1) * stride + 1 for n in gradient.shape[1:3]]
    return jax.lax.conv_general_dilated(
        x,
        gradient,
        window_strides=(dilation, dilation),
        padding=[(pad, n - pad - length) for n, length in zip(reach, x.shape[1:3], strict=True)],
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=kernel.dtype,
    )


def _kernel_gradient_as_product(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, dilation: int
) -> jax.Array:
    """The gradient of the kernel, for a stride of 1, as one matrix product for all its elements.

    The map with fewer channels is written out once for each element, shifted by its offset. On an
    H100 cuDNN's takes 7 ms more at any dilation above 1 than without one, for (4, 80, 80, 2048) to
    256 channels in bfloat16; forward and backward of DeepLabv3+ with ResNet-101 at
    (4, 640, 640, 3) went from 128 ms to 67 by this.
    """
    size, pad = kernel.shape[0], _pad(kernel, dilation)
    shift_x = x.shape[-1] < gradient.shape[-1]
    narrow, wide = (x, gradient) if shift_x else (gradient, x)
    height, width = narrow.shape[1:3]
    padded = jnp.pad(narrow, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    starts = [i * dilation for i in range(size)]
    if not shift_x:
        starts.reverse()  # the output's pixel lies as far before the input's as that behind it
    shifted = jnp.stack(
        [padded[:, top : top + height, left : left + width] for top in starts for left in starts],
        axis=3,
    )  # (B, h, w, k k, channels)
    form = "bhwti,bhwo->tio" if shift_x else "bhwto,bhwi->tio"
    products = jnp.einsum(form, shifted, wide, preferred_element_type=jnp.float32)
    return products.reshape(kernel.shape).astype(kernel.dtype)


def _pad(kernel: jax.Array, dilation: int) -> int:
    return dilation * (kernel.shape[0] - 1) // 2


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
