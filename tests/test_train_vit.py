"""Methods, training and evaluation on a transformer, as on the convolutional networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Harness, tiny_config

from csc_jax import methods, models
from csc_jax.errors import UserError
from csc_jax.evaluation import make_predictor
from csc_jax.methods import csc, u2pl, unimatch_v2
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.experiment import build
from csc_jax.training.step import abstract_state

METHODS = methods.available()
DECODERS = ("con_msk", "dropout", "f_drop", "f_noise", "g_cutout", "i_vat", "obj_msk")


def vit_config(**overrides):
    fields = {"model__backbone": "vit_tiny", "batch__labeled": 2, "batch__unlabeled": 2}
    if overrides.get("method__name") == "cct":
        fields |= {f"method__cct__{name}": 1 for name in DECODERS}
    if overrides.get("method__name") == "gct":
        fields |= {"data__crop_size": (64, 64), "method__gct__detector_width": 4}
    return tiny_config(**(fields | overrides))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_step_on_a_transformer(method):
    """The whole step is traced; another test runs csc's."""
    built = Harness(vit_config(method__name=method))
    step = built.step.func.eval_shape
    before = jax.eval_shape(built.init)
    state, metrics = step(*built.step.args, before, built.batch(0))
    shapes = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (before, state))
    assert next(shapes) == next(shapes)
    assert state.student.batch_stats == {}
    assert "loss_s" in metrics


@pytest.mark.parametrize(
    "fields",
    [
        {"method__name": "csc", "contrast__bank_source": "teacher"},
        {"method__name": "u2pl"},
    ],
    ids=lambda fields: "-".join(fields.values()),
)
def test_a_coarser_projection_leaves_each_feature_its_pixel(fields, monkeypatch):
    """What the contrastive losses see is that of a whole projection, each second pixel of it."""
    seen = []

    def look(method, *arguments):
        seen.append([x for x in arguments if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)])
        raise StopIteration

    monkeypatch.setattr(
        csc.CSC, "_sample", lambda self, key, pixels: look(self, *vars(pixels).values())
    )
    monkeypatch.setattr(u2pl.U2PL, "_candidates", look)
    for stride in (1, 2):
        built = Harness(vit_config(model__projection_stride=stride, **fields))
        state, batch = built.init(), built.batch(0)
        with pytest.raises(StopIteration):
            built.method.loss(state.trained, state, batch, jax.random.key(0))
    for whole, coarse in zip(*seen, strict=True):
        np.testing.assert_allclose(coarse, whole[:, ::2, ::2], rtol=1e-3, atol=1e-5)


def test_u2pl_has_a_feature_for_each_candidate_of_a_coarser_projection(monkeypatch):
    sizes = []

    def look(self, key, student, teacher, candidates, queues):
        sizes.append({x.shape[0] for x in (student, teacher, candidates.anchors.T)})
        return jnp.zeros(()), queues

    monkeypatch.setattr(u2pl.U2PL, "_contrast", look)
    built = Harness(vit_config(method__name="u2pl", model__projection_stride=2))
    state = jax.eval_shape(built.init)
    jax.eval_shape(built.method.loss, state.trained, state, built.batch(0), jax.random.key(0))
    assert sizes == [{4 * 16 * 16}]


