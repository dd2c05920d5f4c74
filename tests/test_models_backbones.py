import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from csc_jax import models
from csc_jax.models.deeplabv3plus import rates_at
from csc_jax.models.efficientnet_lite import EfficientNetLite0
from csc_jax.models.layers import Conv
from csc_jax.models.resnet import ResNet


def _maps(features):
    low, deep = features.levels
    return low, features.middle, deep


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
    assert tuple(f.shape[-1] for f in _maps(features)) == channels


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
    assert [f.shape[1:3] for f in _maps(features)] == [low, middle, deep]


@pytest.mark.parametrize(
    ("depth", "output_stride", "multi_grid", "expected"),
    [
        # decisions.md#recipe: 4, 8, 16
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


# EfficientNet-Lite0


def test_efficientnet_has_the_published_size():
    network = EfficientNetLite0()
    variables = jax.eval_shape(
        lambda x: network.init(jax.random.key(0), x, train=False), jnp.zeros((1, 64, 64, 3))
    )
    # The published total less the last 1x1 convolution with its BatchNorm, and the classifier.
    head = 320 * 1280 + 2 * 1280 + 1281 * 1000
    assert models.count_parameters(variables["params"]) == 4_652_008 - head


@pytest.mark.parametrize(
    ("output_stride", "sizes", "strides", "dilations"),
    [
        (32, [(24, 32), (6, 8), (3, 4)], {1: 2, 3: 2, 5: 2, 11: 2}, {}),
        # The block that would have had the stride keeps the dilation of the stage before.
        (16, [(24, 32), (6, 8), (6, 8)], {1: 2, 3: 2, 5: 2}, dict.fromkeys((12, 13, 14, 15), 2)),
        (
            8,
            [(24, 32), (12, 16), (12, 16)],
            {1: 2, 3: 2},
            dict.fromkeys((6, 7, 8, 9, 10, 11), 2) | dict.fromkeys((12, 13, 14, 15), 4),
        ),
    ],
)
def test_efficientnet_strides_and_dilations(output_stride, sizes, strides, dilations):
    found = {}

    def record(call, args, kwargs, context):
        if getattr(context.module, "depthwise", False):
            block = int(context.module.path[0].removeprefix("block"))
            found[block] = context.module.stride, context.module.dilation
        return call(*args, **kwargs)

    network = EfficientNetLite0(output_stride)
    with nn.intercept_methods(record):
        features, _ = jax.eval_shape(
            lambda x: network.init_with_output(jax.random.key(0), x, train=False),
            jnp.zeros((1, 96, 128, 3)),
        )
    assert [f.shape[1:3] for f in _maps(features)] == sizes
    assert [f.shape[-1] for f in _maps(features)] == [24, 112, 320]
    assert found == {i: (strides.get(i, 1), dilations.get(i, 1)) for i in range(16)}


def test_efficientnet_draws_depthwise_kernels_by_their_own_fan_out():
    network = models.DeepLabV3Plus(2, "efficientnet_lite0", decoder_width=4, projection_dim=4)
    kernels = jax.device_get(models.initialize(network, jax.random.key(0)))["params"]["backbone"]
    depthwise = kernels["block12"]["depthwise"]["kernel"]  # 5 x 5, 1152 channels
    assert depthwise.std() == pytest.approx((2 / 25) ** 0.5, rel=0.03)
    pointwise = kernels["block12"]["project"]["kernel"]  # 1 x 1, 1152 -> 192
    assert pointwise.std() == pytest.approx((2 / 192) ** 0.5, rel=0.03)
