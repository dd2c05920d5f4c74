"""UniMatch V2: two strong views whose features lose complementary channels, taught by the EMA.

Yang, Zhao, Zhao, "UniMatch V2: Pushing the Limit of Semi-Supervised Semantic Segmentation", TPAMI
2025: Sec. 3.3 (one stream for image and feature perturbations) and 3.4 (complementary dropout: a
channel that one view loses is doubled in the other; half of the image pairs keep all channels,
exactly half of each batch in their code), their code for the threshold of 0.95 and
L = (L_s + (L_1 + L_2) / 2) / 2. The strong views are those of their code
(`config.method.unimatch_view`); their EMA decay is `--config.method.ema_decay=0.996`.

What differs: on a convolutional network the two levels that its decoder reads lose channels, each
its own; on a transformer all four lose the same ones, as in their code. Labelled and strong images
make one batch, as their network has no BatchNorm that could tell; an image's CutMix partner is the
next one of the batch (theirs: the batch in reverse order); colours are not rounded to whole grey
levels, and the blur is a Gaussian (theirs: Pillow's, three box blurs).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax import augment, losses
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.models import Features, resize_aligned
from csc_jax.state import TrainState


class UniMatchV2(Method):
    """L = (L_s + (L_1 + L_2) / 2) / 2."""

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        task, config = self.task, self.task.config.method
        first_key, second_key, feature_key, dropout_key = jax.random.split(key, 4)
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        weak, inside = unlabeled["image"], unlabeled["inside"]
        size = shared.size_of(inside)
        pseudo = self.pseudo_labels(key, state, weak, inside)
        strong1, mask1 = shared.strong_view(first_key, weak, task)
        strong2, mask2 = shared.strong_view(second_key, weak, task)

        def with_fewer_channels(features: Features) -> Features:
            views = [shared.split(x, labeled["image"], strong1, strong2) for x in features.levels]
            of_labeled, first, second = zip(*views, strict=True)
            share = config.unimatch_v2.dropped
            dropped = drop_in_levels(feature_key, first, second, share)
            levels = (shared.join(x, *pair) for x, pair in zip(of_labeled, dropped, strict=True))
            return features._replace(levels=tuple(levels))

        student, batch_stats = task.train_forward(
            params["student"],
            state.student.batch_stats,
            shared.join(labeled["image"].astype(jnp.float32), strong1, strong2),
            dropout_key,
            projection=self.with_pixels,
            perturb=with_fewer_channels,
        )
        of_labeled, of_strong1, of_strong2 = shared.split(
            student, labeled["image"], strong1, strong2
        )
        loss_s = task.supervised_loss(of_labeled.logits, of_labeled.aux, labeled["label"])

        def taught(logits: Array, mask: Array) -> Array:
            return losses.unsupervised_cross_entropy(
                resize_aligned(logits, size), augment.mix(mask, pseudo), augment.mix(mask, inside)
            )

        loss_u = (taught(of_strong1.logits, mask1) + taught(of_strong2.logits, mask2)) / 2.0
        active = state.step >= config.supervised_only
        total = (loss_s + jnp.where(active, 1.0, 0.0) * loss_u) / 2.0

        pixels = None
        if self.with_pixels:
            both = shared.join(of_labeled, of_strong1)
            features = shared.bank_features(task, state, both, labeled["image"], weak, mask1)
            mixed = augment.mix(mask1, pseudo)
            labels = shared.join(labeled["label"].astype(jnp.int32), mixed)
            pixels = shared.pixels(both, features, labels)
        metrics = {"loss_s": loss_s, "loss_u": loss_u}
        metrics |= shared.pseudo_label_metrics(pseudo, inside, unlabeled["label"])
        return total, LossOutputs({"student": batch_stats}, metrics, pixels)

    def pseudo_labels(
        self, key: Array, state: TrainState, images: Array, inside: Array | None = None
    ) -> Array:
        logits = self.task.eval_forward(state.teacher, images).logits
        counted = jnp.ones(images.shape[:3], bool) if inside is None else inside
        threshold = self.task.config.method.unimatch_v2.threshold
        return shared.confident_labels(logits, counted, threshold)


def drop_in_levels(
    key: Array, first: Sequence[Array], second: Sequence[Array], share: float
) -> list[tuple[Array, Array]]:
    """Returns levels whose two views of each image have lost complementary channels.

    Levels of one width lose the same ones, as the four of a transformer do in their code.

    Args:
      key: random key.
      first, second: (B, h, w, K) each, by level, of the two views of the same images.
      share: of the images that lose channels.
    """
    widths = list(dict.fromkeys(x.shape[-1] for x in first))
    share_key, *keys = jax.random.split(key, 1 + len(widths))
    dropped = draw_dropped(share_key, first[0].shape[0], share)
    return [
        drop_complementary(keys[widths.index(x1.shape[-1])], x1, x2, dropped)
        for x1, x2 in zip(first, second, strict=True)
    ]


def draw_dropped(key: Array, images: int, share: float) -> Array:
    """Returns which images lose channels, (B, 1, 1, 1) bool; int(B (1 - share)) do not."""
    kept = int(images * (1 - share))
    return (jax.random.permutation(key, images) >= kept).reshape(-1, 1, 1, 1)


def drop_complementary(key: Array, x1: Array, x2: Array, dropped: Array) -> tuple[Array, Array]:
    """Doubles each channel in one of two views and sets it to 0 in the other (their Eq. 7).

    Args:
      key: random key.
      x1: (B, h, w, K) features of the first view.
      x2: (B, h, w, K) features of the second.
      dropped: (B, 1, 1, 1) bool; False leaves both views of an image alone.
    """
    first = jax.random.bernoulli(key, 0.5, (x1.shape[0], 1, 1, x1.shape[3]))
    scale1 = jnp.where(dropped, jnp.where(first, 2.0, 0.0), 1.0).astype(x1.dtype)
    return x1 * scale1, x2 * (2.0 - scale1).astype(x2.dtype)


METHOD = UniMatchV2
