import re
from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csc_jax import models
from csc_jax.models import convolution
from csc_jax.models.convolution import convolve
from csc_jax.models.deeplabv3plus import Head
from csc_jax.models.depthwise import _by_xla, convolve_depthwise
from csc_jax.models.layers import BatchNorm, Conv, ConvNorm
from csc_jax.models.resnet import _max_pool


def convolve_slowly(x, kernel, stride, dilation):
    """The definition, one output pixel at a time."""
    pad = dilation * (kernel.shape[0] - 1) // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    reach = 2 * pad + 1
    height, width = (1 + (n - 1) // stride for n in x.shape[1:3])
    out = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            top, left = i * stride, j * stride
            window = padded[:, top : top + reach : dilation, left : left + reach : dilation]
            out[:, i, j] = np.einsum("bijk,ijkf->bf", window, kernel)
    return out


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation"),
    [
        ((6, 7), 3, 1, 1),
        ((6, 7), 3, 2, 1),
        ((7, 6), 7, 2, 1),
        ((6, 7), 1, 1, 1),
        ((7, 6), 1, 2, 1),
        ((6, 7), 3, 1, 2),  # mostly inside
        ((6, 7), 3, 1, 4),  # mostly padding, tap by tap from here on
        ((5, 9), 3, 1, 5),  # further than the height
        ((5, 9), 3, 1, 12),  # the centre alone
        ((1, 1), 3, 1, 1),
        ((5, 6), 3, 2, 2),
    ],
)
def test_convolve_matches_its_definition(size, kernel_size, stride, dilation):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 3)).astype(np.float32)
    kernel = rng.standard_normal((kernel_size, kernel_size, 3, 4)).astype(np.float32)
    expected = convolve_slowly(x, kernel, stride, dilation)
    conv = jax.jit(convolve, static_argnums=(2, 3))
    np.testing.assert_allclose(conv(x, kernel, stride, dilation), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation"),
    [
        ((5, 6), 3, 1, 1),
        ((5, 6), 3, 1, 2),
        ((5, 6), 3, 1, 4),  # tap by tap
        ((5, 6), 3, 2, 1),
        ((6, 5), 3, 2, 2),
        ((7, 6), 7, 2, 1),
        ((5, 6), 1, 1, 1),
        ((5, 6), 1, 2, 1),
    ],
)
@pytest.mark.parametrize("outputs", [1, 3])
def test_gradients_of_convolutions_are_those_of_xla(outputs, size, kernel_size, stride, dilation):
    rng = np.random.default_rng(1)
    pad = dilation * (kernel_size - 1) // 2
    x = rng.standard_normal((2, *size, 2)).astype(np.float32)
    kernel = rng.standard_normal((kernel_size, kernel_size, 2, outputs)).astype(np.float32)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((pad, pad), (pad, pad)),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    weight = np.float32(rng.standard_normal(jax.eval_shape(plain, x, kernel).shape))

    def gradient(conv):
        scalar = jax.grad(lambda x, k: jnp.sum(conv(x, k) * weight), argnums=(0, 1))
        return jax.jit(scalar)(x, kernel)

    ours = gradient(lambda x, k: convolve(x, k, stride, dilation))
    for mine, reference in zip(ours, gradient(plain), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)


@pytest.mark.parametrize("channels", [(3, 2), (2, 3), (2, 2)])  # either map is the narrower one
@pytest.mark.parametrize(("size", "dilation"), [((9, 8), 2), ((5, 7), 4), ((3, 3), 3)])
def test_the_kernel_gradient_of_a_gpu_is_that_of_xla(channels, size, dilation):
    rng = np.random.default_rng(4)
    x, gradient = (rng.standard_normal((2, *size, c)).astype(np.float32) for c in channels)
    kernel = rng.standard_normal((3, 3, *channels)).astype(np.float32)
    ours = convolution._kernel_gradient_as_product(x, kernel, gradient, dilation)
    pull_back = jax.vjp(lambda k: convolution._by_xla(x, k, 1, dilation), kernel)[1]
    np.testing.assert_allclose(ours, pull_back(gradient)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_takes_no_dilated_convolution_for_the_gradient_of_a_kernel(dtype):
    """Lowered for CUDA, which needs none: only value and gradient of the input are convolutions."""
    x, kernel = (jnp.zeros(s, dtype) for s in [(1, 24, 24, 48), (3, 3, 48, 48)])

    def convolutions(dilation):
        def loss(x, kernel):
            return jnp.sum(convolve(x, kernel, dilation=dilation) ** 2)

        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, kernel)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.convolution")

    assert convolutions(dilation=1) == 3
    assert convolutions(dilation=2) == 2


