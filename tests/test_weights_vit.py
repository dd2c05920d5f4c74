"""Published names of transformers: in, out, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from csc_jax import models
from csc_jax.errors import UserError
from csc_jax.models import DPT, DeepLabV3Plus, vit
from csc_jax.models.weight_files import read_weights
from csc_jax.models.weights import (
    STUDENT,
    TEACHER,
    convert_torch_state_dict,
    drop_absent_heads,
    load_pretrained,
    to_torch_state_dict,
)

NETWORK = DPT(num_classes=3, backbone="vit_tiny", projection_dim=4)


def shapes_of(network, *, projection=True):
    return jax.eval_shape(
        lambda: models.initialize(network, jax.random.key(0), projection=projection)
    )


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


def assert_trees_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def shapes():
    return shapes_of(NETWORK)


@pytest.fixture(scope="module")
def variables(shapes):
    return random_like(shapes)


@pytest.fixture
def form(monkeypatch):
    """Adds a form of an encoder, by a name of its own as programs are kept by it."""

    def add(**changes):
        name = f"other {changes}"
        changed = dataclasses.replace(vit.FORMS["vit_tiny"], **changes)
        monkeypatch.setitem(vit.FORMS, name, changed)
        return shapes_of(DPT(num_classes=3, backbone=name, projection_dim=4))

    return add


def test_whole_network_goes_out_and_in(shapes, variables):
    state = to_torch_state_dict(variables)
    assert state["backbone.blocks.3.attn.qkv.weight"].shape == (192, 64)
    assert state["head.resize_layers.0.weight"].shape == (8, 8, 4, 4)
    assert state["head.projection.2.weight"].shape == (4, 16, 1, 1)
    assert_trees_equal(convert_torch_state_dict(state, shapes), variables)
    # A method without the head does not ask for it, published files do not hold it.
    without = shapes_of(NETWORK, projection=False)
    taken = convert_torch_state_dict(drop_absent_heads(state, without), without)
    assert_trees_equal(taken["params"]["fuse1"], variables["params"]["fuse1"])
    published = {name: v for name, v in state.items() if "head.projection" not in name}
    other = random_like(shapes, seed=1)
    converted = convert_torch_state_dict(published, other)["params"]
    assert_trees_equal(converted["projection"], other["params"]["projection"])
    assert_trees_equal(converted["backbone"], variables["params"]["backbone"])


@pytest.mark.parity
def test_student_and_teacher_of_unimatch_v2_are_told_apart(tmp_path, shapes, variables):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    other = random_like(shapes, seed=1)
    tensors = {
        key: {f"module.{n}": torch.tensor(v) for n, v in to_torch_state_dict(tree).items()}
        for key, tree in (("model", other), ("model_ema", variables))
    }
    torch.save(tensors | {"epoch": 3, "optimizer": {"state": {}}}, tmp_path / "best.pth")
    for keys, expected in ((TEACHER, variables), (STUDENT, other)):
        state = read_weights(tmp_path / "best.pth", keys)
        assert_trees_equal(convert_torch_state_dict(state, shapes), expected)


def test_wrapped_state_dicts_are_unwrapped(shapes, variables):
    state = to_torch_state_dict(variables)
    prefixed = {f"module.{name}": value for name, value in state.items()}
    for given in (prefixed, {"model": {}, "model_ema": prefixed}, {"model": prefixed}):
        assert_trees_equal(convert_torch_state_dict(given, shapes), variables)


@pytest.mark.parametrize("naming", ["meta", "transformers", "timm"])
@pytest.mark.parametrize("kind", ["plain", "registers", "rotary"])
def test_every_naming_of_an_encoder_goes_out_and_in(naming, kind, form, tmp_path):
    changes = {"plain": {}, "registers": {"registers": 2}, "rotary": {"registers": 2, "grid": 0}}
    shapes = form(**changes[kind])
    variables = random_like(shapes)
    backbone = variables["params"]["backbone"]
    if kind == "rotary":
        backbone["blocks"]["qkv"]["bias"][:, 64:128] = 0  # transformers has no such bias
        if naming == "timm":
            with pytest.raises(UserError, match="timm has no DINOv3"):
                to_torch_state_dict(variables, naming)
            return
    if naming == "timm":
        backbone["mask_token"][:] = 0  # nor has timm that, nor with registers a class position
        if kind == "registers":
            backbone["pos_embed"][:1] = 0
    state = to_torch_state_dict(variables, naming)
    save_file(state, tmp_path / "encoder.safetensors")
    taken = load_pretrained(str(tmp_path / "encoder.safetensors"), shapes)["params"]
    assert taken.keys() == {"backbone"}
    taken = taken["backbone"]
    if naming == "timm":
        assert "mask_token" not in taken
        taken["mask_token"] = backbone["mask_token"]
    assert_trees_equal(taken, backbone)


def test_published_names_are_known():
    """Names from published files, which this project did not write down."""
    shapes = shapes_of(NETWORK)
    encoder = random_like(shapes)
    hub = to_torch_state_dict(encoder, "transformers")
    assert "embeddings.patch_embeddings.projection.weight" in hub
    assert hub["encoder.layer.3.attention.attention.query.weight"].shape == (64, 64)
    assert "encoder.layer.0.attention.output.dense.bias" in hub
    assert "encoder.layer.0.layer_scale1.lambda1" in hub
    assert "layernorm.weight" in hub
    # As transformers 5 names them, and inside of another network of it.
    renamed = {
        "dinov2." + name.replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj")
        .replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.o_proj"): value
        for name, value in hub.items()
    }  # fmt: skip
    renamed |= {"classifier.weight": np.ones((3, 64)), "classifier.bias": np.ones(3)}
    for state in (hub, renamed, to_torch_state_dict(encoder, "meta")):
        converted = convert_torch_state_dict(state, shapes)["params"]["backbone"]
        assert_trees_equal(converted, encoder["params"]["backbone"])


# What does not fit


def test_positions_of_another_grid_are_resized(shapes, form, variables):
    larger = random_like(form(grid=11))
    state = to_torch_state_dict(larger)
    converted = convert_torch_state_dict(state, variables)["params"]["backbone"]
    theirs = larger["params"]["backbone"]["pos_embed"]
    expected = vit.resize_positions(jnp.asarray(theirs[1:].reshape(11, 11, 64)), (8, 8), 0, False)
    np.testing.assert_allclose(converted["pos_embed"][1:], expected.reshape(64, 64), atol=1e-6)
    np.testing.assert_array_equal(converted["pos_embed"][0], theirs[0])
    assert_trees_equal(converted["blocks"], larger["params"]["backbone"]["blocks"])


def test_everything_that_does_not_fit_is_in_one_error(shapes, variables, caplog):
    state = to_torch_state_dict(variables)
    del state["backbone.blocks.2.norm1.weight"], state["head.scratch.layer2_rn.weight"]
    state["head.scratch.output_conv.2.weight"] = np.zeros((7, 16, 1, 1), np.float32)
    state["backbone.blocks.9.norm1.weight"] = np.zeros(64, np.float32)
    state["head.extra"] = np.zeros(3, np.float32)
    state["elsewhere.weight"] = np.zeros(3, np.float32)
    state["backbone.pos_embed"] = np.zeros((1, 70, 64), np.float32)  # no square
    problems = (
        "backbone.blocks.2.norm1.weight (64,) is not in the weights",
        "head.scratch.layer2_rn.weight (16, 16, 3, 3) is not in the weights",
        "head.scratch.output_conv.2.weight is (7, 16, 1, 1), the network has (3, 16, 1, 1)",
        "backbone.blocks.9.norm1.weight (64,) has no place in the network",
        "head.extra (3,) has no place in the network",
        "elsewhere.weight (3,) has no place in the network",
        "backbone.pos_embed is (1, 70, 64), the network has (1, 65, 64)",
    )
    with pytest.raises(UserError) as error:
        convert_torch_state_dict(state, shapes)
    assert all(problem in str(error.value) for problem in problems)
    assert str(error.value).count("\n") == len(problems)
    other = random_like(shapes, seed=1)
    converted = convert_torch_state_dict(state, other, strict=False)["params"]
    assert all(problem in caplog.text for problem in problems)
    kept = converted["backbone"]["blocks"]["norm1"]["scale"]
    np.testing.assert_array_equal(kept, other["params"]["backbone"]["blocks"]["norm1"]["scale"])
    np.testing.assert_array_equal(
        converted["backbone"]["blocks"]["fc1"]["kernel"],
        variables["params"]["backbone"]["blocks"]["fc1"]["kernel"],
    )


def test_a_bias_that_only_dinov3_lacks_is_missed(shapes, variables):
    state = to_torch_state_dict(variables, "transformers")
    del state["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(UserError, match=r"1\.attn\.qkv\.bias \(192,\) is not in the weights"):
        convert_torch_state_dict(state, shapes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patch": 6}, r"\(a transformer of 4 blocks and 64 channels, patches of 6 px\)"),
        ({"depth": 5, "levels": (1, 2, 3, 5)}, r"of 5 blocks and 64 channels, patches of 8 px"),
        ({"registers": 3, "patch": 4}, r"backbone=other "),
    ],
)
def test_another_transformer_is_refused_with_the_reason(changes, reason, form, shapes):
    theirs = form(**changes)
    if not reason.startswith("backbone"):
        del vit.FORMS[f"other {changes}"]  # of no known name
    state = to_torch_state_dict(random_like(theirs))
    with pytest.raises(UserError, match=reason + r".*the network has backbone vit_tiny:") as error:
        convert_torch_state_dict(state, shapes)
    if "patch" in changes:
        assert "backbone.patch_embed.proj.weight is" in str(error.value)


def test_weights_of_the_other_family_are_refused(shapes, variables):
    resnet = DeepLabV3Plus(3, "resnet18", "7x7", width=4, decoder_width=4, projection_dim=4)
    other = random_like(shapes_of(resnet))
    with pytest.raises(UserError, match=r"a vision transformer's, and the network is a DeepLab"):
        convert_torch_state_dict(to_torch_state_dict(variables), other)
    with pytest.raises(UserError, match=r"backbone=resnet18 .*the network has backbone vit_tiny"):
        convert_torch_state_dict(to_torch_state_dict(other), shapes)


def test_names_that_there_are_not_are_refused(variables):
    with pytest.raises(UserError, match=r"names is 'keras'; it takes one of unimatch_v2, meta"):
        to_torch_state_dict(variables, "keras")
    with pytest.raises(UserError, match=r"names is 'timm', but a DeepLabv3\+ has those of U2PL"):
        to_torch_state_dict({"params": {"backbone": {}}}, "timm")
