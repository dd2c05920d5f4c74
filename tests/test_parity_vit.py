"""Our transformers against those of the packages transformers and timm, with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from benchmarks import torch_transformer  # noqa: E402
from parity_torchvision import load_torchvision  # noqa: E402
from torch.nn import functional  # noqa: E402

from csc_jax import models  # noqa: E402
from csc_jax.models import vit  # noqa: E402
from csc_jax.models.transformer_weights import NAMINGS  # noqa: E402
from csc_jax.models.vit import FORMS, ViT  # noqa: E402
from csc_jax.models.weights import convert_torch_state_dict, to_torch_state_dict  # noqa: E402

pytestmark = pytest.mark.parity

# What is left of a published form where its full size would only cost time.
SHALLOW = {"depth": 3, "levels": (1, 2, 3), "grid": 5}
# transformers resizes its learnt positions to a size, DINOv2's code by factors a little larger.
SIZE = {"offset": 0.0}


def library(name):
    load_torchvision()  # both import it
    return pytest.importorskip(name, reason=f"{name} is not installed")


def shaken(network):
    """No parameter at 0 or 1, where a confusion would not show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            spread = 0.5 / value.shape[-1] ** 0.5 if value.ndim == 2 else 0.1
            value.normal_(1.0 if "norm" in name and "weight" in name else 0.0, spread)
    return network.eval()


def arrays(network):
    return {name: value.numpy() for name, value in network.state_dict().items()}


def image(height, width):
    return np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)


def to_torch(x):
    return torch.tensor(x.transpose(0, 3, 1, 2))


def compare(form, state, x, expected):
    """Runs our encoder with the weights of `state` and compares every level."""
    network = ViT(form)
    shapes = jax.eval_shape(
        lambda: network.init(
            jax.random.key(0), jnp.zeros((1, 2 * form.patch, form.patch, 3)), False
        )
    )
    variables = convert_torch_state_dict(state, {"params": {"backbone": shapes["params"]}})
    params = {"params": variables["params"]["backbone"]}
    if not any("mask_token" in key for key in state):  # timm; of no effect
        params["params"]["mask_token"] = np.zeros((1, form.width), np.float32)
    with jax.default_matmul_precision("highest"):
        features = jax.jit(lambda v, x: network.apply(v, x, False))(params, x)
    assert len(features.levels) == len(expected)
    for found, theirs in zip(features.levels, expected, strict=True):
        theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found, theirs, atol=1e-4 * np.abs(theirs).max())
    return {"params": {"backbone": params["params"]}}


def of_transformers(form, **options):
    """The backbone of the package with the sizes of a form."""
    transformers = library("transformers")
    sizes = {
        "hidden_size": form.width,
        "num_hidden_layers": form.depth,
        "num_attention_heads": form.heads,
        "patch_size": form.patch,
        "image_size": form.patch * max(form.grid, 1),
        "out_indices": list(form.levels),
        **options,
    }
    if not form.grid:
        kind = "DINOv3ViT"
        sizes |= {"num_register_tokens": 4, "intermediate_size": 4 * form.width}
    else:
        kind = "Dinov2WithRegisters" if form.registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return shaken(getattr(transformers, f"{kind}Backbone")(config)), kind


@pytest.mark.parametrize(
    ("name", "less", "patches"),
    [
        ("dinov2_small", {}, (3, 5)),  # the whole of it
        ("dinov2_small", SHALLOW, (7, 2)),
        ("dinov2_base", SHALLOW, (3, 8)),
        ("dinov2_small_reg", SHALLOW, (7, 3)),
        ("dinov2_base_reg", SHALLOW, (2, 9)),
        ("dinov3_small", {}, (3, 5)),
        ("dinov3_small", SHALLOW | {"grid": 0}, (7, 2)),
        ("dinov3_base", SHALLOW | {"grid": 0}, (1, 9)),
    ],
)
def test_encoder_matches_transformers(name, less, patches):
    form = dataclasses.replace(FORMS[name], **(less | SIZE))
    theirs, _ = of_transformers(form)
    x = image(*(n * form.patch for n in patches))
    with torch.no_grad():
        expected = theirs(to_torch(x)).feature_maps
    compare(form, arrays(theirs), x, expected)


