"""Vision transformers with the DPT head: recorded outputs of PyTorch, and what must hold beside."""

import dataclasses
import functools
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csc_jax import models
from csc_jax.models import DPT, plain, vit
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


# Networks of all sizes


def test_every_published_form_has_its_sizes():
    def encoder(name):
        form = vit.FORMS[name]
        patch = jnp.zeros((1, form.patch, form.patch, 3))
        shapes = jax.eval_shape(lambda: vit.ViT(form).init(jax.random.key(0), patch, False))
        return models.count_parameters(shapes)

    # As torch.hub.load("facebookresearch/dinov2", ...) counts them.
    assert encoder("dinov2_small") == 22_056_576
    assert encoder("dinov2_base") == 86_580_480
    assert encoder("dinov2_large") == 304_368_640
    assert encoder("dinov2_large_reg") - encoder("dinov2_large") == 4 * 1024


@pytest.mark.parametrize("name", ["dinov2_base_reg", "dinov3_small"])
def test_output_shapes(name):
    network = DPT(19, name, projection_dim=32)
    image = jnp.zeros((1, 75, 130, 3))
    out = jax.eval_shape(lambda v, x: network.apply(v, x, train=False), shapes_of(network), image)
    rows, columns = round(75 / network.patch), round(130 / network.patch)
    assert out.logits.shape == (1, 8 * rows, 8 * columns, 19)
    assert out.projection.shape == (1, 8 * rows, 8 * columns, 32)
    assert out.encoded.shape == (1, rows, columns, network.encoded_width)
    assert (network.logits_size(75), network.logits_size(130)) == out.logits.shape[1:3]


TINY = DPT(num_classes=4, backbone="vit_tiny", projection_dim=6)


