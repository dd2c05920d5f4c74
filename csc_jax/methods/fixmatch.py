"""FixMatch: the student's confident labels of the weak view teach it the strong view.

Sohn et al., NeurIPS 2020, in the form that UniMatch (Yang et al., CVPR 2023, Sec. 3.1, Eq. 1 to 3)
gives it for segmentation: no EMA in the pseudo-labels, a threshold of 0.95, and
L = (L_s + L_u) / 2, L_u averaged over all pixels. The strong view is that of the authors' code
(`config.method.unimatch_view`), whatever the other methods of a comparison have.

As in their code, labelled images and weak views make one batch in training mode, which makes the
labels and has no dropout, and strong views one of their own.

What differs: an image's CutMix partner is the next one of the batch, with the labels that it has
there (theirs: another crop of the same image, labelled in evaluation mode); colours are not rounded
to whole grey levels, and the blur is a Gaussian (theirs: Pillow's, three box blurs); strong views
go through the dropout of every row, where their network has none. An EMA of the student is kept for
evaluation, as in every row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax import augment, losses
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.models import resize_aligned
from csc_jax.state import TrainState


class FixMatch(Method):
    """L = (L_s + L_u) / 2."""

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        task, config = self.task, self.task.config.method
        view_key, weak_key, strong_key = jax.random.split(key, 3)
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        weak, inside = unlabeled["image"], unlabeled["inside"]
        size = shared.size_of(inside)
        strong, mask = shared.strong_view(view_key, weak, task)

        student, batch_stats = task.train_forward(
            params["student"],
            state.student.batch_stats,
            shared.join(labeled["image"], weak),
            weak_key,
            projection=self.with_pixels,
            dropout=False,
        )
        of_strong, batch_stats = task.train_forward(
            params["student"], batch_stats, strong, strong_key, projection=self.with_pixels
        )
        of_labeled, of_weak = shared.split(student, labeled["image"], weak)
        pseudo = shared.confident_labels(of_weak.logits, inside, config.fixmatch.threshold)
        pseudo_mixed = augment.mix(mask, pseudo)
        loss_s = task.supervised_loss(of_labeled.logits, of_labeled.aux, labeled["label"])
        loss_u = losses.unsupervised_cross_entropy(
            resize_aligned(of_strong.logits, size), pseudo_mixed, augment.mix(mask, inside)
        )
        active = state.step >= config.supervised_only
        total = (loss_s + jnp.where(active, 1.0, 0.0) * loss_u) / 2.0

        pixels = None
        if self.with_pixels:
            both = shared.join(of_labeled, of_strong)
            features = shared.bank_features(task, state, both, labeled["image"], weak, mask)
            labels = shared.join(labeled["label"].astype(jnp.int32), pseudo_mixed)
            pixels = shared.pixels(both, features, labels)
        metrics = {"loss_s": loss_s, "loss_u": loss_u}
        metrics |= shared.pseudo_label_metrics(pseudo, inside, unlabeled["label"])
        return total, LossOutputs({"student": batch_stats}, metrics, pixels)

    def pseudo_labels(self, key: Array, state: TrainState, images: Array) -> Array:
        logits = self.task.eval_forward(state.student, images).logits
        inside = jnp.ones(images.shape[:3], bool)
        return shared.confident_labels(logits, inside, self.task.config.method.fixmatch.threshold)


METHOD = FixMatch