def test_dilated_convolution_in_bfloat16_rounds_once():
    rng = np.random.default_rng(2)
    x, kernel = (
        jnp.asarray(rng.integers(-9, 9, s), jnp.bfloat16) for s in [(1, 5, 6, 4), (3, 3, 4, 2)]
    )
    exact = convolve_slowly(np.float32(x), np.float32(kernel), stride=1, dilation=4)
    out, pull_back = jax.vjp(lambda x, k: convolve(x, k, dilation=4), x, kernel)
    np.testing.assert_array_equal(out, jnp.asarray(exact, jnp.bfloat16))
    assert {g.dtype.name for g in pull_back(out)} == {"bfloat16"}


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_gradients_of_convolutions_in_bfloat16_round_once(kernel_size):
    """Sums of integers are exact in float32, so that only the last rounding is left."""
    rng = np.random.default_rng(3)
    x, kernel = (
        jnp.asarray(rng.integers(-9, 9, s), jnp.bfloat16)
        for s in [(2, 9, 8, 3), (kernel_size, kernel_size, 3, 2)]
    )
    weight = jnp.asarray(rng.integers(-9, 9, (2, 9, 8, 2)), jnp.bfloat16)

    def gradient(dtype):
        arguments = (x.astype(dtype), kernel.astype(dtype))
        return jax.vjp(convolve, *arguments)[1](weight.astype(dtype))

    for ours, exact in zip(gradient(jnp.bfloat16), gradient(jnp.float32), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))


# Of (2, 9, 8) pixels: kernel size, stride and dilation.
GRADIENTS = [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (3, 2, 2)]


@pytest.mark.parametrize(("size", "stride", "dilation"), GRADIENTS)
def test_a_float32_kernel_has_float32_gradients_in_bfloat16(size, stride, dilation):
    """Its sums of integers reach 10,000, which bfloat16 would round to multiples of 64."""
    rng = np.random.default_rng(3)
    x = rng.integers(-99, 99, (2, 9, 8, 3))
    kernel = rng.normal(size=(size, size, 3, 2)).astype(np.float32)

    def run(x, weight):
        function = partial(convolve, stride=stride, dilation=dilation)
        return jax.vjp(lambda kernel: function(x, kernel), kernel)[1](weight)[0]

    shape = (2, -(-9 // stride), -(-8 // stride), 2)
    weight = rng.integers(-99, 99, shape)
    exact = run(x.astype(np.float32), weight.astype(np.float32))
    found = run(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, exact)


@pytest.mark.parametrize(("size", "stride", "dilation"), GRADIENTS)
def test_tpus_sum_the_gradient_of_a_kernel_in_float32_over_devices_too(size, stride, dilation):
    """A sum over devices has the type of the product that it is made of."""
    x, kernel = jnp.zeros((1, 24, 24, 48), jnp.bfloat16), jnp.zeros((size, size, 48, 24))

    def loss(kernel):
        return jnp.sum(convolve(x, kernel, stride, dilation).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss)).trace(kernel).lower(lowering_platforms=("tpu",))
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).* -> (\S+)", lowered.as_text())
    shape = f"{size}x{size}x48x24x" if size > 1 else "48x1x24x"
    types = [m[1] for product in products if (m := re.match(f"tensor<{shape}(\\w+)>", product))]
    assert types == ["f32"]


@pytest.mark.parametrize(("size", "stride", "dilation"), GRADIENTS[2:])
def test_the_gradient_of_a_kernel_as_a_convolution_is_that_of_jax(size, stride, dilation):
    rng = np.random.default_rng(4)
    x, kernel = (rng.normal(size=s).astype(np.float32) for s in [(2, 9, 8, 3), (size, size, 3, 4)])
    out, pull_back = jax.vjp(lambda k: convolution._by_xla(x, k, stride, dilation), kernel)
    weight = rng.normal(size=out.shape).astype(np.float32)
    found = convolution._kernel_gradient_as_convolution(x, kernel, weight, stride, dilation)
    np.testing.assert_allclose(found, pull_back(weight)[0], rtol=1e-5, atol=1e-5)