@pytest.fixture(scope="module")
def variables():
    """Of the tiny network, with LayerScale and biases that do something."""
    drawn = jax.device_get(models.initialize(TINY, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + np.float32(0.05) * rng.standard_normal(x.shape, "f4"), drawn)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((2, 16, 24, 3)).astype(np.float32)


def test_initialize_fills_what_the_network_asks_for(image):
    variables = jax.device_get(models.initialize(TINY, jax.random.key(0)))
    asked = jax.eval_shape(lambda x: TINY.init(jax.random.key(0), x, train=False), image)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(
        lambda a: (a.shape, a.dtype), asked
    )
    assert variables.keys() == {"params"}
    backbone = variables["params"]["backbone"]
    assert backbone["blocks"]["fc1"]["kernel"].std() == pytest.approx(0.02, rel=0.03)
    assert backbone["pos_embed"].std() == pytest.approx(0.02, rel=0.05)
    assert backbone["patch_embed"]["kernel"].std() == pytest.approx((3 * 192) ** -0.5, rel=0.05)
    np.testing.assert_array_equal(backbone["blocks"]["scale1"]["scale"], 1.0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    without = models.initialize(TINY, jax.random.key(0), projection=False)["params"]
    assert variables["params"].keys() - without.keys() == {"projection"}
    for name, tree in without.items():
        # Another program, which may round the last bit otherwise.
        jax.tree.map(close, tree, variables["params"][name])


def test_images_of_any_size_are_resized_to_whole_patches(variables):
    run = jax.jit(lambda x: TINY.apply(variables, x, train=False, projection=False).logits)
    image = np.random.default_rng(1).standard_normal((1, 3, 28, 3)).astype(np.float32)
    whole = (8, 32)  # a side below a patch, and one halfway between two multiples
    assert tuple(TINY.logits_size(n) for n in image.shape[1:3]) == whole
    expected = run(models.resize_aligned(image, whole))
    assert expected.shape == (1, *whole, 4)
    np.testing.assert_allclose(run(image), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "remat", "looped"),
    [("cpu", False, True), ("gpu", False, False), ("tpu", False, False), ("tpu", True, True)],
)
def test_blocks_are_a_loop_where_that_is_no_slower(
    variables, image, monkeypatch, platform, remat, looped
):
    monkeypatch.setattr("csc_jax.contrast.devices.platform", lambda: platform)
    network = TINY.clone(remat=remat)
    traced = jax.make_jaxpr(lambda x: network.apply(variables, x, train=True).logits)(image)
    unrolls = [eqn.params["unroll"] for eqn in traced.eqns if eqn.primitive.name == "scan"]
    assert unrolls == [1 if looped else 4]


@pytest.mark.parametrize("stride", [2, 8])
def test_a_stride_of_the_projection_skips_pixels_of_it_and_of_nothing_else(
    variables, image, stride
):
    every = TINY.apply(variables, image, train=False)
    some = TINY.clone(projection_stride=stride).apply(variables, image, train=False)
    np.testing.assert_array_equal(some.logits, every.logits)
    assert some.projection.shape == (2, 16 // stride, 24 // stride, 6)
    np.testing.assert_allclose(some.projection, every.projection[:, ::stride, ::stride], atol=1e-6)


def test_bfloat16_computes_with_float32_parameters_and_outputs(variables, image):
    network = TINY.clone(dtype=jnp.bfloat16)

    def both(params):
        def loss(params):
            out = network.apply({"params": params}, image, train=False)
            return jnp.mean(out.logits**2), out

        return jax.grad(loss, has_aux=True)(params)

    gradients, out = jax.jit(both)(variables["params"])
    assert (out.logits.dtype, out.encoded.dtype) == (jnp.float32, jnp.float32)
    assert out.projection.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    exact = jax.jit(lambda v: TINY.apply(v, image, train=False).logits)(variables)
    error = np.abs(out.logits - exact).max() / np.abs(exact).max()
    assert 1e-6 < error < 0.05


def test_blocks_computed_twice_give_the_same_gradient(variables, image):
    def gradient(network):
        def loss(params):
            return jnp.mean(network.apply({"params": params}, image, train=False).logits ** 2)

        return jax.jit(jax.grad(loss))(variables["params"])

    plain, twice = gradient(TINY), gradient(TINY.clone(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), plain, twice)
    assert np.abs(plain["backbone"]["blocks"]["qkv"]["kernel"]).max() > 1e-5


def test_drop_path_skips_whole_images_and_keeps_the_mean():
    form = dataclasses.replace(vit.FORMS["vit_tiny"], depth=1, levels=(1,))
    block = vit.Block(form, jnp.float32, dropping=True)
    x = jax.random.normal(jax.random.key(0), (400, 5, form.width))
    rate = jnp.float32(0.25)
    keys = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    (out, _), params = block.init_with_output(keys, x, rate, None)
    params["params"]["scale2"]["scale"] = jnp.zeros(form.width)  # attention alone
    (out, _) = block.apply(params, x, rate, None, rngs={"dropout": jax.random.key(3)})
    whole, _ = block.clone(dropping=False).apply(params, x, rate, None)
    factor = np.sum((out - x) * (whole - x), axis=(1, 2)) / np.sum((whole - x) ** 2, axis=(1, 2))
    np.testing.assert_allclose(np.unique(factor.round(3)), [0, 1.333], atol=1e-3)
    assert 0.17 < np.mean(factor < 0.5) < 0.33


def test_random_choices_are_off_where_labels_are_made(variables, image):
    network = TINY.clone(dropout=0.5, drop_path=0.9)

    def run(network, key):
        return network.apply(variables, image, train=True, rngs={"dropout": key}).logits

    first, second = (run(network, jax.random.key(i)) for i in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    still = run(network.without_dropout(), jax.random.key(0))
    np.testing.assert_array_equal(still, run(TINY, jax.random.key(1)))
    np.testing.assert_allclose(still, TINY.apply(variables, image, train=False).logits, atol=1e-6)
    # Each alone.
    for only in (TINY.clone(dropout=0.5), TINY.clone(drop_path=0.9)):
        assert np.abs(run(only, jax.random.key(0)) - still).max() > 1e-3


# Positions


def test_rotation_tells_how_far_patches_are_apart_and_nothing_else():
    form = dataclasses.replace(vit.FORMS["dinov3_small"], width=128, heads=2, registers=1)
    size = (4, 5)
    cosine, sine = vit.rotations(form, size)
    query, key = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)

    def turned(vector):
        same = jnp.broadcast_to(jnp.asarray(vector), (1, len(cosine), 1, 64))
        return np.asarray(vit.rotate(same, cosine, sine))[0, :, 0]

    queries, keys = turned(query), turned(key)
    np.testing.assert_array_equal(queries[:2], [query, query])  # class and register token
    products = (queries[2:] @ keys[2:].T).reshape(*size, *size)
    by_distance = {}
    for (r1, c1, r2, c2), value in np.ndenumerate(products):
        by_distance.setdefault((r2 - r1, c2 - c1), []).append(value)
    assert len(by_distance) == 7 * 9
    for values in by_distance.values():
        np.testing.assert_allclose(values, values[0], atol=1e-4)
    means = [np.mean(values) for values in by_distance.values()]
    assert np.std(means) > 0.5


def test_positions_at_their_own_size_are_not_touched():
    grid = jax.random.normal(jax.random.key(0), (5, 5, 3))
    for options in ((0.1, False), (0.0, True)):
        assert vit.resize_positions(grid, (5, 5), *options) is grid
        flat = vit.resize_positions(jnp.ones((5, 5, 1)), (7, 2), *options)
        np.testing.assert_allclose(flat, 1.0, atol=1e-6)


def test_fused_attention_is_for_half_precision_and_never_exported(monkeypatch):
    monkeypatch.setattr(vit.devices, "platform", lambda: "gpu")
    monkeypatch.setattr(vit.devices, "has_tf32", lambda: True)
    asked = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *_, implementation: asked.append(implementation)
    )
    half, single = (jnp.zeros((1, 3, 2, 8), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    vit.attend(half, half, half)
    vit.attend(single, single, single)
    with plain.convolutions():
        vit.attend(half, half, half)
    assert asked == ["cudnn", "xla", "xla"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_attention_on_a_cpu_is_that_of_jax(dtype, tolerance):
    keys = jax.random.split(jax.random.key(0), 4)
    *given, weight = (3 * jax.random.normal(key, (2, 7, 3, 8)) for key in keys)

    def values_of(function, dtype):
        def loss(given):
            y = function(*(x.astype(dtype) for x in given))
            assert y.dtype == dtype
            return jnp.sum(y.astype(jnp.float32) * weight), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
        return [y, *gradients]

    expected = values_of(jax.nn.dot_product_attention, jnp.float32)
    found = values_of(vit.attend, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=tolerance * scale)
