"""Gradient accumulation: a batch in parts that fit into memory, one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax.methods.base import Batch, LossOutputs
from csc_jax.state import TrainState

Gradient = Callable[..., tuple[tuple[Array, LossOutputs], dict[str, Any]]]


def accumulated(
    grad: Gradient,
    parts: int,
    trainable: dict[str, Any],
    state: TrainState,
    batch: Batch,
    key: Array,
) -> tuple[tuple[Array, LossOutputs], dict[str, Any]]:
    """Returns what `grad` returns for a whole batch: loss and outputs, and gradients.

    Loss, metrics and gradients are means over the parts, so they are those of the whole batch where
    its loss is a mean over its images. They differ from it where the loss looks at several images
    at once: BatchNorm has the statistics of a part, and its running ones move once for each part;
    a mean over pixels, and OHEM, count those of a part; the keys of the contrastive loss are the
    queries of a part. The memory bank is updated once a step, with the pixels of all parts.

    Args:
      grad: (trainable, state, batch, key) -> the same for a part; of a method that `accumulates`.
      parts: `train.accumulate`; divides both halves of the batch, on each device.
      trainable: parameters that the gradients are of, by network.
      state: before the step.
      batch: as `Method.loss` takes it.
      key: random key of the step; each part has one of its own.
    """
    # Part i has the images i, i + parts, …: of each device's images as many, so that none moves.
    split = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )

    def part(
        total: dict[str, Any], given: tuple[Array, Batch]
    ) -> tuple[dict[str, Any], tuple[Array, LossOutputs]]:
        part_key, images = given
        now = state.with_trained(state.trained, total["batch_stats"])
        (loss, outputs), gradients = grad(trainable, now, images, part_key)
        summed = jax.tree.map(jnp.add, total["gradients"], gradients)
        carried = {"gradients": summed, "batch_stats": outputs.batch_stats}
        return carried, (loss, outputs.replace(batch_stats={}))

    networks = {"student": state.student} | state.companions
    start = {
        "gradients": jax.tree.map(jnp.zeros_like, trainable),
        "batch_stats": {name: network.batch_stats for name, network in networks.items()},
    }
    # A scan, so that only one part's activations are in memory.
    total, (loss, outputs) = jax.lax.scan(part, start, (jax.random.split(key, parts), split))
    gradients = jax.tree.map(lambda x: x / parts, total["gradients"])
    whole = outputs.replace(
        batch_stats=total["batch_stats"],
        # Some are NaN where a part has nothing to measure.
        metrics=jax.tree.map(lambda x: jnp.nanmean(x, axis=0), outputs.metrics),
        # In the order of the batch again, which leaves each image on its device.
        carry=jax.tree.map(
            lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), outputs.carry
        ),
    )
    return (jnp.mean(loss), whole), gradients
