"""What every method must hold, whatever it does."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Harness, tiny_config
from toy_network import toy_batch, toy_harness, toy_method

from csc_jax import methods, models
from csc_jax.errors import UserError
from csc_jax.methods import gct, shared
from csc_jax.models.resize import resize_aligned
from csc_jax.training.checkpoint import Checkpointer
from csc_jax.training.step import init_state

METHODS = methods.available()


DECODERS = ("con_msk", "dropout", "f_drop", "f_noise", "g_cutout", "i_vat", "obj_msk")
SMALLER = {
    "cct": {f"method__cct__{name}": 1 for name in DECODERS},
    # The flaw map has 1/32 of the image's size, and of one pixel nothing could be a flaw.
    "gct": {"data__crop_size": (64, 64), "method__gct__detector_width": 4},
}


def toy_config(**overrides):
    smaller = SMALLER.get(overrides["method__name"], {})
    return tiny_config(**smaller, **overrides)


@pytest.mark.parametrize(
    ("method", "devices", "fsdp"),
    [
        *((method, 4, 1) for method in METHODS),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (("csc", 2, 1), ("csc", 8, 1), ("supervised", 4, 2))
        ),
    ],
)
def test_devices_agree_and_a_run_continues(method, devices, fsdp, monkeypatch, tmp_path):
    """Three steps, a checkpoint, and the fourth step: from it, and on several devices."""
    # ReLU's derivative jumps: a unit that rounding lifts over zero moves its channel's gradient by
    # percents. A smooth one in its place leaves rounding errors alone to be compared.
    monkeypatch.setattr(nn, "relu", nn.silu)
    monkeypatch.setattr(nn, "leaky_relu", lambda x, negative_slope=0.01: nn.silu(x))
    # Plain SGD: Adam divides by the root of a mean square, which blows rounding errors of near-zero
    # gradients up to full steps.
    config = toy_config(
        method__name=method,
        optimizer__name="sgd",
        optimizer__learning_rate=1e-3,
        batch__labeled=max(4, devices),
        batch__unlabeled=max(4, devices),
    )
    # Compiled with the real network all these programs would take minutes; one row has it.
    build = toy_harness if fsdp == 1 else Harness
    one, several = build(config), build(config, devices, fsdp)
    state = one.init()
    for i in range(3):  # with csc, the bank is ready by then, so that L_c and both gates take part
        state, metrics = one.step(state, one.batch(i))
        assert np.isfinite(metrics["loss"])
    # From one state: sampling and thresholds would turn rounding errors into other pixels.
    # Each step gets a copy: it is donated, and on a CPU host arrays may share the device's memory.
    before = jax.tree.map(np.array, jax.device_get(state))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, {}, {}, None)
        checkpointer.wait()
        restored = checkpointer.restore(abstract(one)).state
    after, metrics_one = jax.device_get(one.step(copy.deepcopy(before), one.batch(3)))
    if method == "csc":
        assert metrics_one["ready"] == 1.0
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(one.step(restored, one.batch(3))),
        (after, metrics_one),
    )
    after_several, metrics_several = jax.device_get(several.step(before, several.batch(3)))
    assert metrics_one.keys() == metrics_several.keys()
    for name, value in metrics_one.items():
        np.testing.assert_allclose(metrics_several[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(after)]
    leaves = zip(paths, jax.tree.leaves(after), jax.tree.leaves(after_several), strict=True)
    for path, a, b in leaves:
        # A sum's rounding error goes with its largest terms, not with what is left of them, and
        # normalisation over a few pixels magnifies it. What each device does for itself alone, such
        # as a BatchNorm or a mean that is not the whole batch's, differs by tens of percents.
        atol = 5e-3 * float(np.max(np.abs(a), initial=0.004, where=np.isfinite(a)))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol, err_msg=path)


def abstract(harness):
    """Shapes and places of a harness's state."""
    shapes = jax.eval_shape(harness.init)
    place = jax.sharding.NamedSharding(harness.mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def test_fsdp_splits_networks_and_optimizer_and_no_bank():
    state = Harness(toy_config(method__name="csc"), 4, fsdp=2).init()
    leaves = jax.tree.leaves((state.student, state.teacher, state.opt_state))
    split = [leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in leaves]
    assert sum(split) > 20
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.bank))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "csc"])
def test_the_module_goes_on_top(method):
    built = Harness(toy_config(method__name=method, method__contrast="csc"))
    step = built.step.func.eval_shape
    state, metrics = step(*built.step.args, jax.eval_shape(built.init), built.batch(0))
    assert state.bank.features.shape == (4, 6, 8)  # C, S, D
    assert "projection" in state.student.params
    assert {"loss_c", "separation", "bank_fill"} <= metrics.keys()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_evaluated_on_the_same_network(method):
    def built(name):
        harness = Harness(toy_config(method__name=name))
        state = jax.eval_shape(harness.init)
        images = np.zeros((4, 32, 32, 3), np.uint8)

        def logits(network):
            return harness.method.task.eval_forward(network, images).logits

        # Only what the output needs: neither the projection head nor any companion.
        jaxpr = jax.jit(logits).trace(state.teacher).jaxpr.jaxpr
        pruned, used = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True])
        return str(pruned), sum(used)

    assert built(method) == built("supervised")