@pytest.mark.slow
def test_steps_on_several_devices_and_from_a_checkpoint(tmp_path):
    """As one device, with the encoder split over two; the next step from a checkpoint."""
    config = vit_config(
        method__name="supervised",
        optimizer__name="sgd",
        batch__labeled=4,
        batch__unlabeled=4,
        model__remat=True,
        model__drop_path=0.2,
    )
    one, several = Harness(config), Harness(config, 4, fsdp=2)
    split = abstract_state(several.method, several.tx, several.mesh)
    kernel = split.student.params["backbone"]["blocks"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 64, 128)  # of 256

    state, _ = one.step(one.init(), one.batch(0))
    before = jax.tree.map(np.array, jax.device_get(state))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, {}, None)
        checkpointer.wait()
        place = jax.sharding.NamedSharding(one.mesh, jax.sharding.PartitionSpec())
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), split)
        restored = checkpointer.restore(like).state
    copied = jax.tree.map(np.array, before)
    after, metrics = jax.device_get(one.step(copied, one.batch(1)))
    again = jax.device_get(one.step(restored, one.batch(1)))
    jax.tree.map(np.testing.assert_array_equal, again, (after, metrics))

    placed = jax.device_put(before, jax.tree.map(lambda x: x.sharding, split))
    after_several, metrics_several = jax.device_get(several.step(placed, several.batch(1)))
    assert metrics["loss"] == pytest.approx(metrics_several["loss"], rel=1e-4)
    leaves = (jax.tree.leaves(x.student.params) for x in (before, after, after_several))
    for old, a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3 * np.abs(a - old).max() + 1e-7)


def test_the_module_learns_on_a_transformer():
    harness = Harness(vit_config(method__name="csc"))
    state = harness.init()
    before = jax.device_get(state.student.params)
    for i in range(2):
        state, metrics = harness.step(state, harness.batch(i))
    assert metrics["rejected"] == 0
    assert np.isfinite(metrics["loss_c"])
    assert metrics["bank_fill"] > 0
    changed = jax.tree.map(
        lambda a, b: np.any(a != b), before, jax.device_get(state.student.params)
    )
    assert all(jax.tree.leaves(changed["backbone"]["blocks"]))
    assert all(jax.tree.leaves((changed["projection"], changed["classifier"], changed["fuse1"])))


def test_evaluation_does_without_what_only_training_needs():
    def built(name):
        harness = Harness(vit_config(method__name=name))
        state = jax.eval_shape(harness.init)

        def logits(network):
            return harness.method.task.eval_forward(network, images).logits

        images = np.zeros((2, 24, 24, 3), np.uint8)
        jaxpr = jax.jit(logits).trace(state.teacher).jaxpr.jaxpr
        pruned, used = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True])
        return str(pruned), sum(used), len(used)

    csc, supervised = built("csc"), built("supervised")
    assert csc[:2] == supervised[:2]
    assert csc[2] > supervised[2]  # the projection head is there, and not asked


def test_levels_of_one_width_lose_the_same_channels():
    """UniMatch V2 draws one mask for the four levels of its network."""
    levels = [jnp.ones((4, 2, 2, width)) for width in (64, 64, 64, 64, 16)]
    dropped = unimatch_v2.drop_in_levels(jax.random.key(0), levels, levels, 0.5)
    first, *others, narrow = map(np.concatenate, dropped)
    np.testing.assert_array_equal(first[:4] + first[4:], 2)
    assert 0.15 < np.mean(first == 0) < 0.35
    for other in others:
        np.testing.assert_array_equal(first, other)
    assert not np.array_equal(first[..., :16], narrow)  # of another width: a draw of its own


# A frozen backbone


