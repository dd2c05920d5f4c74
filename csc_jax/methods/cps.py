"""Cross pseudo supervision: two networks of different initialisation teach each other.

Chen et al., "Semi-supervised semantic segmentation with cross pseudo supervision", CVPR 2021:
Sec. 3, L = L_s + lambda L_cps, where L_s sums both networks' supervised losses and L_cps the cross
entropy of each on the arg max of the other, every pixel counted. Without CutMix L_cps runs over
labelled and unlabelled images; with it (Sec. 4, and the authors' code) over mixed unlabelled ones,
whose pseudo-labels are those of the two networks on the unmixed images, mixed alike. lambda is 1.5
on VOC and 6 on Cityscapes in the paper (1 and 5 in the code's files for CutMix at 1/8).

As in the code, labelled, unlabelled and mixed images are batches of their own, and those that make
pseudo-labels go through the networks in training mode and without dropout.

What differs: CutMix pastes one rectangle of half the image (decisions.md 23), theirs three smaller
ones, of images from another batch, which moves BatchNorm's statistics too; with CutMix the networks
learn under the dropout of every row, where theirs have none. Network, schedule and supervised loss
are those of every other row; what is evaluated is the EMA of the first network, the student, theirs
is that network itself (`eval.network`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csc_jax import augment, losses
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.models import Outputs, resize_aligned
from csc_jax.state import Network, TrainState

_OTHER = {"student": "second", "second": "student"}


class CPS(Method):
    """L = L_s + lambda L_cps over the networks "student" and "second"."""

    def init_companions(self, key: Array) -> dict[str, Network]:
        return {"second": self.task.init_network(key, projection=False)}

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        task, config = self.task, self.task.config.method
        mask_key, photo_key, teach_key, learn_key, labeled_key = jax.random.split(key, 5)
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        weak, inside = unlabeled["image"], unlabeled["inside"]
        size = shared.size_of(inside)
        networks = {"student": state.student, "second": state.companions["second"]}
        stats = {name: network.batch_stats for name, network in networks.items()}

        # Each pass follows the statistics of the one before it, in the order of the authors' code.
        mask = None
        if config.cps.cutmix:
            taught, stats = self._forward(
                state.trained, stats, weak, teach_key, dropout=False, projection=False
            )
            mask = augment.cutmix_mask(mask_key, weak.shape[0], size, config.cutmix)
            strong = augment.mix(mask, task.photometric(photo_key, weak, config))
            learnt_u, stats = self._forward(params, stats, strong, learn_key)
            learnt_l, stats = self._forward(params, stats, labeled["image"], labeled_key)
            own, inside_own = learnt_u, augment.mix(mask, inside)
        else:
            # One pass both teaches and learns.
            learnt_l, stats = self._forward(
                params, stats, labeled["image"], labeled_key, dropout=False
            )
            learnt_u, stats = self._forward(params, stats, weak, learn_key, dropout=False)
            own = {name: shared.join(learnt_l[name], learnt_u[name]) for name in networks}
            taught, inside_own = own, shared.join(labeled["inside"], inside)

        # Probabilities at full size, by the network that made them.
        soft = {
            name: jax.nn.softmax(resize_aligned(jax.lax.stop_gradient(out.logits), size))
            for name, out in taught.items()
        }
        loss_s, loss_u = {}, {}
        for name, out in learnt_l.items():
            loss_s[name] = task.supervised_loss(out.logits, out.aux, labeled["label"])
            pseudo = jnp.argmax(soft[_OTHER[name]], axis=-1)
            loss_u[name] = losses.unsupervised_cross_entropy(
                resize_aligned(own[name].logits, size), _mix(mask, pseudo), inside_own
            )
        loss_cps = loss_u["student"] + loss_u["second"]
        active = state.step >= config.supervised_only
        total = loss_s["student"] + loss_s["second"]
        total = total + jnp.where(active, config.cps.weight, 0.0) * loss_cps

        teacher = soft["second"]  # the student's
        if not config.cps.cutmix:
            teacher = shared.split(teacher, labeled["image"], weak)[1]
        metrics = {"loss_s": loss_s["student"], "loss_s_second": loss_s["second"]}
        metrics |= {"loss_u": loss_u["student"], "loss_u_second": loss_u["second"]}
        metrics |= shared.pseudo_label_metrics(
            shared.likeliest(teacher, inside), inside, unlabeled["label"]
        )
        pixels = None
        if self.with_pixels:
            confident = shared.likeliest(teacher, inside, config.pseudo_label.threshold)
            labels = shared.join(labeled["label"].astype(jnp.int32), _mix(mask, confident))
            student = shared.join(learnt_l["student"], learnt_u["student"])
            features = shared.bank_features(task, state, student, labeled["image"], weak, mask)
            pixels = shared.pixels(student, features, labels)
        return total, LossOutputs(stats, metrics, pixels)

    def _forward(
        self,
        params: dict[str, Any],
        stats: dict[str, Any],
        images: Array,
        key: Array,
        *,
        dropout: bool = True,
        projection: bool = True,
    ) -> tuple[dict[str, Outputs], dict[str, Any]]:
        """Runs both networks in training mode; returns outputs and new BatchNorm statistics."""
        outputs, new = {}, {}
        for i, name in enumerate(_OTHER):
            outputs[name], new[name] = self.task.train_forward(
                params[name],
                stats[name],
                images,
                jax.random.fold_in(key, i),
                projection=self.with_pixels and projection and name == "student",
                dropout=dropout,
            )
        return outputs, new

    def pseudo_labels(self, key: Array, state: TrainState, images: Array) -> Array:
        logits = self.task.eval_forward(state.companions["second"], images).logits
        return jnp.argmax(resize_aligned(logits, shared.size_of(images)), -1).astype(jnp.int32)


def _mix(mask: Array | None, x: Array) -> Array:
    return x if mask is None else augment.mix(mask, x)


METHOD = CPS
