from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import BACKBONE

from csc_jax import models
from csc_jax.config import default_config
from csc_jax.errors import UserError
from csc_jax.models import DeepLabV3Plus, initialize
from csc_jax.models.layers import Conv, ConvNorm
from csc_jax.models.resnet import ResNet


@pytest.fixture(scope="module")
def tiny():
    """The smallest network with every head, on a backbone of one block a stage."""
    return models.DeepLabV3Plus(
        num_classes=5,
        backbone=BACKBONE,
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
    assert out.projection.dtype == jnp.bfloat16
    rest = asked, out._replace(projection=None), updates
    assert {x.dtype.name for x in jax.tree.leaves(rest)} == {"float32"}
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
    # All but the biases before batch normalisation, which takes them out.
    without = {path for path, largest in found.items() if largest == 0}
    assert without == {p for p in found if p.endswith("conv/bias")}


@pytest.mark.parametrize("output_stride", [8, 32])
def test_efficientnet_in_the_whole_network(output_stride):
    network = models.DeepLabV3Plus(
        19, "efficientnet_lite0", output_stride=output_stride, projection_dim=32, aux_head=True
    )
    variables = jax.eval_shape(lambda: models.initialize(network, jax.random.key(0)))
    out = jax.eval_shape(
        lambda v, x: network.apply(v, x, train=False), variables, jnp.zeros((2, 97, 129, 3))
    )
    assert out.logits.shape == (2, 25, 33, 19)
    assert out.projection.shape == (2, 25, 33, 32)
    assert out.aux.shape == ((2, 13, 17, 19) if output_stride == 8 else (2, 7, 9, 19))


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


def test_build_takes_an_efficientnet_with_the_fields_of_a_resnet():
    config = default_config().model
    config.update(backbone="efficientnet_lite0", stem="7x7", multi_grid=(2,), width=8)
    network = models.build(config, num_classes=7, aux_head=False)
    variables = jax.eval_shape(lambda: models.initialize(network, jax.random.key(0)))
    stem = variables["params"]["backbone"]["stem"]["kernel"]
    assert stem.shape == (3, 3, 3, 32)


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


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_remat_changes_no_name_and_no_shape(backbone):
    def shapes(remat):
        network = DeepLabV3Plus(3, backbone, width=4, decoder_width=8, remat=remat)
        return jax.eval_shape(lambda: initialize(network, jax.random.key(0)))

    assert shapes(True) == shapes(False)


def test_remat_has_the_same_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 33, 33, 3))
    block = {"depth": "resnet18", "width": 4, "output_stride": 16, "multi_grid": ()}
    variables = ResNet(**block).init(jax.random.key(1), x, train=False)

    def gradient(remat):
        def loss(params):
            features, updates = ResNet(**block, remat=remat).apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(features.levels[1] ** 2), updates

        # Operation by operation: compiled as one, the two are fused, and so rounded, differently.
        return jax.grad(loss, has_aux=True)(variables["params"])

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)

    jax.tree.map(close, gradient(True), gradient(False))


def test_a_projection_head_computed_twice_has_the_same_gradient(tiny, variables, image):
    once, twice = (tiny.clone(remat_projection=r, dropout=0.0) for r in (False, True))

    def loss(network, params):
        out, updates = network.apply(
            {**variables, "params": params},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return jnp.mean(out.projection**2) + jnp.mean(out.logits**2), updates

    def gradient(network):
        return jax.jit(jax.grad(partial(loss, network), has_aux=True))

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)

    params = variables["params"]
    jax.tree.map(close, gradient(once)(params), gradient(twice)(params))
    convolutions = [
        gradient(network).lower(params).as_text().count("stablehlo.convolution")
        for network in (once, twice)
    ]
    assert convolutions[1] > convolutions[0]
    assert tiny.remat_projection is None  # on a CPU as `once`
    assert gradient(tiny.clone(dropout=0.0)).lower(params).as_text() == (
        gradient(once).lower(params).as_text()
    )


def test_a_bias_has_no_gradient_where_normalisation_takes_it_out(tiny, variables, image):
    def loss(params, train):
        out = tiny.clone(dropout=0.0).apply(
            {**variables, "params": params},
            image,
            train=train,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )[0]
        return jnp.mean(out.logits**2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    for train in (True, False):
        gradient = grad(variables["params"], train)["classifier"]
        assert jnp.any(gradient["conv1"]["conv"]["bias"]) == (not train)
        assert jnp.any(gradient["out"]["bias"])


@pytest.mark.parametrize(
    ("backbone", "stem"), [("resnet18", "deep"), ("resnet18", "7x7"), ("efficientnet_lite0", "")]
)
def test_size_of_the_logits(backbone, stem):
    network = models.DeepLabV3Plus(3, backbone=backbone, stem=stem, width=4, decoder_width=4)
    for height, width in ((64, 65), (66, 67), (97, 100)):
        image = jnp.zeros((1, height, width, 3))
        outputs, _ = jax.eval_shape(
            lambda image: network.init_with_output(jax.random.key(0), image, train=False), image
        )
        sizes = tuple(network.logits_size(np.array([height, width])))
        assert outputs.logits.shape[1:3] == sizes == outputs.projection.shape[1:3]
