"""Vision transformers with the DPT head: recorded outputs of PyTorch, and what must hold beside."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csc_jax import models
from csc_jax.models import DPT
from csc_jax.models.weights import convert_torch_state_dict, to_torch_state_dict

GOLDEN = Path(__file__).parent / "golden" / "network"


def vit_tensor(name, shape):
    """The recipe of the golden numbers."""
    r = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    if name.endswith(("pos_embed", "cls_token", "mask_token", "register_tokens", ".bias")):
        return (0.1 * r.standard_normal(shape)).astype("f4")
    if len(shape) == 4:
        return (np.sqrt(2 / np.prod(shape[1:])) * r.standard_normal(shape)).astype("f4")
    if len(shape) == 2:
        return (np.sqrt(1 / shape[1]) * r.standard_normal(shape)).astype("f4")
    return (1 + 0.1 * r.standard_normal(shape)).astype("f4")


@pytest.fixture(scope="module")
def golden_state():
    shapes = json.loads((GOLDEN / "dpt_dinov2_small_state_dict.json").read_text())
    return {name: vit_tensor(name, shape) for name, shape in shapes.items()}


def shapes_of(network, *, projection=True):
    return jax.eval_shape(
        lambda: models.initialize(network, jax.random.key(0), projection=projection)
    )


# The recorded network (golden/network)


@pytest.fixture(scope="module")
def recorded(golden_state):
    """Arrays of the recording, and ours in their place: features, outputs, gradients."""
    network = DPT(num_classes=21, backbone="dinov2_small")
    variables = convert_torch_state_dict(golden_state, shapes_of(network, projection=False))
    with np.load(GOLDEN / "dpt_dinov2_small.npz") as file:
        golden = dict(file)

    @jax.jit
    def run(params, image, mask, cotangent):
        seen = []

        def masked(features):  # each image twice: as it is, and with fewer channels
            seen.extend(features.levels)
            factors = jnp.concatenate([jnp.ones_like(mask), mask])[:, None, None]
            twice = (jnp.concatenate([x, x]) * factors for x in features.levels)
            return features._replace(levels=tuple(twice))

        def loss(params):
            out = network.apply(
                {"params": params}, image, train=False, projection=False, perturb=masked
            )
            output = models.resize_aligned(out.logits[:1], image.shape[1:3])
            return jnp.sum(output * cotangent), (out, output, list(seen))

        return jax.value_and_grad(loss, has_aux=True)(params)

    given = (golden[name] for name in ("image", "channel_mask", "cotangent"))
    with jax.default_matmul_precision("highest"):
        (value, (out, output, levels)), gradients = jax.device_get(run(variables["params"], *given))
    return golden, value, out, output, levels, gradients


def test_network_matches_the_recorded_pytorch_outputs(recorded):
    golden, value, out, output, levels, _ = recorded
    for i, level in enumerate(levels):
        expected = golden[f"features_{i}"].reshape(level.shape)
        np.testing.assert_allclose(level, expected, atol=1e-3, err_msg=f"level {i}")
    np.testing.assert_allclose(out.logits[:1], golden["logits"], atol=1e-3)
    np.testing.assert_allclose(out.logits[1:], golden["logits_masked"], atol=1e-3)
    np.testing.assert_allclose(output, golden["output"], atol=1e-3)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-3)


def test_gradients_match_the_recorded_ones(recorded, golden_state):
    golden, *_, gradients = recorded
    found = to_torch_state_dict({"params": gradients})
    assert found.keys() == golden_state.keys()
    norms = {n.removeprefix("grad_norm/"): v for n, v in golden.items() if "grad_norm" in n}
    for name, gradient in found.items():
        expected = norms.get(name, 0.0)  # of mask token and unit without effect, none is recorded
        np.testing.assert_allclose(np.linalg.norm(gradient), expected, rtol=1e-3, err_msg=name)
    patches = golden["grad_patch_embed"]
    scale = np.abs(patches).max()
    np.testing.assert_allclose(
        found["backbone.patch_embed.proj.weight"], patches, atol=1e-3 * scale
    )
    # A shift of all channels is lost in LayerNorm, so these sums are rounding errors, some 0. But
    # they tell which of the learnt positions take part: the pixels of the bicubic kernel.
    recorded_part = golden["grad_pos_embed_sum"] != 0
    taking_part = found["backbone.pos_embed"].any(axis=-1)
    assert taking_part[recorded_part].all()
    assert recorded_part.sum() <= taking_part.sum() < 1.2 * recorded_part.sum()


def test_whole_checkpoint_goes_in_and_out_bit_identical(golden_state):
    shapes = shapes_of(DPT(num_classes=21, backbone="dinov2_small"), projection=False)
    out = to_torch_state_dict(convert_torch_state_dict(golden_state, shapes))
    assert out.keys() == golden_state.keys()
    for name, value in golden_state.items():
        np.testing.assert_array_equal(out[name], value, err_msg=name)
        assert out[name].flags.c_contiguous  # safetensors writes memory as it lies
