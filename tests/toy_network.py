"""A network of a few small matrices: compiles at once, so that tests can follow a whole loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tiny import CLASSES, Harness, tiny_config

from csc_jax import config as config_lib
from csc_jax import methods
from csc_jax.methods.base import Task
from csc_jax.models import Features, Outputs
from csc_jax.optimizer import combine
from csc_jax.parallel import sharding
from csc_jax.training.step import compile_init


class ToyNetwork(nn.Module):
    """What `Task` needs of a network; every output is linear in 4x4 px means of the image."""

    num_classes: int
    projection_dim: int = 4
    dropout: float = 0.0
    bands: int = 3

    patch = 1
    encoded_width = 8
    encoded_scale = 4

    def logits_size(self, size):
        return size // 4

    def without_dropout(self):
        return self.clone(dropout=0.0)

    @nn.compact
    def __call__(self, x, train, projection=True, perturb=None):
        pooled = nn.avg_pool(x, (4, 4), (4, 4))
        # A bias before BatchNorm would have a gradient of rounding errors alone.
        deep = nn.Conv(8, (1, 1), use_bias=False, name="body")(pooled)
        deep = nn.BatchNorm(use_running_average=not train, name="bn")(deep)
        if perturb is not None:
            (deep,) = perturb(Features((deep,), deep)).levels
        deep = nn.Dropout(self.dropout, deterministic=not train)(deep)
        logits = nn.Conv(self.num_classes, (1, 1), name="classifier")(deep)
        project = nn.Conv(self.projection_dim, (1, 1), name="projection") if projection else None
        encoded = nn.avg_pool(deep, (4, 4), (4, 4))
        return Outputs(logits, project(deep) if project else None, None, encoded)


def toy_harness(config, devices=1, fsdp=1):
    """Returns the compiled step of a config on the toy network: within seconds, not a minute."""
    return Harness(config, devices, fsdp, ToyNetwork(CLASSES, config.model.projection_dim, 0.1))


def toy_method(dropout=0.0, **overrides):
    """Returns a method on the toy network and its state before step 0; fields as in tiny_config."""
    config = config_lib.resolve(tiny_config(**overrides), steps_per_epoch=4)
    task = Task(config, ToyNetwork(CLASSES, dropout=dropout), CLASSES, config.train.steps)
    method = methods.build(task)
    tx = combine(method.optimizers())
    return method, compile_init(method, tx, sharding.make_mesh(1))()


def toy_batch(seed=0, size=(2, 32, 32)):
    """Returns random images and labels, with padding at the right of the first unlabelled one."""
    rng = np.random.default_rng(seed)
    halves = {}
    for name in ("labeled", "unlabeled"):
        label = rng.integers(0, CLASSES, size).astype(np.uint8)
        label[:, :3] = 255  # some pixels without a label
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        halves[name] = {"image": image, "label": label, "inside": np.ones(size, bool)}
    halves["unlabeled"]["inside"][0, :, -8:] = False
    return jax.tree.map(jnp.asarray, halves)


def running_statistics(method, network, *batches):
    """Returns mean and variance that the toy network's BatchNorm has after batches of images.

    Each batch moves them by a hundredth, Flax's default.
    """
    mean, variance = (np.asarray(network.batch_stats["bn"][name]) for name in ("mean", "var"))
    body, data = jax.device_get(network.params["body"]), method.task.config.data
    for images in batches:
        normal = (np.asarray(images, np.float64) - data.mean) / data.std
        count, height, width, _ = normal.shape
        pooled = normal.reshape(count, height // 4, 4, width // 4, 4, 3).mean((2, 4))
        x = pooled @ body["kernel"][0, 0].astype(np.float64)
        mean = 0.99 * mean + 0.01 * x.mean((0, 1, 2))
        variance = 0.99 * variance + 0.01 * x.var((0, 1, 2))
    return mean, variance


def assert_statistics(batch_stats, expected):
    """Compares new BatchNorm statistics of the toy network with mean and variance."""
    for name, value in zip(("mean", "var"), expected, strict=True):
        np.testing.assert_allclose(batch_stats["bn"][name], value, rtol=1e-4, atol=1e-6)


def softmax(x):
    """Returns the softmax over the last axis, float64."""
    e = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cross_entropy(logits, labels, counted):
    """Returns the mean of -log p(label) over the pixels counted, one after the other."""
    probabilities, terms = softmax(logits), []
    for place in np.ndindex(labels.shape):
        if counted[place] and labels[place] != 255:
            terms.append(-np.log(probabilities[place][labels[place]]))
    return np.mean(terms)
