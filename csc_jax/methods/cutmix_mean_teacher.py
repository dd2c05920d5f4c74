"""The paper's semi-supervised baseline: an EMA teacher labels CutMix views (Eq. 1 to 4).

The teacher labels the weak view of an unlabelled image, the mask M drops unreliable pixels, images
and pseudo-labels are mixed by CutMix, and the student learns them together with the labelled batch
in one forward pass, so that BatchNorm sees both (decisions.md 13, 19, 23).

For the first `method.supervised_only` steps L_u has weight 0 and the teacher is a copy of the
student. The unlabelled images still pass through the network then, for the sake of one compiled
step, so BatchNorm's statistics know them from the start.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax import augment, losses
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.models import resize_aligned
from csc_jax.pseudo_labels import pseudo_labels, update_class_confidence
from csc_jax.state import TrainState


class CutMixMeanTeacher(Method):
    """L = L_s + lambda_u L_u."""

    def init_method_state(self) -> dict[str, Array]:
        return {"class_confidence": jnp.zeros((self.task.num_classes,))}

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        task, config = self.task, self.task.config.method
        mask_key, photo_key, mix_key, dropout_key = jax.random.split(key, 4)
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        weak, inside = unlabeled["image"], unlabeled["inside"]
        size = (inside.shape[1], inside.shape[2])  # (H, W)

        pseudo = self.pseudo_labels(mask_key, state, weak, inside)  # (Bu, H, W)
        mask = augment.cutmix_mask(mix_key, weak.shape[0], size, config.cutmix)
        strong = augment.mix(mask, task.photometric(photo_key, weak, config))
        pseudo_mixed, inside_mixed = augment.mix(mask, pseudo), augment.mix(mask, inside)

        images = shared.join(labeled["image"].astype(jnp.float32), strong)
        student, batch_stats = task.train_forward(
            params["student"],
            state.student.batch_stats,
            images,
            dropout_key,
            projection=self.with_pixels,
        )
        of_labeled, of_strong = shared.split(student, labeled["image"], strong)
        loss_s = task.supervised_loss(of_labeled.logits, of_labeled.aux, labeled["label"])
        loss_u = self._unsupervised_loss(
            resize_aligned(of_strong.logits, size), pseudo_mixed, inside_mixed
        )
        active = state.step >= config.supervised_only
        total = loss_s + jnp.where(active, config.lambda_u, 0.0) * loss_u

        pixels = None
        if self.with_pixels:
            features = shared.bank_features(task, state, student, labeled["image"], weak, mask)
            labels = shared.join(labeled["label"].astype(jnp.int32), pseudo_mixed)
            pixels = shared.pixels(student, features, labels)
        metrics = {"loss_s": loss_s, "loss_u": loss_u}
        metrics |= shared.pseudo_label_metrics(pseudo, inside, unlabeled["label"])
        carry = {"logits_l": jax.lax.stop_gradient(of_labeled.logits)}
        carry["labels_l"] = augment.nearest(labeled["label"], shared.size_of(student.logits))
        return total, LossOutputs({"student": batch_stats}, metrics, pixels, carry)

    def _unsupervised_loss(self, logits: Array, pseudo: Array, inside: Array) -> Array:
        """Returns L_u (Eq. 3, decisions.md 13a), () float32, of (B, H, W, C), (B, H, W) twice."""
        config = self.task.config.method
        if config.unsupervised_mean == "all":
            return losses.unsupervised_cross_entropy(logits, pseudo, inside)
        if config.pseudo_label.mode == "entropy":
            return losses.reweighted_cross_entropy(logits, pseudo)
        return losses.cross_entropy(logits, pseudo)

    def pseudo_labels(
        self, key: Array, state: TrainState, images: Array, inside: Array | None = None
    ) -> Array:
        """See `Method.pseudo_labels`; pixels outside `inside` (B, H, W) get none."""
        logits = self.task.eval_forward(state.teacher, images).logits
        logits = resize_aligned(logits, shared.size_of(images))
        return pseudo_labels(
            key,
            jax.nn.softmax(logits),
            jnp.ones(images.shape[:3], bool) if inside is None else inside,
            state.method_state["class_confidence"],
            state.step / self.task.total_steps,
            self.task.config.method.pseudo_label,
        )

    def update(
        self, state: TrainState, outputs: LossOutputs, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        state, metrics = super().update(state, outputs, key)
        confidence = update_class_confidence(
            state.method_state["class_confidence"],
            outputs.carry["logits_l"],
            outputs.carry["labels_l"],
            self.task.config.method.pseudo_label.confidence_ema,
        )
        return state.replace(method_state={"class_confidence": confidence}), metrics


METHOD = CutMixMeanTeacher