def test_the_module_learns_on_top_of_supervised():
    config = toy_config(
        method__name="supervised", method__contrast="csc", contrast__bank_source="teacher"
    )
    harness = toy_harness(config)
    state = harness.init()
    for i in range(3):
        state, metrics = harness.step(state, harness.batch(i))
    assert metrics["ready"] == 1.0
    assert state.bank.count.min() >= 1
    assert "loss_u" not in metrics


def test_csc_on_top_of_the_baseline_is_csc():
    named = Harness(toy_config(method__name="csc"))
    on_top = Harness(toy_config(method__name="cutmix_mean_teacher", method__contrast="csc"))
    programs = [harness.lower().as_text() for harness in (named, on_top)]
    assert programs[0] == programs[1]
    states = [
        jax.eval_shape(lambda h=h: init_state(h.method, h.tx, 0, {})) for h in (named, on_top)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_no_feature_map_outlives_the_loss_of_csc():
    """It would take part of the memory of the whole backward pass."""
    harness = Harness(toy_config(method__name="csc"))
    state = jax.eval_shape(harness.init)
    _, outputs = jax.eval_shape(
        harness.method.loss, state.trained, state, harness.batch(0), jax.random.key(0)
    )
    assert outputs.pixels is None
    config, (height, width) = harness.config, harness.config.data.crop_size
    pixels, dim = (height // 4) * (width // 4), config.model.projection_dim
    shapes = [x.shape for x in jax.tree.leaves(outputs.carry["drawn"])]
    slots = {config.contrast.views_per_class, config.contrast.pixels_per_class}
    assert {shape[2] for shape in shapes} == slots
    assert pixels not in {size for shape in shapes for size in shape}
    assert dim in {shape[-1] for shape in shapes}


# method -> whose arg max it teaches on unlabelled images, and which pixels get no label
TEACHES = {
    "cct": ("student", "all get one"),
    "cps": ("second", "all get one"),
    "csc": ("teacher", "least likely"),
    "cutmix_mean_teacher": ("teacher", "least likely"),
    "fixmatch": ("student", "least likely"),
    "mean_teacher": ("teacher", "all get one"),
    "u2pl": ("teacher", "highest entropy"),
    "unimatch": ("student", "least likely"),
    "unimatch_v2": ("teacher", "least likely"),
}
MASK = {"mode": "confidence", "threshold": 0.7}


def different_networks(**overrides):
    """A method, a state whose networks share no parameter, and images."""
    method, state = toy_method(**overrides)
    keys = iter(jax.random.split(jax.random.key(7), 100))

    def other(network):
        noisy = jax.tree.map(
            lambda x: x + 0.5 * jax.random.normal(next(keys), x.shape), network.params
        )
        return network.replace(params=noisy)

    companions = {name: other(network) for name, network in state.companions.items()}
    student, teacher = other(state.student), other(state.teacher)
    state = state.replace(student=student, teacher=teacher, companions=companions)
    blocks = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)  # of 4x4 px each
    return method, state, blocks.repeat(4, 1).repeat(4, 2)


def probabilities(method, state, images):
    """Of each network: (2, 32, 32, C)."""
    networks = {"student": state.student, "teacher": state.teacher}
    if "second" in state.companions:
        networks["second"] = state.companions["second"]
    logits = {k: method.task.eval_forward(v, images).logits for k, v in networks.items()}
    return {k: np.asarray(jax.nn.softmax(resize_aligned(v, (32, 32)))) for k, v in logits.items()}


@pytest.mark.parametrize(("name", "network", "unlabelled"), [(k, *v) for k, v in TEACHES.items()])
def test_panels_show_what_a_method_teaches(name, network, unlabelled):
    fields = {}
    if name in ("csc", "cutmix_mean_teacher"):  # without the random draw
        fields = {f"method__pseudo_label__{k}": v for k, v in MASK.items()}
    elif unlabelled == "least likely":
        fields[f"method__{name}__threshold"] = MASK["threshold"]
    method, state, images = different_networks(method__name=name, **fields)
    shown = np.asarray(jax.jit(method.pseudo_labels)(jax.random.key(0), state, images))
    assert (shown.shape, shown.dtype) == ((2, 32, 32), np.int32)
    p = probabilities(method, state, images)
    others = [p[each].argmax(-1) for each in p.keys() - {network}]
    p, labelled = p[network], shown != 255
    assert all(np.mean(other != p.argmax(-1)) > 0.1 for other in others)
    np.testing.assert_array_equal(shown[labelled], p.argmax(-1)[labelled])
    if unlabelled == "all get one":
        assert labelled.all()
        return
    assert 0.05 < labelled.mean() < 0.95
    if unlabelled == "least likely":
        np.testing.assert_array_equal(labelled, p.max(-1) >= MASK["threshold"])
    elif unlabelled == "highest entropy":  # a fifth of the pixels before the first step (Sec. 3.2)
        entropy = -np.sum(p * np.log(p + 1e-10), axis=-1)
        np.testing.assert_array_equal(labelled, entropy < np.percentile(entropy, 80))


@pytest.mark.parametrize("name", ["cutmix_mean_teacher", "u2pl"])
@pytest.mark.parametrize(("step", "percentile"), [(0, 80), (3, 90), (6, 100)])
def test_fewer_pixels_are_dropped_by_entropy_as_training_goes_on(name, step, percentile):
    fields = {"method__pseudo_label__mode": "entropy", "train__steps": 6}
    method, state, images = different_networks(method__name=name, **fields)
    state = state.replace(step=jnp.int32(step))
    shown = np.asarray(method.pseudo_labels(jax.random.key(0), state, images))
    p = probabilities(method, state, images)["teacher"]
    entropy = -np.sum(p * np.log(p + 1e-10), axis=-1)
    np.testing.assert_array_equal(shown != 255, entropy < np.percentile(entropy, percentile))


def test_a_panel_of_gct_shows_the_network_without_the_flaw(monkeypatch):
    method, state, images = different_networks(method__name="gct", method__gct__detector_width=4)
    p, key = probabilities(method, state, images), jax.random.key(0)
    seen = []

    for flaws, network in (((0, 1), "student"), ((1, 0), "second"), ((1, 1), "student")):
        everywhere = iter(flaws)  # of the student's output, then of the second network's

        def handle(flaws, everywhere=everywhere):
            seen.append(np.asarray(flaws))
            return np.full(flaws.shape, next(everywhere), np.float32)

        monkeypatch.setattr(gct, "handle_flaws", handle)
        shown = method.pseudo_labels(key, state, images)
        np.testing.assert_array_equal(shown, p[network].argmax(-1))
    # The detector is asked about each network's own output.
    assert np.any(seen[0] != seen[1])
    np.testing.assert_array_equal(seen[:2], seen[2:4])


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_labels_and_predictions_are_of_the_pixels_that_the_projection_has(stride):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 8, 12, 4)).astype(np.float32)
    features = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)[:, ::stride, ::stride]
    labels = rng.integers(0, 4, (2, 16, 24))
    outputs = models.Outputs(*map(jnp.asarray, (logits, features)), aux=None, encoded=None)
    pixels = shared.pixels(outputs, outputs.projection, jnp.asarray(labels))
    np.testing.assert_array_equal(pixels.features, features)
    np.testing.assert_array_equal(pixels.labels, labels[:, :: 2 * stride, :: 2 * stride])
    np.testing.assert_array_equal(pixels.predictions, logits.argmax(-1)[:, ::stride, ::stride])


