"""Our networks against independent ones in PyTorch, with the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from benchmarks.torch_network import DeepLabV3Plus as DeepLabTorch  # noqa: E402
from benchmarks.torch_network import ResNet as ResNetTorch  # noqa: E402
from benchmarks.torch_network import state_arrays  # noqa: E402
from parity_torchvision import load_torchvision  # noqa: E402
from torch.nn import functional  # noqa: E402

from csc_jax import losses, models  # noqa: E402
from csc_jax.config import default_config  # noqa: E402
from csc_jax.models.resnet import DEPTHS, ResNet  # noqa: E402
from csc_jax.models.weights import convert_torch_state_dict  # noqa: E402
from csc_jax.optimizer import make_optimizer  # noqa: E402

pytestmark = pytest.mark.parity


def torch_resnet(*arguments):
    """A network whose statistics and scales differ from one and zero."""
    torch.manual_seed(0)
    return shaken(ResNetTorch(*arguments))


def shaken(network):
    """Scales and statistics as after training."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.6, 1.2)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return network


def to_jax(torch_network, network):
    """The same weights for a backbone of ours."""
    shapes = jax.eval_shape(
        lambda x: network.init(jax.random.key(0), x, train=False), jnp.zeros((1, 64, 64, 3))
    )
    wrapped = {collection: {"backbone": tree} for collection, tree in shapes.items()}
    converted = convert_torch_state_dict(state_arrays(torch_network), wrapped)
    return {collection: tree["backbone"] for collection, tree in converted.items()}


def stages(features):
    """First, third and last stage of a convolutional backbone."""
    return features.levels[0], features.middle, features.levels[1]


def channels_last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def image(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("depth", "stem", "output_stride", "multi_grid"),
    [
        ("resnet18", "7x7", 32, ()),
        ("resnet18", "deep", 8, ()),
        ("resnet34", "7x7", 16, ()),
        ("resnet50", "deep", 8, (2, 2, 4)),
        ("resnet101", "7x7", 16, (1, 2, 4)),
    ],
)
def test_resnet_matches_pytorch_stage_by_stage(depth, stem, output_stride, multi_grid):
    theirs = torch_resnet(depth, stem, 8, output_stride, multi_grid).eval()
    ours = ResNet(depth, stem, 8, output_stride, multi_grid)
    variables = to_jax(theirs, ours)
    x = image(2, 33, 41, 3)
    ends = {f"layer{s}_{n - 1}": s - 1 for s, n in enumerate(DEPTHS[depth][1], start=1)}

    def run(variables, x):
        return ours.apply(
            variables,
            x,
            train=False,
            capture_intermediates=lambda module, _: module.name in ends,
            mutable=["intermediates"],
        )

    features, captured = jax.jit(run)(variables, x)
    with torch.no_grad():
        expected = [channels_last(m) for m in theirs(torch.tensor(x.transpose(0, 3, 1, 2)))]
    for name, stage in ends.items():
        (found,) = captured["intermediates"][name]["__call__"]
        scale = np.abs(expected[stage]).max()
        np.testing.assert_allclose(found, expected[stage], atol=1e-5 * scale)
    for found, stage in zip(stages(features), (0, 2, 3), strict=True):
        assert found.shape == expected[stage].shape


def published_resnet(library, depth, output_stride):
    torchvision = load_torchvision()  # timm imports it too
    if library == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        return timm.create_model(depth, output_stride=output_stride)
    dilated = [output_stride < stride for stride in (8, 16, 32)]
    return torchvision.models.get_model(depth, replace_stride_with_dilation=dilated)


@pytest.mark.parametrize(
    ("library", "depth", "output_stride"),
    [("torchvision", "resnet18", 32), ("torchvision", "resnet50", 8), ("timm", "resnet34", 16)],
)
def test_resnet_matches_the_published_ones(library, depth, output_stride):
    torch.manual_seed(0)
    theirs = shaken(published_resnet(library, depth, output_stride)).eval()
    ours = ResNet(depth, "7x7", 64, output_stride, multi_grid=())
    x = image(2, 33, 41, 3)
    expected = []
    for stage in (theirs.layer1, theirs.layer3, theirs.layer4):
        stage.register_forward_hook(lambda *a: expected.append(channels_last(a[2])))
    with torch.no_grad():
        theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
    features = jax.jit(lambda v, x: ours.apply(v, x, train=False))(to_jax(theirs, ours), x)
    for found, values in zip(stages(features), expected, strict=True):
        np.testing.assert_allclose(found, values, atol=1e-5 * np.abs(values).max())