@pytest.mark.parametrize(
    ("name", "model", "patches"),
    [
        ("dinov2_small", "vit_small_patch14_dinov2", (7, 3)),
        ("dinov2_base", "vit_base_patch14_dinov2", (2, 9)),
        ("dinov2_small_reg", "vit_small_patch14_reg4_dinov2", (7, 3)),
        ("dinov2_base_reg", "vit_base_patch14_reg4_dinov2", (3, 6)),
    ],
)
def test_encoder_matches_timm(name, model, patches):
    timm = library("timm")
    less = {"antialias": True} | SHALLOW | SIZE  # as timm resizes every grid
    form = dataclasses.replace(FORMS[name], **less)
    theirs = timm.create_model(
        model, depth=form.depth, img_size=form.grid * form.patch, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    theirs = shaken(theirs)
    x = image(*(n * form.patch for n in patches))
    levels = [i - 1 for i in form.levels]
    with torch.no_grad():
        expected = theirs.get_intermediate_layers(to_torch(x), n=levels, norm=True, reshape=True)
    variables = compare(form, arrays(theirs), x, expected)
    out = to_torch_state_dict(variables, "timm")
    assert out.keys() == arrays(theirs).keys()
    for key, value in arrays(theirs).items():
        np.testing.assert_array_equal(out[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["dinov2_small", "dinov2_small_reg", "dinov3_small"])
def test_transformers_loads_what_is_written_for_it(name, tmp_path):
    form = dataclasses.replace(
        FORMS[name], **(SHALLOW | SIZE | {"grid": 5 if FORMS[name].grid else 0})
    )
    theirs, kind = of_transformers(form)
    state = arrays(theirs)
    x = image(3 * form.patch, 4 * form.patch)
    with torch.no_grad():
        expected = theirs(to_torch(x)).feature_maps
    variables = compare(form, state, x, expected)
    save_file(
        to_torch_state_dict(variables, "transformers"),
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    theirs.config.save_pretrained(tmp_path)
    backbone = getattr(library("transformers"), f"{kind}Backbone").from_pretrained(tmp_path)
    for key, value in arrays(backbone).items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)
    # In any other naming, in and out again.
    for naming in NAMINGS[1:3]:
        again = convert_torch_state_dict(to_torch_state_dict(variables, naming), variables)
        jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parametrize("size", [(36, 38), (1, 50), (80, 9), (5, 7), (37, 36)])
@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_resized_as_in_the_published_code(size, antialias):
    grid = np.random.default_rng(0).standard_normal((37, 37, 4)).astype(np.float32)
    offset = 0.0 if antialias else 0.1
    where = (
        {"size": size}
        if antialias
        else {"scale_factor": tuple(float(n + offset) / 37 for n in size)}
    )
    expected = functional.interpolate(
        torch.tensor(grid.transpose(2, 0, 1))[None], mode="bicubic", antialias=antialias, **where
    )
    found = vit.resize_positions(jnp.asarray(grid), size, offset, antialias)
    np.testing.assert_allclose(found, expected[0].numpy().transpose(1, 2, 0), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "patches"), [("vit_tiny", (8, 8)), ("vit_tiny", (3, 5)), ("dinov2_small_reg", (2, 3))]
)
def test_network_of_the_benchmark_matches_ours(name, patches):
    theirs = shaken(torch_transformer.DPT(5, name, projection_dim=6))
    ours = models.DPT(5, name, projection_dim=6)
    shapes = jax.eval_shape(lambda: models.initialize(ours, jax.random.key(0)))
    variables = convert_torch_state_dict(arrays(theirs), shapes)
    x = image(*(n * FORMS[name].patch for n in patches))
    sides = (8 * n for n in patches)
    weight = np.random.default_rng(1).standard_normal((2, *sides, 5 + 6)).astype(np.float32)

    def loss(params):
        outputs = ours.apply({"params": params}, x, train=False)
        return jnp.sum(jnp.concatenate([outputs.logits, outputs.projection], -1) * weight), outputs

    with jax.default_matmul_precision("highest"):
        grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, outputs), gradients = grad(variables["params"])
    logits, projection = theirs(to_torch(x))
    (torch.cat([logits, projection], 1) * to_torch(weight)).sum().backward()
    for found, expected in ((outputs.logits, logits), (outputs.projection, projection)):
        expected = expected.detach().numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    learnt = dict(theirs.named_parameters())
    for key, found in to_torch_state_dict({"params": gradients}).items():
        expected = learnt[key].grad
        if expected is None:  # of the mask token and of the deepest level's first unit
            assert not found.any(), key
        elif not key.endswith(("pos_embed", "attn.qkv.bias")):  # rounding errors in part
            scale = np.abs(expected.numpy()).max()
            np.testing.assert_allclose(found, expected, atol=1e-3 * scale, err_msg=key)
