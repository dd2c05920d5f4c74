"""U2PL: pixels too unsure for a pseudo-label still are negatives of the classes they are not.

Wang et al., "Semi-Supervised Semantic Segmentation Using Unreliable Pseudo-Labels", CVPR 2022.
Sec. 3.2: pseudo-labels of the least entropy, 80 to 100% of the pixels over training, their cross
entropy weighted by all pixels over kept ones. Sec. 3.3: anchors of a class are its pixels of
probability above 0.3, labelled or of low entropy; the positive is their centre; negatives come from
a queue per class (30,000 pixels, 50,000 for class 0) of labelled pixels of another class that rank
it among the 3 likeliest, and of unlabelled pixels of high entropy that rank it 4th to 20th; 256
anchors, 50 negatives each, temperature 0.5. L = L_s + lambda_u L_u + L_c.

What differs from the paper: steps stand for epochs in the schedules; the teacher's features and
ranks are those of evaluation mode; CutMix acts on each image with `method.cutmix` (their code: on
half of the batches). What differs from their code, where the paper is followed: a negative is any
pixel that the ranks name, where theirs keeps one only if its own (pseudo-)label is the class that
it is to be a negative of, which leaves almost none; the positive is the centre of the anchors,
theirs that of all sure pixels of the class, those of a probability below 0.3 included; a class's
anchors meet negatives of its own queue, where in theirs a class without a sure pixel in the batch
shifts the queues of those after it by one and leaves out the last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from csc_jax import augment, losses
from csc_jax.contrast import devices
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.models import resize_aligned
from csc_jax.parallel import order_statistics
from csc_jax.state import TrainState

_NEVER = 1e-10  # added to a probability before its logarithm (their code)


class Queues(struct.PyTreeNode):
    """First in, first out, one ring of pixels for each class; R places in all."""

    features: Array  # (R, D) float32, the rings one after the other
    count: Array  # (C,) int32, filled places
    cursor: Array  # (C,) int32, next place to be written, from the start of its ring


class Candidates(struct.PyTreeNode):
    """What each pixel (N) of a batch may be for each class."""

    anchors: Array  # (C, N) bool
    negatives: Array  # (C, N) bool


class U2PL(Method):
    """L = L_s + lambda_u L_u + weight L_c."""

    accumulates = False  # each part's loss would need the queues as the part before left them

    @property
    def projection(self) -> bool:
        return True

    def init_method_state(self) -> Queues:
        classes, dim = self.task.num_classes, self.task.config.model.projection_dim
        return Queues(
            features=jnp.zeros((sum(self._sizes()), dim)),
            count=jnp.zeros((classes,), jnp.int32),
            cursor=jnp.zeros((classes,), jnp.int32),
        )

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        task, config = self.task, self.task.config.method
        view_key, dropout_key, sample_key = jax.random.split(key, 3)
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        weak, inside = unlabeled["image"], unlabeled["inside"]
        size = shared.size_of(inside)
        progress = state.step / task.total_steps

        logits = task.eval_forward(state.teacher, weak).logits
        pseudo = shared.confident_labels(logits, inside, 0.0)  # every pixel but padding
        photo_key, mix_key = jax.random.split(view_key)
        mask = augment.cutmix_mask(mix_key, weak.shape[0], size, config.cutmix)
        strong = augment.mix(mask, task.photometric(photo_key, weak, config))
        pseudo_mixed = augment.mix(mask, pseudo)
        images = shared.join(labeled["image"].astype(jnp.float32), strong)
        student, batch_stats = task.train_forward(
            params["student"], state.student.batch_stats, images, dropout_key, projection=True
        )
        teacher = task.eval_forward(state.teacher, images, projection=True)
        of_labeled, of_strong = shared.split(student, labeled["image"], strong)
        of_strong_teacher = shared.split(teacher, labeled["image"], strong)[1]
        teacher_u = resize_aligned(of_strong_teacher.logits, size)  # (Bu, H, W, C)

        loss_s = task.supervised_loss(of_labeled.logits, of_labeled.aux, labeled["label"])
        first, last = config.u2pl.percentile
        reliable = reliable_labels(teacher_u, pseudo_mixed, first + (last - first) * progress)
        loss_u = losses.reweighted_cross_entropy(resize_aligned(of_strong.logits, size), reliable)

        alpha = config.u2pl.low_entropy * (1.0 - progress)
        small = shared.size_of(shared.projection(student))
        low, high = (augment.nearest(m, small) for m in by_entropy(teacher_u, pseudo_mixed, alpha))
        labels_l = augment.nearest(labeled["label"].astype(jnp.int32), small)
        labels_u = augment.nearest(pseudo_mixed, small)
        probabilities = jax.nn.softmax(augment.nearest(teacher.logits, small))
        candidates = self._candidates(probabilities, labels_l, labels_u, low, high)
        active = state.step >= config.supervised_only
        loss_c, queues = jax.lax.cond(
            active,
            self._contrast,
            lambda key, student, teacher, candidates, queues: (jnp.zeros(()), queues),
            sample_key,
            _flat(shared.projection(student)).astype(jnp.float32),
            _flat(shared.projection(teacher)),
            candidates,
            state.method_state,
        )
        total = loss_s + jnp.where(active, config.lambda_u, 0.0) * loss_u
        total = total + config.u2pl.weight * loss_c

        pixels = None
        if self.with_pixels:
            labels = shared.join(labeled["label"].astype(jnp.int32), reliable)
            features = shared.bank_features(task, state, student, labeled["image"], weak, mask)
            pixels = shared.pixels(student, features, labels)
        metrics = {"loss_s": loss_s, "loss_u": loss_u, "loss_u2pl": loss_c}
        metrics |= shared.pseudo_label_metrics(
            reliable, augment.mix(mask, inside), augment.mix(mask, unlabeled["label"])
        )
        return total, LossOutputs({"student": batch_stats}, metrics, pixels, queues)

    def pseudo_labels(self, key: Array, state: TrainState, images: Array) -> Array:
        logits = self.task.eval_forward(state.teacher, images).logits
        logits = resize_aligned(logits, shared.size_of(images))
        first, last = self.task.config.method.u2pl.percentile
        percentile = first + (last - first) * state.step / self.task.total_steps
        return reliable_labels(logits, jnp.argmax(logits, -1).astype(jnp.int32), percentile)

    def update(
        self, state: TrainState, outputs: LossOutputs, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        state, _ = super().update(state, outputs, key)
        fill = jnp.mean(outputs.carry.count / jnp.asarray(self._sizes()))
        return state.replace(method_state=outputs.carry), {"queue_fill": fill}

    def _sizes(self) -> list[int]:
        config = self.task.config.method.u2pl
        return [config.queue_size_first] + [config.queue_size] * (self.task.num_classes - 1)

    def _candidates(
        self, probabilities: Array, labels_l: Array, labels_u: Array, low: Array, high: Array
    ) -> Candidates:
        """Returns who may be anchor and who negative (their Sec. 3.3).

        Args:
          probabilities: (B, h, w, C), the teacher's, as `shared.join` has the halves.
          labels_l: (Bl, h, w) ground truth.
          labels_u: (Bu, h, w) pseudo-labels.
          low: (Bu, h, w) bool, of low entropy.
          high: (Bu, h, w) bool, of high entropy.
        """
        config = self.task.config.method.u2pl
        classes, known = self.task.num_classes, labels_l != losses.IGNORE
        likely, unlikely = config.ranks
        sure = shared.join(known, low)
        labels = shared.join(labels_l, labels_u)
        rank = jnp.argsort(jnp.argsort(-probabilities, axis=-1), axis=-1)  # 0 = the likeliest
        rank_l, rank_u = shared.split(rank, labels_l, labels_u)
        own = labels[..., None] == jnp.arange(classes)[None, None, None]
        anchors = own & sure[..., None] & (probabilities > config.anchor_probability)
        of_other = known[..., None] & ~shared.split(own, labels_l, labels_u)[0]
        negatives = shared.join(
            of_other & (rank_l < likely),
            high[..., None] & (rank_u >= likely) & (rank_u < unlikely),
        )
        return Candidates(anchors.reshape(-1, classes).T, negatives.reshape(-1, classes).T)

    def _contrast(
        self, key: Array, student: Array, teacher: Array, candidates: Candidates, queues: Queues
    ) -> tuple[Array, Queues]:
        """Returns L_c, () float32, and the queues with this batch's negatives.

        `student` and `teacher` are features (N, D); the gradient runs through the student's.
        """
        config, sizes = self.task.config.method.u2pl, self._sizes()
        teacher = jax.lax.stop_gradient(teacher)
        weight = candidates.anchors.astype(jnp.float32)  # (C, N)
        positives = weight @ teacher.astype(jnp.float32)  # (C, D), a sum yet
        # A pixel of any device may enter a queue or be drawn: each device is sent all of them once,
        # in the compute dtype, as the loops below would ask for them again and again.
        teacher, candidates = devices.on_every_device((teacher, candidates))
        queues = enqueue(queues, teacher.astype(jnp.float32), candidates.negatives, sizes)
        running = jnp.cumsum(candidates.anchors, axis=1, dtype=jnp.float32)
        count = running[:, -1]
        positives = positives / jnp.maximum(count, 1.0)[:, None]
        starts = jnp.asarray([sum(sizes[:c]) for c in range(len(sizes))], jnp.int32)
        anchor_key, negative_key = jax.random.split(key)
        classes = len(sizes)

        # The k-th of a class's anchors is where their running count passes k.
        drawn = jax.random.uniform(anchor_key, (classes, config.anchors)) * count[:, None]
        index = jax.vmap(lambda r, d: jnp.searchsorted(r, d, side="right"))(running, drawn)
        anchors = student[jnp.minimum(index, student.shape[0] - 1)]  # (C, M, D)
        shape = (classes, config.anchors, config.negatives)
        place = jax.random.uniform(negative_key, shape) * queues.count[:, None, None]
        place = jnp.minimum(place.astype(jnp.int32), queues.count[:, None, None] - 1)
        negatives = queues.features[starts[:, None, None] + jnp.maximum(place, 0)]  # (C, M, N, D)

        anchors, positives, negatives = map(_unit, (anchors, positives, negatives))
        to_positive = jnp.einsum("cmd,cd->cm", anchors, positives)
        to_negatives = jnp.einsum("cmd,cmnd->cmn", anchors, negatives)
        scores = jnp.concatenate([to_positive[..., None], to_negatives], -1) / config.temperature
        loss = -jnp.mean(jax.nn.log_softmax(scores)[..., 0], axis=1)  # (C,)
        present = count > 0
        counted = present & (queues.count > 0)
        total = jnp.sum(jnp.where(counted, loss, 0.0)) / jnp.maximum(jnp.sum(present), 1)
        return jnp.where(jnp.sum(present) > 1, total, 0.0), queues


def entropy_of(logits: Array) -> Array:
    """Returns the entropy, in nats, of the softmax over the last axis."""
    probabilities = jax.nn.softmax(logits)
    return -jnp.sum(probabilities * jnp.log(probabilities + _NEVER), axis=-1)


def reliable_labels(logits: Array, labels: Array, percentile: Array) -> Array:
    """Returns (B, H, W) labels, 255 where the entropy is at or above a percentile (Sec. 3.2).

    Args:
      logits: (B, H, W, C), the teacher's.
      labels: (B, H, W) int32; those of 255 take no part.
      percentile: () in [0, 100], of the entropy over labelled pixels.
    """
    entropy, known = entropy_of(logits), labels != losses.IGNORE
    limit = order_statistics.percentile(entropy, known, percentile)
    return jnp.where(known & (entropy < limit), labels, losses.IGNORE)


def by_entropy(logits: Array, labels: Array, alpha: Array) -> tuple[Array, Array]:
    """Returns which labelled pixels are among the `alpha` percent of least and of most entropy.

    Args:
      logits: (B, H, W, C), the teacher's.
      labels: (B, H, W) int32; those of 255 are neither.
      alpha: () in [0, 100].
    """
    entropy, known = entropy_of(logits), labels != losses.IGNORE
    low, high = (order_statistics.percentile(entropy, known, p) for p in (alpha, 100.0 - alpha))
    return known & (entropy <= low), known & (entropy >= high)


def enqueue(queues: Queues, features: Array, chosen: Array, sizes: list[int]) -> Queues:
    """Returns the queues with new pixels, in order, in place of the oldest.

    Args:
      queues: of C classes.
      features: (N, D).
      chosen: (C, N) bool, which of them enter the queue of a class.
      sizes: places of each class.
    """

    def one_class(
        carry: Array, per_class: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        chosen, cursor, size, start = per_class
        number = jnp.cumsum(chosen.astype(jnp.int32)) - 1  # of each chosen pixel
        new = number[-1] + 1
        written = chosen & (number >= new - size)  # the newest ones, if there are too many
        place = jnp.where(written, start + (cursor + number) % size, carry.shape[0])
        carry = carry.at[place].set(features, mode="drop")
        return carry, ((cursor + new) % size, new)

    limits = jnp.asarray(sizes, jnp.int32)
    starts = jnp.cumsum(limits) - limits
    filled, (cursor, new) = jax.lax.scan(
        one_class, queues.features, (chosen, queues.cursor, limits, starts)
    )
    count = jnp.minimum(queues.count + new, limits)
    return queues.replace(features=filled, cursor=cursor, count=count)


def _flat(features: Array) -> Array:
    """(B, h, w, D) to (B h w, D)."""
    return features.reshape(-1, features.shape[-1])


def _unit(x: Array) -> Array:
    """Unit length along the last axis; a zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-16))


METHOD = U2PL