def test_deeplab_matches_pytorch():
    sizes = {"width": 8, "decoder_width": 16, "projection_dim": 6, "output_stride": 16}
    theirs = shaken(DeepLabTorch(5, "resnet18", rates=(2, 4, 6), **sizes)).eval()
    ours = models.DeepLabV3Plus(5, "resnet18", aspp_rates=(4, 8, 12), **sizes)  # at stride 8
    shapes = jax.eval_shape(lambda: models.initialize(ours, jax.random.key(0)))
    variables = convert_torch_state_dict(state_arrays(theirs), shapes)
    x = image(2, 33, 49, 3)
    outputs = jax.jit(lambda v, x: ours.apply(v, x, train=False))(variables, x)
    with torch.no_grad():
        logits, projection = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(outputs.logits, channels_last(logits), atol=1e-4)
    np.testing.assert_allclose(outputs.projection, channels_last(projection), atol=1e-4)


def test_one_sgd_step_matches_pytorch():
    theirs = torch_resnet("resnet18", "7x7", 16, 8, ()).train()
    ours = ResNet("resnet18", "7x7", 16, 8, ())
    variables = to_jax(theirs, ours)
    x, target = image(3, 33, 33, 3), image(3, 5, 5, 128)
    rate, momentum, decay = 0.05, 0.9, 1e-2
    config = default_config().optimizer
    config.update(name="sgd", learning_rate=rate, momentum=momentum, weight_decay=decay)
    tx = make_optimizer(config, total_steps=10)

    @jax.jit
    def step(variables):
        def loss(params):
            features, updates = ours.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.mean((features.levels[1] - target) ** 2), updates["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, _ = tx.update(gradients, tx.init(variables["params"]), variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": stats}

    found = jax.device_get(step(variables))
    optimizer = torch.optim.SGD(theirs.parameters(), rate, momentum, weight_decay=decay)
    deep = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))[-1]
    torch.mean((deep - torch.tensor(target.transpose(0, 3, 1, 2))) ** 2).backward()
    optimizer.step()

    expected = to_jax(theirs, ours)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), expected, variables)
    assert min(jax.tree.leaves(moved)) > 1e-4  # every array has changed by more than the tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_weighted_cross_entropy_matches_pytorch():
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(2, 5, 6, 3)).astype(np.float32), (0.2, 1.0, 7.0)
    labels = rng.choice([0, 1, 2, 255], (2, 5, 6))
    theirs = torch.tensor(logits.transpose(0, 3, 1, 2), requires_grad=True)
    loss = torch.nn.CrossEntropyLoss(torch.tensor(weights), ignore_index=255)
    expected = loss(theirs, torch.tensor(labels))
    expected.backward()
    found, gradient = jax.value_and_grad(
        lambda x: losses.cross_entropy(x, labels, class_weights=weights)
    )(logits)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, channels_last(theirs.grad), rtol=1e-4, atol=1e-7)


def test_efficientnet_matches_an_independent_implementation():
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed"
    )
    torch.manual_seed(0)
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network = models.DeepLabV3Plus(2, "efficientnet_lite0", decoder_width=4, projection_dim=4)
    backbone = models.backbones.make_backbone(
        "efficientnet_lite0",
        stem="",
        width=0,
        output_stride=32,
        multi_grid=(),
        dtype=jnp.float32,
    )
    shapes = jax.eval_shape(lambda: models.initialize(network, jax.random.key(0)))
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    converted = convert_torch_state_dict(state, shapes)
    variables = {collection: tree["backbone"] for collection, tree in converted.items()}

    # The size for which the package has worked out its padding.
    x = image(1, 224, 224, 3)
    seen = []
    for block in (2, 10, 15):
        theirs._blocks[block].register_forward_hook(lambda *a: seen.append(channels_last(a[2])))
    with torch.no_grad():
        theirs.extract_features(torch.tensor(x.transpose(0, 3, 1, 2)))
    features = jax.jit(lambda v, x: backbone.apply(v, x, train=False))(variables, x)
    for found, expected in zip(stages(features), seen, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("size", "target"), [((9, 13), (33, 49)), ((7, 5), (3, 11)), ((1, 4), (5, 1))]
)
def test_resize_matches_pytorch(size, target):
    x = image(2, *size, 3)
    expected = functional.interpolate(
        torch.tensor(x.transpose(0, 3, 1, 2)), target, mode="bilinear", align_corners=True
    )
    resized = jax.jit(models.resize_aligned, static_argnums=1)(x, target)
    np.testing.assert_allclose(resized, channels_last(expected), atol=1e-5)
