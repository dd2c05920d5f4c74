"""What training, evaluation and prediction are assembled from, checked before anything compiles."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from csc_jax import data, evaluation, methods, models
from csc_jax.class_weights import class_weights
from csc_jax.config import checks as config_checks
from csc_jax.data import transforms
from csc_jax.errors import UserError
from csc_jax.models.weights import load_pretrained
from csc_jax.optimizer import combine
from csc_jax.parallel import sharding
from csc_jax.state import Network, TrainState
from csc_jax.training.step import abstract_state, compile_init


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A method on a network on a mesh, ready to be initialised or restored."""

    config: ConfigDict  # resolved: every length in steps
    class_names: tuple[str, ...]
    palette: np.ndarray  # (C, 3) uint8 RGB
    mesh: Mesh
    method: methods.Method
    tx: optax.GradientTransformation
    predict: Callable[[Any, np.ndarray], jax.Array]  # see evaluation.make_predictor
    predict_logits: Callable[[Any, np.ndarray], jax.Array]  # likewise

    @property
    def title(self) -> str:
        """Method, data set and seed, for the titles of pictures."""
        method = self.config.method
        name = method.name if method.contrast == "none" else f"{method.name}+{method.contrast}"
        return f"{name} on {self.config.data.name}, seed {self.config.seed}"

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def load_pretrained(self) -> dict[str, Any]:
        """Returns the arrays that `config.model.pretrained` has for a network; {} for "none".

        Raises:
          UserError: no such file, weights of another network, or none for a frozen backbone.
        """
        source = self.config.model.pretrained
        if source == "none":
            if self.config.model.freeze_backbone:
                raise UserError(
                    "model.freeze_backbone is True, but model.pretrained is 'none': the backbone "
                    "would stay random. Give its weights with --config.model.pretrained=FILE, or "
                    "set --config.model.freeze_backbone=False."
                )
            return {}
        network = jax.eval_shape(
            lambda key: self.method.task.init_network(key, projection=self.method.projection),
            jax.random.key(0),
        )
        return load_pretrained(source, network.variables)

    def compile_init(self, pretrained: dict[str, Any] | None = None) -> Callable[[], TrainState]:
        """Returns the jitted function that makes the state before step 0.

        Args:
          pretrained: what `load_pretrained` returned; None draws every weight.
        """
        return compile_init(self.method, self.tx, self.mesh, pretrained)

    def abstract_state(self) -> TrainState:
        """Returns the state's shapes and shardings, to restore a checkpoint into."""
        return abstract_state(self.method, self.tx, self.mesh)

    def predict_image(self, network: Network, image: np.ndarray) -> np.ndarray:
        """Returns the class ids, (H, W) uint8, of one image (H, W, K) as in `data.Source`.

        All of several processes call it with the same image.
        """
        return self._of_one(self.predict, network, image)

    def segment(self, network: Network, image: np.ndarray) -> np.ndarray:
        """Returns the class ids, (H, W) uint8, of an image (H, W, K) of any size.

        The network sees it at `data.image_size`, as the images that it was trained on; class ids at
        its own size follow from the enlarged logits.
        """
        size = tuple(self.config.data.image_size)
        if not any(size) or size == image.shape[:2]:
            return self.predict_image(network, image)
        small = transforms.resize_image(image, size)
        logits = self._of_one(self.predict_logits, network, small)
        return evaluation.enlarge(logits, image.shape[:2])

    def _of_one(
        self,
        predict: Callable[[Any, np.ndarray], jax.Array],
        network: Network,
        image: np.ndarray,
    ) -> np.ndarray:
        # The predictor wants a batch that divides by the mesh.
        batch = np.repeat(image[None], self.mesh.size, axis=0)
        height, width, _ = image.shape
        return sharding.fetch(predict(network.variables, batch))[0, :height, :width]

    def evaluate(
        self,
        network: Network,
        source: data.Source,
        on_image: Sequence[evaluation.OnImage] = (),
        before_batch: Callable[[], None] = lambda: None,
    ) -> evaluation.Scores:
        """Scores a network on a split in the way that `config.eval` says.

        `batch.eval` is rounded up to a multiple of the devices, each of which predicts as many
        images. `before_batch` may raise to end it early, on all processes at the same batch; for
        `on_image` see `evaluation.evaluate`.
        """
        batch_size = -(-self.config.batch.eval // self.mesh.size) * self.mesh.size

        def batches() -> Iterator[dict[str, Any]]:
            for batch in data.eval_batches(source, batch_size):
                before_batch()
                yield batch

        cropped = self.config.eval.mode == "center_crop"
        return evaluation.evaluate(
            self.predict,
            network.variables,
            batches(),
            self.num_classes,
            on_image=on_image,
            note="center_crop" if cropped else "",  # decisions.md 25
        )


def build(
    config: ConfigDict,
    class_names: tuple[str, ...],
    palette: np.ndarray,
    devices: Sequence[jax.Device] | None = None,
    labeled_pixels: Sequence[int] = (),
) -> Experiment:
    """Assembles an experiment; touches the accelerator only to count its devices.

    Args:
      config: valid and resolved.
      class_names: of the data set.
      palette: (C, 3) uint8 RGB, for drawing.
      devices: to choose the mesh from; None = all that JAX sees.
      labeled_pixels: of each class in the images that are trained on with labels, for
        `loss.class_weights`; () where nothing is trained.

    Raises:
      UserError: a field that does not fit the data set, the devices or another field.
    """
    num_classes = len(class_names)
    model = models.build(
        config.model, num_classes, aux_head=config.loss.aux_weight > 0, bands=config.data.bands
    )
    models.check_crop(config.model.backbone, model, config.data.crop_size)
    weights = class_weights(config.loss.class_weights, num_classes, labeled_pixels)
    task = methods.Task(config, model, num_classes, config.train.steps, weights)
    method = methods.build(task)
    mesh = sharding.make_mesh(config.parallel.devices, config.parallel.fsdp, devices)
    sharding.check_batch_sizes(config, mesh)

    def logits(variables: dict[str, Any], images: jax.Array) -> jax.Array:
        # Without projection head (decisions.md 16); `jit` drops its parameters, unused.
        network = Network(variables["params"], variables.get("batch_stats", {}))
        return task.eval_forward(network, images, projection=False).logits

    make_predictor = functools.partial(
        evaluation.make_predictor,
        logits,
        model.logits_size,
        num_classes=num_classes,
        mode=config.eval.mode,
        window=tuple(config.eval.window),
        mesh=mesh,
        size_multiple=config.eval.size_multiple,
        patch=model.patch,
        fill=tuple(config.data.mean),
        scales=tuple(config.eval.scales),
        flip=config.eval.flip,
    )
    tx = combine(method.optimizers())
    predictors = make_predictor(), make_predictor(as_logits=True)
    return Experiment(config, tuple(class_names), palette, mesh, method, tx, *predictors)


def load_data(config: ConfigDict) -> data.Dataset:
    """Checks the config and loads, or first prepares, its data set.

    Raises:
      UserError: a field out of range, or anything wrong with the user's files.
    """
    config_checks.validate(config)
    return data.load(config.data)
