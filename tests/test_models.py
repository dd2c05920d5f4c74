import json
import re
import zlib
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from csc_jax import models
from csc_jax.config import default_config
from csc_jax.errors import UserError
from csc_jax.models.deeplabv3plus import rates_at
from csc_jax.models.layers import Conv, ConvNorm, convolve
from csc_jax.models.resnet import DEPTHS, BasicBlock, ResNet, _max_pool

GOLDEN = Path(__file__).parent / "golden" / "network"


@pytest.fixture(scope="module")
def tiny():
    """The smallest network with every head, on a backbone of one block a stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEPTHS, "tiny", (BasicBlock, (1, 1, 1, 1)))
        yield models.DeepLabV3Plus(
            num_classes=5,
            backbone="tiny",
            stem="7x7",
            output_stride=32,
            projection_dim=6,
            aux_head=True,
            width=8,
            aspp_rates=(8, 16),
            decoder_width=16,
        )


@pytest.fixture(scope="module")
def variables(tiny):
    return jax.device_get(models.initialize(tiny, jax.random.key(0)))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((2, 33, 41, 3)).astype(np.float32)


# Backbones


@pytest.mark.parametrize(
    ("depth", "parameters", "channels"),
    # torchvision's published totals less its fully connected layer
    [
        ("resnet18", 11_689_512 - 513_000, (64, 256, 512)),
        ("resnet34", 21_797_672 - 513_000, (64, 256, 512)),
        ("resnet50", 25_557_032 - 2_049_000, (256, 1024, 2048)),
        ("resnet101", 44_549_160 - 2_049_000, (256, 1024, 2048)),
    ],
)
def test_backbone_has_the_published_size(depth, parameters, channels):
    network = ResNet(depth, stem="7x7")
    image = jnp.zeros((1, 64, 64, 3))
    features, variables = jax.eval_shape(
        lambda: network.init_with_output(jax.random.key(0), image, train=False)
    )
    assert models.count_parameters(variables["params"]) == parameters
    assert tuple(f.shape[-1] for f in features) == channels


@pytest.mark.parametrize(
    ("stem", "output_stride", "low", "middle", "deep"),
    [
        ("deep", 8, (25, 33), (13, 17), (13, 17)),
        ("deep", 16, (25, 33), (7, 9), (7, 9)),
        ("deep", 32, (25, 33), (7, 9), (4, 5)),
        ("7x7", 8, (24, 32), (12, 16), (12, 16)),
        ("7x7", 16, (24, 32), (6, 8), (6, 8)),
        ("7x7", 32, (24, 32), (6, 8), (3, 4)),
    ],
)
def test_feature_maps_have_their_strides(stem, output_stride, low, middle, deep):
    network = ResNet("resnet18", stem=stem, width=4, output_stride=output_stride)
    image = jnp.zeros((1, 96, 128, 3))
    features, _ = jax.eval_shape(
        lambda: network.init_with_output(jax.random.key(0), image, train=False)
    )
    assert [f.shape[1:3] for f in features] == [low, middle, deep]


@pytest.mark.parametrize(
    ("depth", "output_stride", "multi_grid", "expected"),
    [
        # decisions.md, recipe facts: 4, 8, 16
        ("resnet50", 8, (2, 2, 4), {"layer3": [1, 2, 2, 2, 2, 2], "layer4": [4, 8, 16]}),
        ("resnet50", 8, (), {"layer3": [1, 2, 2, 2, 2, 2], "layer4": [2, 4, 4]}),
        ("resnet50", 16, (2, 2, 4), {"layer3": [1] * 6, "layer4": [2, 4, 8]}),
        ("resnet50", 32, (), {"layer3": [1] * 6, "layer4": [1, 1, 1]}),
        ("resnet18", 8, (), {"layer3": [1, 2, 2, 2], "layer4": [2, 4, 4, 4]}),
        ("resnet18", 16, (1, 2), {"layer3": [1] * 4, "layer4": [1, 2, 4, 4]}),
    ],
)
def test_last_stages_are_dilated(depth, output_stride, multi_grid, expected):
    found = {"layer3": [], "layer4": []}

    def record(call, args, kwargs, context):
        stage = next((p.split("_")[0] for p in context.module.path if p.startswith("layer")), "")
        if isinstance(context.module, Conv) and context.module.kernel_size == 3 and stage in found:
            found[stage].append(context.module.dilation)
        return call(*args, **kwargs)

    network = ResNet(depth, width=4, output_stride=output_stride, multi_grid=multi_grid)
    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda x: network.init(jax.random.key(0), x, train=False), jnp.zeros((1, 64, 64, 3))
        )
    assert found == expected


def test_aspp_rates_keep_their_reach():
    assert rates_at(8, (12, 24, 36)) == (12, 24, 36)
    assert rates_at(16, (12, 24, 36)) == (6, 12, 18)
    assert rates_at(32, (12, 24, 36)) == (3, 6, 9)
    assert rates_at(32, (1, 2)) == (1, 1)


# Layers


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


def test_gradient_of_dilated_convolution():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 5, 6, 2)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 2, 3)).astype(np.float32)
    weight = rng.standard_normal((1, 5, 6, 3)).astype(np.float32)

    def plain(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), ((4, 4), (4, 4)), rhs_dilation=(4, 4), dimension_numbers=numbers
        )

    def gradient(conv):
        scalar = jax.grad(lambda x, k: jnp.sum(conv(x, k) * weight), argnums=(0, 1))
        return jax.jit(scalar)(x, kernel)

    by_taps, by_xla = gradient(lambda x, k: convolve(x, k, dilation=4)), gradient(plain)
    for ours, reference in zip(by_taps, by_xla, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5)


def test_dilated_convolution_in_bfloat16_rounds_once():
    rng = np.random.default_rng(2)
    x, kernel = (
        jnp.asarray(rng.integers(-9, 9, s), jnp.bfloat16) for s in [(1, 5, 6, 4), (3, 3, 4, 2)]
    )
    exact = convolve_slowly(np.float32(x), np.float32(kernel), stride=1, dilation=4)
    out, pull_back = jax.vjp(lambda x, k: convolve(x, k, dilation=4), x, kernel)
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


# The whole network


@pytest.mark.parametrize("backbone", ["resnet18", "resnet101"])
def test_output_shapes(backbone):
    network = models.DeepLabV3Plus(19, backbone, projection_dim=32, aux_head=True)
    variables = jax.eval_shape(lambda: models.initialize(network, jax.random.key(0)))
    out = jax.eval_shape(
        lambda v, x: network.apply(v, x, train=False), variables, jnp.zeros((2, 97, 129, 3))
    )
    assert out.logits.shape == (2, 25, 33, 19)
    assert out.projection.shape == (2, 25, 33, 32)
    assert out.aux.shape == (2, 13, 17, 19)


def test_bfloat16_computes_with_float32_parameters_and_outputs(tiny, variables, image):
    network = tiny.clone(dtype=jnp.bfloat16)

    def train(variables):
        return network.apply(
            variables,
            image,
            train=True,
            mutable=["batch_stats", "intermediates"],
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=lambda module, _: isinstance(module, Conv | ConvNorm),
        )

    asked = jax.eval_shape(lambda: models.initialize(network, jax.random.key(0)))
    out, updates = jax.eval_shape(train, variables)
    inside = updates.pop("intermediates")
    assert {x.dtype.name for x in jax.tree.leaves((asked, out, updates))} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(inside)} == {"bfloat16"}


def test_initialize_fills_what_the_network_asks_for(tiny, variables, image):
    asked = jax.eval_shape(lambda x: tiny.init(jax.random.key(0), x, train=False), image)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(
        lambda a: (a.shape, a.dtype), asked
    )


def test_initialize_draws_the_lineage_variances(variables):
    params = variables["params"]
    backbone = params["backbone"]["layer4_0"]["conv2"]["conv"]["kernel"]  # 3 x 3, 64 -> 64
    assert backbone.std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    decoder = params["fuse"]["conv"]["kernel"]  # 3 x 3, 64 -> 16
    assert decoder.std() == pytest.approx((1 / (3 * 9 * 64)) ** 0.5, rel=0.03)
    kernels = [np.ravel(leaf)[:8] for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
    distinct = {tuple(np.round(kernel / kernel[0], 4).tolist()) for kernel in kernels}
    assert len(distinct) == len(kernels)


def test_projection_head_can_be_left_out(tiny, variables, image):
    without = models.initialize(tiny, jax.random.key(0), projection=False)
    assert variables["params"].keys() - without["params"].keys() == {"projection"}
    for collection, tree in without.items():
        rest = {key: variables[collection][key] for key in tree}
        jax.tree.map(np.testing.assert_array_equal, tree, rest)
    out = jax.eval_shape(
        lambda v: tiny.apply(v, image, train=False, projection=False), without
    )  # would fail for want of the head's parameters if the graph held it
    assert out.projection is None
    assert out.logits.shape == (2, 9, 11, 5)


def test_training_mode(tiny, variables, image):
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
    def gradient(params, key):
        def loss(params):
            out, updates = tiny.apply(
                {**variables, "params": params},
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            # Cubes, because a plain mean has no gradient through a normalisation.
            return sum(jnp.mean(x**3) for x in out), (out, updates["batch_stats"])

        return jax.grad(loss, has_aux=True)(params)

    gradients, (first, stats) = jax.device_get(gradient(variables["params"], jax.random.key(1)))
    _, (second, _) = jax.device_get(gradient(variables["params"], jax.random.key(2)))
    evaluate = jax.jit(lambda v: tiny.apply(v, image, train=False, mutable=["batch_stats"]))
    evaluated, unchanged = jax.device_get(evaluate(variables))  # needs no dropout key

    for one, other, still in zip(first, second, evaluated, strict=True):
        assert np.isfinite(one).all()
        assert np.abs(one - other).max() > 1e-3  # dropout
        assert np.abs(one - still).max() > 1e-3
    old, new = flatten_dict(variables["batch_stats"]), flatten_dict(stats)
    assert old.keys() == new.keys()
    assert all(np.abs(new[path] - old[path]).max() > 0 for path in old)
    jax.tree.map(np.testing.assert_array_equal, unchanged["batch_stats"], variables["batch_stats"])

    found = {"/".join(path): np.abs(g).max() for path, g in flatten_dict(gradients).items()}
    assert all(np.isfinite(largest) for largest in found.values())
    assert not [path for path, largest in found.items() if largest == 0]


def test_batch_statistics_follow_flax_momentum():
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
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * y.var((0, 1, 2)), atol=1e-5)


# Building from a config


def test_build_reads_every_field():
    config = default_config().model
    config.update(width=8, decoder_width=16, projection_dim=12, dtype="bfloat16", dropout=0.25)
    config.update(backbone="resnet34", stem="7x7", output_stride=16, aspp_rates=(6, 12))
    network = models.build(config, num_classes=7, aux_head=True)
    assert network == models.DeepLabV3Plus(
        num_classes=7,
        backbone="resnet34",
        stem="7x7",
        output_stride=16,
        projection_dim=12,
        aux_head=True,
        width=8,
        multi_grid=(2, 2, 4),
        aspp_rates=(6, 12),
        decoder_width=16,
        dropout=0.25,
        dtype=jnp.dtype(jnp.bfloat16),
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone", "resnet5", r"model\.backbone is 'resnet5'.*Did you mean 'resnet50'"),
        ("backbone", "vgg", r"model\.backbone is 'vgg'; it takes one of 'resnet18', 'resnet34'"),
        ("stem", "7x", r"model\.stem is '7x'.*Did you mean '7x7'"),
        ("output_stride", 4, r"model\.output_stride is 4; it takes one of 8, 16, 32"),
        ("multi_grid", (2, 4), r"model\.multi_grid is \(2, 4\).*resnet50 has 3 blocks"),
        ("aspp_rates", (0, 6), r"model\.aspp_rates is \(0, 6\); a dilation is at least 1"),
    ],
)
def test_build_refuses_impossible_networks(field, value, message):
    config = default_config().model
    config.backbone = "resnet50"
    config[field] = value
    with pytest.raises(UserError, match=message):
        models.build(config, num_classes=7, aux_head=False)


# The lineage's network (golden/network)

# Layer of the recorded PyTorch checkpoint -> module of ours.
LAYERS = [
    (r"encoder\.layer(\d)\.(\d+)\.(conv|bn)(\d)", r"backbone/layer\1_\2/conv\4/\3"),
    (r"encoder\.layer(\d)\.(\d+)\.downsample\.0", r"backbone/layer\1_\2/downsample/conv"),
    (r"encoder\.layer(\d)\.(\d+)\.downsample\.1", r"backbone/layer\1_\2/downsample/bn"),
    (r"encoder\.conv1\.0", "backbone/stem1/conv"),
    (r"encoder\.conv1\.1", "backbone/stem1/bn"),
    (r"encoder\.conv1\.3", "backbone/stem2/conv"),
    (r"encoder\.conv1\.4", "backbone/stem2/bn"),
    (r"encoder\.conv1\.6", "backbone/stem3/conv"),
    (r"encoder\.bn1", "backbone/stem3/bn"),
    (r"decoder\.low_conv\.0", "low_level/conv"),
    (r"decoder\.low_conv\.1", "low_level/bn"),
    (r"decoder\.aspp\.conv1\.1", "aspp/pool/conv"),
    (r"decoder\.aspp\.conv1\.2", "aspp/pool/bn"),
    (r"decoder\.aspp\.conv2\.0", "aspp/point/conv"),
    (r"decoder\.aspp\.conv2\.1", "aspp/point/bn"),
    *((rf"decoder\.aspp\.conv{i + 3}\.0", f"aspp/atrous{i}/conv") for i in range(3)),
    *((rf"decoder\.aspp\.conv{i + 3}\.1", f"aspp/atrous{i}/bn") for i in range(3)),
    (r"decoder\.head\.0", "fuse/conv"),
    (r"decoder\.head\.1", "fuse/bn"),
    (r"decoder\.representation\.(\d)", r"decoder.projection.\1"),  # as the classifier below
    (r"decoder\.(\w+)\.0", r"\1/conv1/conv"),
    (r"decoder\.(\w+)\.1", r"\1/conv1/bn"),
    (r"decoder\.(\w+)\.4", r"\1/conv2/conv"),
    (r"decoder\.(\w+)\.5", r"\1/conv2/bn"),
    (r"decoder\.(\w+)\.8", r"\1/out"),
]


def golden_tensor(name, shape):
    """The recipe of golden/README.md."""
    r = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    if name.endswith("running_var"):
        return (1 + 0.5 * r.random(shape)).astype("f4")
    if name.endswith(("running_mean", ".bias")):
        return (0.1 * r.standard_normal(shape)).astype("f4")
    if len(shape) == 4:
        return (np.sqrt(2 / np.prod(shape[1:])) * r.standard_normal(shape)).astype("f4")
    scale = 0.2 if name.endswith("bn3.weight") else 1
    return (scale * (1 + 0.1 * r.standard_normal(shape))).astype("f4")


def golden_variables():
    variables = {}
    shapes = json.loads((GOLDEN / "deeplabv3plus_resnet50_state_dict.json").read_text())
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked":
            continue
        for pattern, ours in LAYERS:
            if re.fullmatch(pattern, layer):
                layer = re.sub(pattern, ours, layer)
        value = golden_tensor(name, shape)
        if value.ndim == 4:
            leaf, value = "kernel", value.transpose(2, 3, 1, 0)
        leaf = {"weight": "scale", "running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
        collection = "batch_stats" if leaf in ("mean", "var") else "params"
        variables[(collection, *layer.split("/"), leaf)] = value
    return unflatten_dict(variables)


def test_network_matches_the_recorded_pytorch_outputs():
    network = models.DeepLabV3Plus(num_classes=21, backbone="resnet50")
    variables = golden_variables()
    asked = jax.eval_shape(lambda: models.initialize(network, jax.random.key(0)))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, asked)

    def is_backbone(module, method):
        return module.name == "backbone"

    @jax.jit
    def run(variables, image):
        return network.apply(
            variables,
            image,
            train=False,
            capture_intermediates=is_backbone,
            mutable=["intermediates"],
        )

    with (
        np.load(GOLDEN / "deeplabv3plus_resnet50.npz") as golden,
        jax.default_matmul_precision("highest"),
    ):
        out, captured = jax.device_get(run(variables, golden["image"]))
        (features,) = captured["intermediates"]["backbone"]["__call__"]
        np.testing.assert_allclose(features.low.mean((1, 2)), golden["layer1_mean"], atol=1e-4)
        np.testing.assert_allclose(features.deep.mean((1, 2)), golden["layer4_mean"], atol=1e-4)
        np.testing.assert_allclose(out.logits, golden["pred"], atol=1e-4)
        np.testing.assert_allclose(out.projection, golden["rep"], atol=1e-4)
