"""SupOnly: cross entropy on the labelled images alone (Eq. 2), lower bound of Tables V and VIII.

An EMA of the student is kept here too, so that "the teacher is what is evaluated" holds for every
row and a gain of the others is not the gain of weight averaging.
"""

from typing import Any

from jax import Array

from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.state import TrainState, teacher_decay, update_ema


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
            projection=self.with_pixels,
        )
        loss = self.task.supervised_loss(outputs.logits, outputs.aux, labeled["label"])
        pixels = None
        if self.with_pixels:
            features = shared.bank_features(self.task, state, outputs, labeled["image"])
            pixels = shared.pixels(outputs, features, labeled["label"])
        return loss, LossOutputs({"student": batch_stats}, {"loss_s": loss}, pixels)

    def update(
        self, state: TrainState, outputs: LossOutputs, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        decay = teacher_decay(state.step, 0, self.task.config.method.ema_decay)
        return state.replace(teacher=update_ema(state.teacher, state.student, decay)), {}


METHOD = Supervised
