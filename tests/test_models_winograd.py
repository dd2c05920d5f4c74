"""Convolutions with fewer products against plain ones, and what their rounding costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csc_jax.models import convolution, winograd


def plain(x, kernel, dilation):
    """XLA's convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((dilation, dilation),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def gradients(conv, x, kernel, weight):
    return jax.jit(jax.grad(lambda x, k: jnp.sum(conv(x, k) * weight), argnums=(0, 1)))(x, kernel)


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("size", "dilation"),
    [
        ((8, 12), 1),  # whole tiles
        ((9, 14), 1),
        ((1, 3), 1),  # less than a tile
        ((11, 9), 2),
        ((16, 17), 4),
        ((3, 5), 7),  # further than the map
    ],
)
def test_value_and_gradients_are_those_of_a_plain_convolution(size, dilation):
    x, kernel, weight = arrays((2, *size, 3), (3, 3, 3, 5), (2, *size, 5))
    found = winograd.convolve(x, kernel, dilation)
    np.testing.assert_allclose(found, plain(x, kernel, dilation), atol=2e-5)
    by_x, by_kernel = gradients(lambda x, k: plain(x, k, dilation), x, kernel, weight)
    np.testing.assert_allclose(
        winograd.input_gradient(kernel, weight, dilation), by_x, rtol=1e-5, atol=4e-5
    )
    np.testing.assert_allclose(
        winograd.kernel_gradient(x, weight, dilation), by_kernel, rtol=1e-5, atol=2e-4
    )


def rounding_error(transforms, x, kernel):
    """Root mean square error of `winograd.convolve`, over the output's standard deviation."""
    exact = np.float64(0)
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    for i in range(3):
        for j in range(3):
            exact = exact + padded[:, i : i + height, j : j + width] @ np.float64(kernel[i, j])
    with pytest.MonkeyPatch.context() as patch:
        for name, matrix in zip(("_B", "_G", "_A"), transforms, strict=True):
            patch.setattr(winograd, name, matrix)
        found = winograd.convolve.__wrapped__(x, kernel, 1)
    return np.sqrt(np.mean((found - exact) ** 2)) / exact.std()


def test_rounding_error_is_half_of_that_with_the_customary_points():
    x, kernel = arrays((2, 24, 24, 64), (3, 3, 64, 64))
    ours = rounding_error(winograd.transforms(), x, kernel)
    customary = rounding_error(winograd.transforms((0.0, 1.0, -1.0, 2.0, -2.0)), x, kernel)
    assert ours < 1.5e-6
    assert ours < 0.6 * customary


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_wide_convolution_takes_fewer_products_on_a_cpu(dilation):
    channels = convolution._WINOGRAD_CHANNELS
    x, kernel = arrays((2, 24, 24, channels), (3, 3, channels, channels))

    def flops(conv):
        def energy(x, kernel):
            return jnp.sum(conv(x, kernel, dilation=dilation) ** 2)

        program = jax.jit(jax.grad(energy, argnums=(0, 1))).lower(x, kernel).compile()
        return program.cost_analysis()["flops"]

    assert flops(convolution.convolve) < 0.5 * flops(plain)
    narrow = x[..., :8], kernel[:, :, :8, :8]
    assert not convolution._suits_winograd(*narrow, dilation)
    assert not convolution._suits_winograd(x.astype(jnp.bfloat16), kernel, dilation)
    assert not convolution._suits_winograd(x, kernel, 12)  # tiles of padding for the most part


@pytest.mark.parametrize("dilation", [1, 2])
def test_value_and_gradients_of_a_wide_convolution_are_those_of_a_plain_one(dilation):
    channels = convolution._WINOGRAD_CHANNELS
    x, kernel, weight = arrays(
        (1, 23, 24, channels), (3, 3, channels, channels + 1), (1, 23, 24, channels + 1)
    )
    assert convolution._suits_winograd(x, kernel, dilation)

    def everything(conv):
        value = conv(x, kernel, dilation=dilation)
        return value, *gradients(lambda x, k: conv(x, k, dilation=dilation), x, kernel, weight)

    ours, reference = everything(convolution.convolve), everything(plain)
    for mine, expected in zip(ours, reference, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5 * np.abs(expected).max())
