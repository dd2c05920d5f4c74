"""UniMatch: FixMatch with two strong views and one of perturbed features.

Yang et al., "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation", CVPR
2023: Sec. 3.2 (feature perturbation: half of the channels of the backbone's features dropped, Eq.
4), Sec. 3.3 (two strong views, each with boxes of its own), and their code for the weights 0.5 and
2 x 0.25, the threshold of 0.95 and L = (L_s + L_u) / 2. The strong views are those of their code
(`config.method.unimatch_view`), whatever the other methods of a comparison have.

As in their code, labelled images and weak views make one batch in training mode, which makes the
labels and has no dropout but that of the perturbed features, and strong views one of their own.

What differs: an image's CutMix partner is the next one of the batch, with the labels that it has
there (theirs: another crop of the same image, labelled in evaluation mode); colours are not rounded
to whole grey levels, and the blur is a Gaussian (theirs: Pillow's, three box blurs); only the weak
images' features are perturbed (theirs: the labelled images' too, which the decoder's BatchNorm
alone sees); strong views go through the dropout of every row, where their network has none. An EMA
of the student is kept for evaluation, as in every row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax import augment, losses
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.models import Features, resize_aligned
from csc_jax.state import TrainState


class UniMatch(Method):
    """L = (L_s + w_s (L_strong1 + L_strong2) + w_f L_features) / 2."""

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        task, config = self.task, self.task.config.method
        first_key, second_key, feature_key, weak_key, strong_key = jax.random.split(key, 5)
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        weak, inside = unlabeled["image"], unlabeled["inside"]
        size = shared.size_of(inside)
        strong1, mask1 = shared.strong_view(first_key, weak, task)
        strong2, mask2 = shared.strong_view(second_key, weak, task)

        def with_perturbed_weak(features: Features) -> Features:
            keys = jax.random.split(feature_key, len(features.levels))

            def add(key: Array, x: Array) -> Array:
                of_labeled, of_weak = shared.split(x, labeled["image"], weak)
                dropped = drop_channels(key, of_weak, config.unimatch.feature_dropout)
                return shared.join(of_labeled, of_weak, dropped)

            levels = (add(key, x) for key, x in zip(keys, features.levels, strict=True))
            return features._replace(levels=tuple(levels))

        student, batch_stats = task.train_forward(
            params["student"],
            state.student.batch_stats,
            shared.join(labeled["image"], weak),
            weak_key,
            projection=self.with_pixels,
            dropout=False,
            perturb=with_perturbed_weak,
        )
        strong, batch_stats = task.train_forward(
            params["student"],
            batch_stats,
            shared.join(strong1, strong2),
            strong_key,
            projection=self.with_pixels,
        )
        of_labeled, of_weak, perturbed = shared.split(student, labeled["image"], weak, weak)
        of_strong1, of_strong2 = shared.split(strong, strong1, strong2)
        pseudo = shared.confident_labels(of_weak.logits, inside, config.unimatch.threshold)
        loss_s = task.supervised_loss(of_labeled.logits, of_labeled.aux, labeled["label"])

        def taught(logits: Array, mask: Array) -> Array:
            return losses.unsupervised_cross_entropy(
                resize_aligned(logits, size), augment.mix(mask, pseudo), augment.mix(mask, inside)
            )

        loss_u = taught(of_strong1.logits, mask1) + taught(of_strong2.logits, mask2)
        loss_f = taught(perturbed.logits, jnp.zeros_like(mask1))
        total_u = config.unimatch.strong_weight * loss_u + config.unimatch.feature_weight * loss_f
        active = state.step >= config.supervised_only
        total = (loss_s + jnp.where(active, 1.0, 0.0) * total_u) / 2.0

        pixels = None
        if self.with_pixels:
            both = shared.join(of_labeled, of_strong1)
            features = shared.bank_features(task, state, both, labeled["image"], weak, mask1)
            mixed = augment.mix(mask1, pseudo)
            labels = shared.join(labeled["label"].astype(jnp.int32), mixed)
            pixels = shared.pixels(both, features, labels)
        metrics = {"loss_s": loss_s, "loss_u": loss_u / 2.0, "loss_f": loss_f}
        metrics |= shared.pseudo_label_metrics(pseudo, inside, unlabeled["label"])
        return total, LossOutputs({"student": batch_stats}, metrics, pixels)

    def pseudo_labels(self, key: Array, state: TrainState, images: Array) -> Array:
        logits = self.task.eval_forward(state.student, images).logits
        inside = jnp.ones(images.shape[:3], bool)
        return shared.confident_labels(logits, inside, self.task.config.method.unimatch.threshold)


def drop_channels(key: Array, x: Array, rate: float) -> Array:
    """Sets channels of (B, h, w, K) to 0 with probability `rate` and scales the others up."""
    kept = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0], 1, 1, x.shape[3]))
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)


METHOD = UniMatch
