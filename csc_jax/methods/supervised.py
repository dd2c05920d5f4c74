"""SupOnly: cross entropy on the labelled images alone (Eq. 2), lower bound of Tables V and VIII.

An EMA of the student is kept here too, so that "the teacher is what is evaluated" holds for every
row and a gain of the others is not the gain of weight averaging.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.state import TrainState, update_ema


class Supervised(Method):
    """L = L_s."""

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        labeled = batch["labeled"]
        outputs, batch_stats = self.task.train_forward(
            params["student"],
            state.student.batch_stats,
            labeled["image"],
            key,
            projection=self.projection,
        )
        loss = self.task.supervised_loss(outputs.logits, outputs.aux, labeled["label"])
        return loss, LossOutputs({"student": batch_stats}, {"loss_s": loss})

    def update(
        self, state: TrainState, outputs: LossOutputs, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        decay = teacher_decay(state.step, 0, self.task.config.method.ema_decay)
        return state.replace(teacher=update_ema(state.teacher, state.student, decay)), {}


def teacher_decay(step: Array, start: int, limit: float) -> Array:
    """Returns min(1 - 1/(t + 1), limit), t from `start`; before it 0, a copy (decisions.md 19)."""
    t = jnp.maximum(step - start, 0).astype(jnp.float32)
    return jnp.minimum(1.0 - 1.0 / (t + 1.0), limit)


METHOD = Supervised
