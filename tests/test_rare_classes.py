"""Class weights, focal and Dice loss against numbers by hand and formulas written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from csc_jax import class_weights as weights_lib
from csc_jax import data, losses
from csc_jax.class_weights import class_weights
from csc_jax.config import checks as config_checks
from csc_jax.errors import UserError
from csc_jax.methods import Task
from csc_jax.parallel import sharding
from csc_jax.training.experiment import build

WEIGHTS = (0.2, 1.0, 3.0, 0.0)


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Logits (8, 6, 5, 4) and labels (8, 6, 5) of classes 0 to 2 and void; class 3 is absent."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], (8, 6, 5), p=[0.6, 0.2, 0.1, 0.1])
    return rng.normal(size=(8, 6, 5, 4)).astype(np.float32), labels.astype(np.uint8)


def probabilities(logits, labels):
    """Softmax (N, C) and labels (N,) of the labelled pixels, float64."""
    known = labels != 255
    e = np.exp(logits[known].astype(np.float64))
    return e / e.sum(-1, keepdims=True), labels[known]


def test_weighted_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]))
    labels = jnp.array([0, 1, 255], jnp.uint8)
    expected = -(1 * np.log(0.5) + 3 * np.log(0.1)) / (1 + 3)
    found = losses.cross_entropy(logits, labels, class_weights=(1.0, 3.0))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # A factor common to all weights changes nothing.
    found = losses.cross_entropy(logits, labels, class_weights=(10.0, 30.0))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Nothing but pixels of weight 0 is nothing to learn from.
    assert losses.cross_entropy(logits, jnp.full(3, 1), class_weights=(1.0, 0.0)) == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [(), WEIGHTS])
def test_focal_loss_is_its_formula(batch, gamma, weights):
    p, y = probabilities(*batch)
    own = p[np.arange(len(y)), y]
    w = np.array(weights or (1.0,) * 4)[y]
    expected = np.sum(w * -((1 - own) ** gamma) * np.log(own)) / np.sum(w)
    found = losses.cross_entropy(*batch, class_weights=weights, focal_gamma=gamma)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_focal_loss_by_hand():
    """Lin et al., Sec. 3.2: with gamma 2 a pixel of p = 0.9 counts 100 times less."""
    logits, labels = jnp.log(jnp.array([[0.9, 0.1]])), jnp.array([0])
    focal = losses.cross_entropy(logits, labels, focal_gamma=2.0)
    np.testing.assert_allclose(focal, -np.log(0.9) / 100, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_gradient_of_the_focal_loss_is_finite_where_nothing_is_wrong(gamma):
    logits, labels = jnp.array([[200.0, 0.0], [1.0, 0.0]]), jnp.array([0, 255])
    value, gradient = jax.value_and_grad(
        lambda x: losses.cross_entropy(x, labels, focal_gamma=gamma)
    )(logits)
    assert value == 0
    assert np.all(gradient == 0)


def test_dice_by_hand():
    # Class 0: 2 * 0.8 / (0.8 + 0.4 + 1); class 1: 2 * 0.6 / (0.2 + 0.6 + 1). The third is void.
    logits = jnp.log(jnp.array([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]]))
    labels = jnp.array([0, 1, 255], jnp.uint8)
    expected = 1 - (2 * 0.8 / 2.2 + 2 * 0.6 / 1.8) / 2
    np.testing.assert_allclose(losses.dice_loss(logits, labels), expected, rtol=1e-6)


def test_dice_is_its_formula_over_the_classes_that_occur(batch):
    p, y = probabilities(*batch)
    one_hot = np.eye(4)[y]
    dice = 2 * (p * one_hot).sum(0) / (p.sum(0) + one_hot.sum(0))
    np.testing.assert_allclose(losses.dice_loss(*batch), 1 - dice[:3].mean(), rtol=1e-5)
    value, gradient = jax.value_and_grad(losses.dice_loss)(batch[0], np.full((8, 6, 5), 255))
    assert value == 0
    assert np.all(gradient == 0)


def test_ohem_chooses_by_probability_and_weighs_what_it_keeps(batch):
    logits, labels = batch
    p, y = probabilities(logits, labels)
    own = p[np.arange(len(y)), y]
    hard = own <= max(0.3, np.sort(own)[49])
    w = np.array(WEIGHTS)[y] * hard
    found = losses.ohem_cross_entropy(
        logits, labels, threshold=0.3, min_kept=50, class_weights=WEIGHTS
    )
    np.testing.assert_allclose(found, np.sum(w * -np.log(own)) / np.sum(w), rtol=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "ohem"])
def test_the_supervised_loss_is_that_of_the_whole_batch_on_any_devices(batch, name):
    """And the fields reach it: L_s of one device is the sum of its parts."""
    gamma = 0.0 if name == "ohem" else 2.0
    config = tiny_config(
        loss__name=name, loss__focal_gamma=gamma, loss__dice_weight=0.5, loss__ohem_min_kept=50
    )
    logits, labels = batch
    task = Task(config, None, 4, 1, WEIGHTS)
    loss = jax.value_and_grad(lambda x, y: task.supervised_loss(x, None, y))
    expected, gradient = loss(jnp.asarray(logits), labels)
    pixels = (
        losses.ohem_cross_entropy(logits, labels, min_kept=50, class_weights=WEIGHTS)
        if name == "ohem"
        else losses.cross_entropy(logits, labels, class_weights=WEIGHTS, focal_gamma=gamma)
    )
    parts = pixels + 0.5 * losses.dice_loss(logits, labels)
    np.testing.assert_allclose(expected, parts, rtol=1e-6)
    sharded = sharding.shard_batch({"x": logits, "y": labels}, sharding.make_mesh(8))
    found, of_eight = jax.jit(loss)(sharded["x"], sharded["y"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(of_eight, gradient, rtol=1e-3, atol=1e-6)


def test_the_rules_by_hand():
    pixels = (900, 100, 0, 0)
    assert class_weights("none", 4, pixels) == ()
    inverse = class_weights("inverse_frequency", 4, pixels)
    np.testing.assert_allclose(inverse, [1000 / 1800, 1000 / 200, 0, 0])
    enet = class_weights("enet", 4, pixels)
    np.testing.assert_allclose(enet, [1 / np.log(1.92), 1 / np.log(1.12), 0, 0])
    assert class_weights("1,2.5,0,4", 4, pixels) == (1.0, 2.5, 0.0, 4.0)
    assert class_weights("enet", 4) == ()  # nothing was counted, as nothing is trained


@pytest.mark.parametrize(
    "text", ["", "enett", "1,,2", "1,nan", "1,inf", "1,1e300", "1,1e-60", "-1,2", "0,0", "1;2"]
)
def test_what_is_no_weight_is_named(text):
    config = tiny_config()
    config.loss.class_weights = text
    with pytest.raises(UserError, match=r"loss\.class_weights is .*inverse_frequency"):
        config_checks.validate(config)


def test_a_number_for_each_class():
    config = tiny_config(loss__class_weights="1,2")
    with pytest.raises(UserError, match="2 numbers, but the data set has 3 classes"):
        build(config, ("a", "b", "c"), np.zeros((3, 3), np.uint8))
    assert weights_lib.given("(1, 2)") == (1.0, 2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss__name": "ohem", "loss__focal_gamma": 2.0}, "loss.name is 'ohem'"),
        (
            {"loss__dice_weight": 1.0, "method__name": "cct", "method__cct__annealed": True},
            r"loss\.dice_weight is 1\.0, but method\.cct\.annealed",
        ),
        ({"loss__focal_gamma": -1.0}, r"loss\.focal_gamma is -1"),
    ],
)
def test_what_makes_no_sense_together_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**fields)


def test_the_rules_count_the_labels_of_the_labelled_images_alone(tmp_path):
    config = tiny_config(tmp_path)
    dataset = data.load(config.data)
    lists = data.partition(config.data, dataset, seed=0)
    source = dataset.sources["train"]
    held = [e["label"] for e in map(source.__getitem__, range(len(source)))]
    expected = np.sum(
        [
            np.bincount(label.ravel(), minlength=256)[: dataset.num_classes]
            for name, label in zip(source.ids, held, strict=True)
            if name in lists.labeled
        ],
        axis=0,
    )
    assert source.count_pixels(lists.labeled, dataset.num_classes) == tuple(expected)
    assert tuple(expected) != dataset.census["train"].pixels
