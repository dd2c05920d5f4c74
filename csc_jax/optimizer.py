"""SGD or AdamW with polynomial decay and a multiplier for the heads (decisions.md 24)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def learning_rate_schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate of the backbone: linear warm-up, then (1 - t/T)^power.

    Args:
      config: `config.optimizer`.
      total_steps: T, optimizer steps of the whole run.
    """
    steps = max(total_steps - config.warmup, 1)
    decay = polynomial_decay(config.learning_rate, config.power, steps)
    if not config.warmup:
        return decay
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
    return optax.join_schedules([warmup, decay], [config.warmup])


def polynomial_decay(rate: float, power: float, total_steps: int) -> optax.Schedule:
    """Returns step t -> rate * (1 - t/T)^power; from t = T - 1 on it changes no more.

    At T itself optax's base can be rounded to just below 0, whose power is NaN.
    """
    decay = optax.polynomial_schedule(rate, 0.0, power, total_steps)
    return lambda step: decay(jnp.minimum(step, total_steps - 1))


def make_optimizer(config: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of one segmentation network.

    `sgd` is PyTorch's: weight decay is added to the gradient before the momentum. `adamw`
    decouples it. Parameters outside the top-level key "backbone" learn at
    `head_multiplier` times the rate.

    Args:
      config: `config.optimizer`.
      total_steps: optimizer steps of the whole run.
    """
    if config.name == "sgd":
        direction = optax.chain(
            optax.add_decayed_weights(config.weight_decay), optax.trace(decay=config.momentum)
        )
    else:
        direction = optax.chain(
            optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay)
        )
    rate = learning_rate_schedule(config, total_steps)
    parts = [direction, optax.scale_by_learning_rate(rate)]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.head_multiplier != 1.0:
        parts.append(optax.masked(optax.scale(config.head_multiplier), _outside_backbone))
    return optax.chain(*parts)


def combine(optimizers: dict[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Returns one optimizer over {network name: parameters} from one per network."""
    return optax.multi_transform(optimizers, lambda params: {name: name for name in params})


def _outside_backbone(params: dict[str, Any]) -> dict[str, Any]:
    return {
        name: jax.tree.map(lambda _, name=name: name != "backbone", tree)
        for name, tree in params.items()
    }