@pytest.mark.parametrize("backbone", ["vit_tiny", "resnet10"])
def test_a_frozen_backbone_stays_and_nothing_is_kept_for_it(backbone):
    config = vit_config(
        method__name="supervised", model__backbone=backbone, model__freeze_backbone=True
    )
    harness = Harness(config)
    state = harness.init()
    before = jax.device_get((state.student, state.teacher))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state.opt_state)]
    assert any("classifier" in path for path in paths)
    assert not any("backbone" in path for path in paths)
    for i in range(2):
        state, metrics = harness.step(state, harness.batch(i))
    assert metrics["rejected"] == 0
    for old, new in zip(before, jax.device_get((state.student, state.teacher)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, old.params["backbone"], new.params["backbone"])
        statistics = (x.batch_stats.get("backbone", {}) for x in (old, new))
        jax.tree.map(np.testing.assert_array_equal, *statistics)
        assert np.any(
            old.params["classifier"]["out"]["kernel"] != new.params["classifier"]["out"]["kernel"]
        )


def test_nothing_goes_back_through_a_frozen_backbone():
    def loops(frozen):
        config = vit_config(method__name="supervised", model__freeze_backbone=frozen)
        built = Harness(config)
        state = jax.eval_shape(built.init)
        return scans(built.step.func.trace(*built.step.args, state, built.batch(0)).jaxpr.jaxpr)

    assert loops(False) - loops(True) == 2  # backward over the blocks, and over the heads of each


def scans(jaxpr):
    inside = [getattr(x, "jaxpr", x) for e in jaxpr.eqns for x in jax.tree.leaves(e.params)]
    count = sum(e.primitive.name == "scan" for e in jaxpr.eqns)
    return count + sum(scans(x) for x in inside if hasattr(x, "eqns"))


def experiment(**fields):
    config = vit_config(method__name="supervised", **fields)
    return build(config, ("a", "b"), np.zeros((2, 3), np.uint8), jax.devices()[:1])


def test_a_frozen_backbone_without_weights_is_refused():
    with pytest.raises(
        UserError, match=r"freeze_backbone is True, but model\.pretrained is 'none'"
    ):
        experiment(model__freeze_backbone=True).load_pretrained()


def test_what_a_transformer_lacks_is_refused():
    with pytest.raises(UserError, match=r"loss\.aux_weight is above 0, but .*'vit_tiny'"):
        experiment(loss__aux_weight=0.4)
    with pytest.raises(UserError, match=r"model\.backbone is 'vit_tinny'.*Did you mean 'vit_tiny'"):
        experiment(model__backbone="vit_tinny")


def test_a_stride_that_a_network_cannot_have_is_refused():
    with pytest.raises(UserError, match=r"projection_stride is 3"):
        experiment(model__projection_stride=3)
    with pytest.raises(UserError, match=r"projection_stride is 2, but .*'resnet10'.* Set --config"):
        experiment(model__projection_stride=2, model__backbone="resnet10")


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        ((36, 32), r"\(36, 32\), but vit_tiny sees patches of 8 px.*\(32 or 40, 32\).*=40,32\."),
        ((64, 3), r"\(64, 3\).*\(64, 8\).*crop_size=64,8\."),
    ],
)
def test_a_crop_that_is_no_multiple_of_a_patch_is_refused(crop, message):
    with pytest.raises(UserError, match=message):
        experiment(data__crop_size=crop)


# Evaluation


def local_network(variables, images):
    """Every other pixel of the image as its logits; checks that it sees whole patches."""
    assert all(side % 8 == 0 for side in images.shape[1:3])
    return jnp.asarray(images, jnp.float32)[:, ::2, ::2]


@pytest.mark.parametrize("size", [(5, 20), (24, 16), (29, 43)])
def test_images_are_predicted_at_whole_patches_and_scored_at_their_own_size(size, mesh1):
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)

    def predict(multiple):
        predictor = make_predictor(
            local_network,
            lambda size: size // 2,
            num_classes=3,
            mode="whole",
            window=(0, 0),
            mesh=mesh1,
            size_multiple=multiple,
            patch=8,
            as_logits=True,
        )
        return np.asarray(predictor({}, image))[:, : size[0], : size[1]]

    # By hand: the nearest multiples of 8, half of them for the logits, and back.
    whole = tuple(max(8, int(n / 8 + 0.5) * 8) for n in size)
    expected = models.resize_aligned(jnp.asarray(image, jnp.float32), whole)[:, ::2, ::2]
    for back in (whole, size):
        expected = models.resize_aligned(expected, back)
    for multiple in (1, 32):  # padded, the picture is resized and not what is around it
        np.testing.assert_allclose(predict(multiple), expected, atol=1e-2)