@pytest.mark.parametrize(
    ("name", "fields"),
    [*((name, {}) for name in METHODS if name != "supervised"), ("cps", {"cutmix": False})],
)
def test_pseudo_labels_never_pass_through_dropout(name, fields):
    """They are those of a network without any, which is otherwise the same (decisions.md 19c)."""
    fields = {f"method__{name}__{field}": value for field, value in fields.items()}
    fields |= {"method__pseudo_label__threshold": 0.0, "model__projection_dim": 4}
    fields |= SMALLER.get(name, {})
    if name in ("fixmatch", "unimatch", "unimatch_v2"):
        fields[f"method__{name}__threshold"] = 0.0
    if name != "csc":
        fields["method__contrast"] = "csc"
    labels, losses = [], []
    for rate in (0.0, 0.9):
        method, state = toy_method(method__name=name, dropout=rate, **fields)
        batch = toy_batch(size=(2, *method.task.config.data.crop_size))
        loss, outputs = jax.jit(method.base.loss)(state.trained, state, batch, jax.random.key(0))
        labels.append(np.asarray(outputs.pixels.labels)[1::2])  # of the unlabelled images
        losses.append(float(loss))
    assert len(np.unique(labels[0][labels[0] != 255])) > 1
    np.testing.assert_array_equal(*labels)
    # What is learnt does pass through it, but where one pass both teaches and learns.
    both = name == "gct" or (name == "cps" and "method__cps__cutmix" in fields)
    assert (losses[0] == losses[1]) == both


def test_batches_are_dealt_out_so_that_each_device_keeps_its_images():
    first, second = jnp.arange(4), jnp.arange(10, 16)  # 2 and 3 of each in two groups
    joined = shared.join({"x": first}, {"x": second})
    assert joined["x"].tolist() == [0, 1, 10, 11, 12, 2, 3, 13, 14, 15]
    parts = shared.split(joined, first, second)
    assert [part["x"].tolist() for part in parts] == [first.tolist(), second.tolist()]
    # What a network made of the first two of three batches alone.
    part, rest, none = shared.split(joined["x"], first, second, second)
    assert (part.tolist(), rest.tolist(), none.tolist()) == (first.tolist(), second.tolist(), [])


def test_supervised_teaches_nothing():
    method, state, images = different_networks(method__name="supervised")
    assert method.pseudo_labels(jax.random.key(0), state, images) is None


def test_csc_on_top_of_itself_is_refused():
    with pytest.raises(UserError, match=r"on top of method\.name, which is csc already"):
        Harness(tiny_config(method__contrast="csc"))
