"""CSC: the semi-supervised baseline with the contrastive module on top (Eq. 1, Algorithm 1).

Algorithm 1 line by line:

    feats, predictions of both halves       `base.loss`, which hands them on as `Pixels`
    L = L_p, or L_c once no class is empty  `contrast.bank_ready`, asked in `_contrastive_loss`
    feats_l, feats_u = Sampling(...)        `_sample`: `contrast.take_semi_hard`
    minimise L(feats_l), L(feats_u)         `_contrastive_loss`: `contrast.contrastive_loss`, a half
                                            at a time; `training.step.train_step` takes the step
    EMA update of the teacher               `base.update`
    B_tmp = f_cons(B, feats_l, feats_u)     `_update_bank`: `contrast.update_memory_bank`, Eq. 8
    accept if Separ falls                   … its strict gate, Eq. 9
    B_tmp = f_que(B, feats_l, feats_u)      … the enqueue step
    accept if Separ falls                   … its range gate (decisions.md 4)

The module needs only the base method's `Pixels`, so it also works on top of any other method:
`--config.method.name=cps --config.method.contrast=csc`. Fields switch its parts on one by one, as
in Tables I to IV:

    L_p alone            contrast.memory_bank=False
    + memory bank        contrast.top_n=0 contrast.consistency=False contrast.enqueue_gate=off
    + TopN                                contrast.consistency=False contrast.enqueue_gate=off
    + CSCM (all of CSC)  the defaults

What differs from the authors' program, where the paper says otherwise or nothing:

- It also enqueues the mean of each class over an image and over small regions of it.
- It draws a class of an image only if the class has more pixels than views; here one is enough.
- Its Separ_b also follows the Separ of a rejected bank; here only that of accepted ones
  (decisions.md 4).
- The teacher's mode and its first epoch (decisions.md 19a and 19b).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from csc_jax import contrast
from csc_jax.errors import UserError
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method, Pixels, Task
from csc_jax.methods.cutmix_mean_teacher import CutMixMeanTeacher
from csc_jax.state import Network, TrainState

BankUpdate = tuple[contrast.MemoryBank, dict[str, Array]]


class _Drawn(NamedTuple):
    """Pixels drawn from every image; features (B, C, slots, D) as the networks gave them."""

    queries: contrast.Samples  # the student's; V slots
    means: contrast.Samples  # the queries' own pixels, in the features that may enter the bank
    new: contrast.Samples  # what is to be enqueued; U_f slots


class CSC(Method):
    """L = L_base + lambda_c L_c, with L_p in place of L_c until the memory bank is ready.

    L_c is the sum of a loss over the labelled and one over the unlabelled queries.

    Attributes:
      base: the method below, built `with_pixels`; the paper's baseline where none is given.
      start: first step in which the module takes part.
    """

    def __init__(self, task: Task, base: Method | None = None):
        super().__init__(task, with_pixels=True)
        self.base = base or CutMixMeanTeacher(task, with_pixels=True)
        self.accumulates = self.base.accumulates
        self._check_absent_classes()
        # Before the teacher starts there are no pseudo-labels worth contrasting.
        self.start = max(task.config.contrast.start, task.config.method.supervised_only)

    def init_companions(self, key: Array) -> dict[str, Network]:
        return self.base.init_companions(key)

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        return self.base.optimizers()

    def init_bank(self) -> contrast.MemoryBank | None:
        config = self.task.config
        if not config.contrast.memory_bank:
            return None
        return contrast.init_memory_bank(
            self.task.num_classes, config.contrast.bank_size, config.model.projection_dim
        )

    def init_method_state(self) -> Any:
        return self.base.init_method_state()

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        base_key, sample_key = jax.random.split(key)
        total, outputs = self.base.loss(params, state, batch, base_key)
        assert outputs.pixels is not None  # the base was built `with_pixels`
        drawn = self._sample(sample_key, outputs.pixels)
        loss_c = self._contrastive_loss(state, drawn.queries, len(batch["labeled"]["image"]))
        total = total + self.task.config.contrast.weight * loss_c
        # What the bank is to see and no map, which would have to outlive the backward pass.
        carry = {"base": outputs.carry, "drawn": jax.lax.stop_gradient(drawn)}
        metrics = outputs.metrics | {"loss_c": loss_c}
        return total, outputs.replace(metrics=metrics, pixels=None, carry=carry)

    def pseudo_labels(self, key: Array, state: TrainState, images: Array) -> Array | None:
        return self.base.pseudo_labels(key, state, images)

    def update(
        self, state: TrainState, outputs: LossOutputs, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        base_outputs = outputs.replace(carry=outputs.carry["base"])
        state, metrics = self.base.update(state, base_outputs, key)
        if state.bank is None:
            return state, metrics
        bank, bank_metrics = self._update_bank(state, outputs.carry["drawn"])
        bank_metrics["bank_fill"] = contrast.bank_fill(bank)
        return state.replace(bank=bank), metrics | bank_metrics

    def _check_absent_classes(self) -> None:
        absent = self.task.config.contrast.absent_classes
        unknown = [c for c in absent if not 0 <= c < self.task.num_classes]
        if unknown:
            raise UserError(
                f"contrast.absent_classes names the class {unknown[0]}, but the data set has "
                f"classes 0 to {self.task.num_classes - 1}. Leave it out of the list."
            )

    def _sample(self, key: Array, pixels: Pixels) -> "_Drawn":
        """Sorts each image's pixels and draws all that is needed of them."""
        config = self.task.config.contrast

        def draw(
            key: Array, features: Array, bank_features: Array, labels: Array, predictions: Array
        ) -> _Drawn:
            order_key, enqueue_key = jax.random.split(key)
            order = contrast.order_by_class(order_key, labels, predictions, self.task.num_classes)
            semi_hard = contrast.take_semi_hard(order, config.views_per_class)
            random = contrast.take_random(enqueue_key, order, config.pixels_per_class)
            return _Drawn(
                queries=contrast.gather(features, *semi_hard),
                means=contrast.gather(bank_features, *semi_hard),
                new=contrast.gather(bank_features, *random),
            )

        return jax.vmap(draw)(
            jax.random.split(key, pixels.features.shape[0]),
            _flat(pixels.features),
            _flat(pixels.bank_features),
            _flat(pixels.labels),
            _flat(pixels.predictions),
        )

    def _contrastive_loss(
        self, state: TrainState, queries: contrast.Samples, labeled: int
    ) -> Array:
        """Returns the one loss that is in force, () float32; the others are not computed.

        The loss of Algorithm 1 is a sum of two, over the queries of the `labeled` images that have
        labels and over the others', each with the keys of its own half and the bank (decisions.md
        10a).
        """
        config = self.task.config.contrast
        labels = jnp.broadcast_to(_class_ids(queries.valid), queries.valid.shape)
        everything = contrast.normalize(queries.features), labels, queries.valid  # (B, C, V, …)
        halves = [everything]
        if config.halves == "separate" and labeled < len(labels):
            halves = shared.split(everything, labels[:labeled], labels[labeled:])  # for their sizes

        def loss(bank: contrast.MemoryBank | None, top_n: int | None) -> Array:
            losses = [
                contrast.contrastive_loss(
                    features.reshape(-1, features.shape[-1]),  # (B C V, D)
                    labels.reshape(-1),
                    valid.reshape(-1),
                    bank,
                    temperature=config.temperature,
                    top_n=top_n,
                    max_keys=config.max_keys,
                )
                for features, labels, valid in halves
            ]
            return sum(losses, jnp.zeros(()))

        def none() -> Array:
            return jnp.zeros(())

        def pixel_wise() -> Array:  # L_p, Eq. 5
            return loss(None, None)

        def with_bank() -> Array:  # L_c, Eq. 6
            return loss(state.bank, config.top_n or None)

        active = (state.step >= self.start).astype(jnp.int32)
        if state.bank is None:
            return jax.lax.switch(active, (none, pixel_wise))
        ready = self._ready(state.bank).astype(jnp.int32)
        return jax.lax.switch(active * (1 + ready), (none, pixel_wise, with_bank))

    def _ready(self, bank: contrast.MemoryBank) -> Array:
        config = self.task.config.contrast
        return contrast.bank_ready(bank, min_fill=config.min_fill, absent=config.absent_classes)

    def _update_bank(self, state: TrainState, drawn: "_Drawn") -> BankUpdate:
        """Runs the gated update, in the steps in which one is due."""
        config = self.task.config.contrast
        of_means = drawn.means

        def update(bank: contrast.MemoryBank) -> BankUpdate:
            images, dim = of_means.features.shape[0], of_means.features.shape[-1]
            labels = jnp.broadcast_to(_class_ids(of_means.valid), of_means.valid.shape)
            return contrast.update_memory_bank(
                bank,
                contrast.normalize(of_means.features.reshape(images, -1, dim)),  # (B, C V, D)
                labels.reshape(images, -1),
                of_means.valid.reshape(images, -1),
                drawn.new.features,
                drawn.new.valid,
                consistency=config.consistency,
                class_mean=config.class_mean,
                consistency_gate=config.consistency_gate,
                enqueue_gate=config.enqueue_gate,
                margin=config.margin,
                min_fill=config.min_fill,
                absent=config.absent_classes,
            )

        def leave(bank: contrast.MemoryBank) -> BankUpdate:
            nan = jnp.full((), jnp.nan)
            return bank, {
                "ready": self._ready(bank).astype(jnp.float32),
                "separation": contrast.separation(bank),
                "consistency_accepted": nan,
                "enqueue_accepted": nan,
            }

        due = (state.step >= self.start) & (state.step % config.update_every == 0)
        return jax.lax.cond(due, update, leave, state.bank)


def _flat(maps: Array) -> Array:
    """(B, h, w, ...) to (B, h w, ...)."""
    return maps.reshape(maps.shape[0], -1, *maps.shape[3:])


def _class_ids(valid: Array) -> Array:
    """(1, C, 1) int32 for (B, C, V) slots."""
    return jnp.arange(valid.shape[1], dtype=jnp.int32)[None, :, None]


METHOD = CSC