def depthwise_slowly(x, kernel, stride, dilation):
    """TensorFlow's definition of SAME: the smaller half of the padding in front."""
    reach = dilation * (kernel.shape[0] - 1) + 1
    out = [-(-n // stride) for n in x.shape[1:3]]
    total = [max(0, (m - 1) * stride + reach - n) for m, n in zip(out, x.shape[1:3], strict=True)]
    pads = [(t // 2, t - t // 2) for t in total]
    padded = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)))
    result = np.zeros((x.shape[0], *out, x.shape[-1]))
    for i, j in np.ndindex(*out):
        top, left = i * stride, j * stride
        window = padded[:, top : top + reach : dilation, left : left + reach : dilation]
        result[:, i, j] = np.einsum("bijk,ijk->bk", window, kernel[:, :, 0])
    return result


DEPTHWISE = [  # size, kernel size, stride, dilation
    ((6, 7), 3, 1, 1),
    ((6, 7), 3, 2, 1),
    ((6, 8), 5, 2, 1),
    ((7, 6), 5, 1, 2),
    ((3, 4), 5, 1, 4),  # reaches beyond the map
    ((1, 1), 3, 2, 1),
]


@pytest.mark.parametrize(("size", "kernel_size", "stride", "dilation"), DEPTHWISE)
def test_depthwise_matches_its_definition_and_the_gradient_of_xla(
    size, kernel_size, stride, dilation
):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 3)).astype(np.float32)
    kernel = rng.standard_normal((kernel_size, kernel_size, 1, 3)).astype(np.float32)
    expected = depthwise_slowly(x, kernel, stride, dilation)
    weight = rng.standard_normal(expected.shape).astype(np.float32)

    def run(convolve):
        out, pull_back = jax.vjp(lambda x, k: convolve(x, k, stride, dilation), x, kernel)
        return out, *pull_back(weight)

    ours = jax.jit(lambda: run(convolve_depthwise))()
    plain = jax.jit(lambda: run(_by_xla))()
    np.testing.assert_allclose(ours[0], expected, atol=1e-5)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_depthwise_in_bfloat16_rounds_once():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.integers(-9, 9, (1, 5, 6, 4)), jnp.bfloat16)
    kernel = jnp.asarray(rng.integers(-9, 9, (3, 3, 1, 4)), jnp.bfloat16)
    exact = depthwise_slowly(np.float32(x), np.float32(kernel), stride=1, dilation=2)
    out, pull_back = jax.vjp(lambda x, k: convolve_depthwise(x, k, 1, 2), x, kernel)
    np.testing.assert_array_equal(out, jnp.asarray(exact, jnp.bfloat16))
    assert {g.dtype.name for g in pull_back(out)} == {"bfloat16"}


@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize("size", [(6, 7), (1, 2)])
def test_max_pool_matches_its_definition(size, ceil_mode):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    rounded = np.ceil if ceil_mode else np.floor
    height, width = (int(rounded((n - 1) / 2)) + 1 for n in size)  # PyTorch's documentation
    expected = np.zeros((2, height, width, 3), np.float32)
    for i in range(height):
        for j in range(width):
            rows, columns = slice(max(0, 2 * i - 1), 2 * i + 2), slice(max(0, 2 * j - 1), 2 * j + 2)
            expected[:, i, j] = x[:, rows, columns].max((1, 2))

    @jax.jit
    def run(x):
        pooled, pull_back = jax.vjp(lambda x: _max_pool(x, ceil_mode), x)
        return pooled, pull_back(jnp.ones_like(pooled))[0]

    pooled, gradient = run(x)
    np.testing.assert_array_equal(pooled, expected)
    assert gradient.sum() == pytest.approx(expected.size)  # each output has one source


def test_batch_statistics_follow_pytorch():
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    layer = ConvNorm(4)
    kernel = np.random.default_rng(1).standard_normal((3, 3, 3, 4)).astype(np.float32)
    variables = jax.tree.map(
        lambda leaf: kernel if leaf.shape == kernel.shape else jnp.ones(leaf.shape),
        jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False)),
    )
    y = convolve(x, kernel)
    _, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    stats = updates["batch_stats"]["bn"]
    np.testing.assert_allclose(stats["mean"], 0.9 + 0.1 * y.mean((0, 1, 2)), atol=1e-6)
    unbiased = y.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * unbiased, atol=1e-5)


