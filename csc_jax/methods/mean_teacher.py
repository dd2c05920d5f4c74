"""Mean Teacher: the student's softmax follows that of its EMA under other noise.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017: Sec. 2 (the method) and
Appendix B.1 (squared error of the softmax outputs, weight 100, its sigmoid-shaped ramp-up of 40,000
of 150,000 steps, Gaussian input noise of 0.15). L = L_s + w(t) L_u over labelled and unlabelled
images; student and teacher each see a view and drop units of their own.

What differs: pixels take the place of images; predictions are compared where the network makes
them, at stride 4; views also get the photometric operations of `config.method`; optimizer, the
decay of the EMA and all else are those of every other row (decisions.md 19). The pseudo-labels of a
contrastive module on top are the teacher's without dropout (decisions.md 19c). The baseline of the
CSC paper, with pseudo-labels and CutMix, is `cutmix_mean_teacher`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax import augment
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.models import resize_aligned
from csc_jax.state import TrainState


class MeanTeacher(Method):
    """L = L_s + w(t) L_u."""

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        task, config = self.task, self.task.config.method
        student_key, student_dropout, teacher_key, teacher_dropout = jax.random.split(key, 4)
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        images = shared.join(labeled["image"], unlabeled["image"])
        inside = shared.join(labeled["inside"], unlabeled["inside"])

        student, batch_stats = task.train_forward(
            params["student"],
            state.student.batch_stats,
            self._view(student_key, images),
            student_dropout,
            projection=self.with_pixels,
        )
        # In training mode too: dropout is part of the teacher's noise (their Sec. 2).
        teach = partial(
            task.train_forward,
            state.teacher.params,
            state.teacher.batch_stats,
            self._view(teacher_key, images),
            teacher_dropout,
            projection=False,
        )
        teacher, _ = teach()
        of_labeled, _ = shared.split(student, labeled["image"], unlabeled["image"])
        loss_s = task.supervised_loss(of_labeled.logits, of_labeled.aux, labeled["label"])
        counted = augment.nearest(inside, shared.size_of(student.logits))
        loss_u = shared.consistency(student.logits, jax.nn.softmax(teacher.logits), counted)
        length = config.mean_teacher.ramp_up * task.total_steps
        ramp = shared.ramp_up(state.step, config.supervised_only, length)
        total = loss_s + config.mean_teacher.weight * ramp * loss_u

        _, teacher_u = shared.split(teacher.logits, labeled["image"], unlabeled["image"])
        target = jax.nn.softmax(resize_aligned(teacher_u, shared.size_of(images)))
        inside_u = unlabeled["inside"]
        metrics = {"loss_s": loss_s, "loss_u": loss_u, "ramp_up": ramp}
        metrics |= shared.pseudo_label_metrics(
            shared.likeliest(target, inside_u), inside_u, unlabeled["label"]
        )
        pixels = None
        if self.with_pixels:
            # Up to the first dropout it is the pass above, which XLA does not compute again.
            certain = teach(dropout=False)[0].logits
            _, teacher_u = shared.split(certain, labeled["image"], unlabeled["image"])
            confident = shared.confident_labels(teacher_u, inside_u, config.pseudo_label.threshold)
            labels = shared.join(labeled["label"].astype(jnp.int32), confident)
            features = shared.bank_features(
                task, state, student, labeled["image"], unlabeled["image"]
            )
            pixels = shared.pixels(student, features, labels)
        return total, LossOutputs({"student": batch_stats}, metrics, pixels)

    def _view(self, key: Array, images: Array) -> Array:
        """Returns one noisy view of images (B, H, W, K), float32 in their units."""
        config = self.task.config
        photo_key, noise_key = jax.random.split(key)
        images = self.task.photometric(photo_key, images, config.method)
        std = config.method.mean_teacher.noise * jnp.asarray(config.data.std)
        return images + std[None, None, None] * jax.random.normal(noise_key, images.shape)

    def pseudo_labels(self, key: Array, state: TrainState, images: Array) -> Array:
        logits = self.task.eval_forward(state.teacher, images).logits
        return jnp.argmax(resize_aligned(logits, shared.size_of(images)), -1).astype(jnp.int32)


METHOD = MeanTeacher
