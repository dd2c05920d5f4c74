"""What a method provides to the train step, and what it is given.

The step knows none of the methods. Each step calls, inside one jitted function,

    loss, outputs = method.loss(params, state, batch, key)     differentiated by `params`
    …one optimizer step on every trained network…
    state, metrics = method.update(state, outputs, key)        EMA, memory bank, queues

so a method may train several networks (`companions`), give each an optimizer of its own
(`optimizers`) and keep arrays of its own (`method_state`).
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import optax
from flax import struct
from jax import Array
from ml_collections import ConfigDict

from csc_jax import augment, losses
from csc_jax.config import bands
from csc_jax.contrast import MemoryBank, devices
from csc_jax.models import Features, Outputs, Segmenter, initialize, resize_aligned
from csc_jax.optimizer import make_optimizer
from csc_jax.state import Network, TrainState, teacher_decay, update_ema

Batch = dict[str, dict[str, Array]]


class Pixels(struct.PyTreeNode):
    """What a contrastive module on top of a method needs, at the size of the projection.

    Labelled and unlabelled images in the order of `shared.join`.
    """

    features: Array  # (B, h, w, D) in the compute dtype, the student's projection, not normalised
    bank_features: Array  # (B, h, w, D) likewise, without gradient; what may enter the bank
    labels: Array  # (B, h, w) int32, ground truth or pseudo-label, 255 = neither
    predictions: Array  # (B, h, w) int32, the student's


class LossOutputs(struct.PyTreeNode):
    """What a loss hands on beside its value."""

    batch_stats: dict[str, Any]  # new BatchNorm statistics of every trained network, by name
    metrics: dict[str, Array]  # () float32 each
    pixels: Pixels | None = None  # present where the method was built with `with_pixels`
    carry: Any = None  # what `update` needs; the method's own business


@dataclasses.dataclass(frozen=True)
class Task:
    """What every method is built from; static, no arrays."""

    config: ConfigDict  # of the run, every length in steps
    model: Segmenter  # the network, without variables
    num_classes: int  # C
    total_steps: int  # optimizer steps of the whole run
    class_weights: tuple[float, ...] = ()  # C of L_s, see `class_weights.py`; () = all alike

    def init_network(self, key: Array, *, projection: bool) -> Network:
        """Returns a freshly initialised network; `projection` says whether it has that head."""
        variables = initialize(self.model, key, projection=projection)
        return Network(variables["params"], variables.get("batch_stats", {}))

    def photometric(self, key: Array, images: Array, view: ConfigDict) -> Array:
        """Returns images (B, H, W, K) with other colours or brightness, and blurred, float32.

        Args:
          key: random key.
          images: in their units.
          view: section of the config with the probabilities: `method`, `method.unimatch_view`.
        """
        data = self.config.data
        if bands.keeps_values(data):
            return augment.photometric_bands(key, images, view, data.std)
        return augment.photometric(key, images, view)

    def normalize(self, images: Array) -> Array:
        """Maps images (B, H, W, K) in their units to what the network takes, float32."""
        return augment.normalize_images(images, self.config.data.mean, self.config.data.std)

    def train_forward(
        self,
        params: Any,
        batch_stats: Any,
        images: Array,
        key: Array,
        *,
        projection: bool,
        dropout: bool = True,
        perturb: Callable[[Features], Features] | None = None,
    ) -> tuple[Outputs, Any]:
        """Runs a network in training mode on images (B, H, W, K) in their units.

        A pass that makes pseudo-labels is one without `dropout` (decisions.md 19c). `perturb`
        changes the backbone's features, see `Segmenter`. Returns its outputs and the new
        BatchNorm statistics, {} for a network without.
        """
        model = self.model if dropout else self.model.without_dropout()
        outputs, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            self.normalize(images),
            train=True,
            projection=projection,
            perturb=perturb,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        # Or kernels that `parallel.fsdp` splits might have XLA split feature maps by channels, too.
        return devices.split_over_devices(outputs), updates.get("batch_stats", {})

    def eval_forward(self, network: Network, images: Array, *, projection: bool = False) -> Outputs:
        """Runs a network in evaluation mode on images (B, H, W, K), without gradient."""
        variables = jax.lax.stop_gradient(network.variables)
        outputs = self.model.apply(
            variables, self.normalize(images), train=False, projection=projection
        )
        return cast(Outputs, outputs)

    def supervised_loss(self, logits: Array, aux: Array | None, labels: Array) -> Array:
        """Returns L_s (Eq. 2, decisions.md 21), the auxiliary head's weighted loss included.

        Either head's loss is what the fields of `config.loss` and the class weights say.

        Args:
          logits: (B, h, w, C) float32 at any stride.
          aux: (B, h', w', C) float32, or None where the network has no auxiliary head.
          labels: (B, H, W) ground truth.
        """
        config, size = self.config.loss, (labels.shape[1], labels.shape[2])

        def loss(scores: Array) -> Array:
            scores, weights = resize_aligned(scores, size), self.class_weights
            if config.name == "ohem":
                found = losses.ohem_cross_entropy(
                    scores,
                    labels,
                    threshold=config.ohem_threshold,
                    min_kept=config.ohem_min_kept,
                    class_weights=weights,
                )
            else:
                found = losses.cross_entropy(
                    scores, labels, class_weights=weights, focal_gamma=config.focal_gamma
                )
            if config.dice_weight:
                found = found + config.dice_weight * losses.dice_loss(scores, labels)
            return found

        return loss(logits) + (0.0 if aux is None else config.aux_weight * loss(aux))


class Method(abc.ABC):
    """A row of the paper's tables. Subclasses are pure: all that changes is in the TrainState.

    Attributes:
      task: what it is built from.
      with_pixels: hand on `Pixels` for a contrastive module on top; the student then carries the
        projection head.
      accumulates: whether a batch may come in parts (`train.accumulate`): `LossOutputs.carry` holds
        arrays of one row an image, and `update` takes those of all parts as one batch.
    """

    accumulates = True

    def __init__(self, task: Task, *, with_pixels: bool = False):
        self.task = task
        self.with_pixels = with_pixels

    @property
    def projection(self) -> bool:
        """Whether student and teacher carry the projection head."""
        return self.with_pixels

    def init_companions(self, key: Array) -> dict[str, Network]:
        """Returns the trained networks beside the student, by name."""
        return {}

    def init_bank(self) -> MemoryBank | None:
        """Returns the empty memory bank, or None."""
        return None

    def init_method_state(self) -> Any:
        """Returns the arrays that the method owns beside networks and bank."""
        return {}

    def trainable(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns what learns of the parameters of trained networks, by name.

        It is all of them, or with `model.freeze_backbone` what is not under "backbone": that gets
        no gradient, and nothing is kept for it in the optimizer's state.
        """
        if not self.task.config.model.freeze_backbone:
            return params
        return {
            network: {name: tree for name, tree in parts.items() if name != "backbone"}
            for network, parts in params.items()
        }

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """Returns one optimizer per trained network; by default the configured one for each."""
        names = ["student", *jax.eval_shape(self.init_companions, jax.random.key(0))]
        config = self.task.config.optimizer
        return {name: make_optimizer(config, self.task.total_steps) for name in names}

    @abc.abstractmethod
    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        """Returns the total loss, () float32, and what goes with it.

        Args:
          params: parameters of every trained network by name; "student" is always there.
          state: the state before this step, from which everything but `params` is read.
          batch: {"labeled", "unlabeled"} -> {"image" (B, H, W, K), "label" (B, H, W) uint8,
            "inside" (B, H, W) bool, False on padding}. The unlabelled labels may be used for
            metrics only.
          key: random key of this step.
        """

    def pseudo_labels(self, key: Array, state: TrainState, images: Array) -> Array | None:
        """Returns what the method would teach on unlabelled images, for the panels, or None.

        Args:
          key: random key.
          state: the state.
          images: (B, H, W, K).

        Returns:
          (B, H, W) int32 class ids, 255 where the mask M drops the pixel (Eq. 4a).
        """
        return None

    def update(
        self, state: TrainState, outputs: LossOutputs, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """Returns the state after everything that follows the optimizer step, and more metrics.

        `state` holds the new parameters and still the old `step`. By default the teacher follows
        the student, from the end of `method.supervised_only` on (decisions.md 19).
        """
        config = self.task.config.method
        decay = teacher_decay(state.step, config.supervised_only, config.ema_decay)
        return state.replace(teacher=update_ema(state.teacher, state.student, decay)), {}