def test_batch_statistics_of_a_single_value_stay_finite():
    layer = BatchNorm()
    x = jnp.ones((1, 1, 1, 3))
    variables = layer.init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
    _, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_and_its_gradient_are_those_of_flax(dtype):
    rng = np.random.default_rng(0)
    deviation = np.array([0.1, 1.0, 5.0, 1.0])
    x = jnp.asarray(3 + deviation * rng.standard_normal((3, 5, 7, 4)), dtype)
    pull = jnp.asarray(rng.standard_normal(x.shape), dtype)
    params = {"scale": jnp.array([0.5, 1.5, -1.0, 0.0]), "bias": jnp.array([0.0, 1.0, 2.0, -3.0])}
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}

    def run(layer, x, **kwargs):
        def apply(params, x):
            variables = {"params": params, "batch_stats": stats}
            return layer.apply(variables, x, mutable=["batch_stats"], **kwargs)

        y, pull_back, updates = jax.vjp(apply, params, x, has_aux=True)
        return y, updates["batch_stats"]["mean"], pull_back(pull.astype(y.dtype))

    y, mean, (by_params, by_x) = run(BatchNorm(dtype=dtype), x, train=True)
    assert y.dtype == by_x.dtype == dtype
    plain = nn.BatchNorm(use_running_average=False, momentum=0.9)
    expected_y, expected_mean, (expected_by_params, expected_by_x) = run(plain, jnp.float32(x))
    rtol = 1e-4 if dtype == jnp.float32 else 0.02
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=rtol)
    close(np.float32(y), expected_y)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    jax.tree.map(close, by_params, expected_by_params)
    close(np.float32(by_x), expected_by_x)


def test_a_parameter_of_another_shape_is_refused():
    layer = ConvNorm(5)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False)
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r"kernel.*conv"):
        layer.apply(variables, jnp.zeros((1, 4, 4, 2)), train=False)
    variables["params"]["bn"]["scale"] = jnp.ones(1)
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r"scale.*bn"):
        layer.apply(variables, jnp.zeros((1, 4, 4, 3)), train=False)


# Resizing


def resize_slowly(x, size):
    """PyTorch's definition with align_corners=True, one output pixel at a time, in float64."""
    out = np.zeros((x.shape[0], *size, x.shape[3]))
    scales = [(n - 1) / (m - 1) if m > 1 else 0.0 for n, m in zip(x.shape[1:3], size, strict=True)]
    for i in range(size[0]):
        for j in range(size[1]):
            y0, x0 = int(i * scales[0] + 1e-9), int(j * scales[1] + 1e-9)
            y1, x1 = min(y0 + 1, x.shape[1] - 1), min(x0 + 1, x.shape[2] - 1)
            v, u = i * scales[0] - y0, j * scales[1] - x0
            top = x[:, y0, x0] * (1 - u) + x[:, y0, x1] * u
            bottom = x[:, y1, x0] * (1 - u) + x[:, y1, x1] * u
            out[:, i, j] = top * (1 - v) + bottom * v
    return out


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((4, 5), (13, 17)),
        ((25, 33), (96, 128)),
        ((13, 17), (7, 5)),
        ((3, 4), (1, 1)),
        ((1, 1), (3, 2)),
        ((1, 6), (4, 1)),
        ((5, 5), (5, 9)),
    ],
)
def test_resize_matches_its_definition(size, target):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    y = np.random.default_rng(1).standard_normal((2, *target, 3)).astype(np.float32)

    @jax.jit
    def run(x, y):
        resized, pull_back = jax.vjp(lambda x: models.resize_aligned(x, target), x)
        return resized, pull_back(y)[0]

    resized, gradient = run(x, y)
    np.testing.assert_allclose(resized, resize_slowly(x, target), atol=1e-5)
    # Linear, so the gradient is the transposed map: <A x, y> = <x, A' y>.
    np.testing.assert_allclose(np.vdot(resized, y), np.vdot(x, gradient), atol=1e-3)


def test_resize_keeps_equal_sizes_and_dtypes():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 5, 2)), jnp.float32)
    np.testing.assert_array_equal(models.resize_aligned(x, (4, 5)), x)
    for dtype in (jnp.bfloat16, jnp.float16):
        assert models.resize_aligned(x.astype(dtype), (7, 9)).dtype == dtype


def test_gradients_of_a_head_wait_for_each_other():
    """Or XLA leaves those of the kernels for last, and keeps the maps that they are made of."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    variables = Conv(4).init(jax.random.key(1), x)

    def gradient(together):
        def energy(variables, x):
            return jnp.sum(Conv(4, together=together).apply(variables, x) ** 2)

        return jax.jit(jax.grad(energy, (0, 1)))

    apart, together = (gradient(t) for t in (False, True))
    jax.tree.map(np.testing.assert_array_equal, apart(variables, x), together(variables, x))
    assert "optimization_barrier" not in apart.lower(variables, x).as_text()
    assert "optimization_barrier" in together.lower(variables, x).as_text()

    head = Head(3, width=4, depth=2, dropout=0.0, dtype=jnp.float32)
    variables = head.init(jax.random.key(1), x, False)
    energy = jax.grad(lambda v: jnp.sum(head.apply(v, x, False) ** 2))
    # One for each of its three convolutions.
    assert jax.jit(energy).lower(variables).as_text().count("optimization_barrier") == 3
