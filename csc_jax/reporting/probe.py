"""A few fixed images that are looked at again and again: Cons over training and the panels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csc_jax import contrast, data
from csc_jax.parallel.sharding import replicated
from csc_jax.state import Network, TrainState
from csc_jax.training.experiment import Experiment

PSEUDO_LABEL = "pseudo-label, hatched where M = 0"  # header of its column

_SALT = 0x9A9E1  # keeps the panels' random draws apart from the steps' own


class Probe:
    """Follows `config.train.panels` images of the evaluated split through training.

    Attributes:
      ids: of these images, which are spread over the split.
    """

    def __init__(self, experiment: Experiment, source: data.Source):
        config = experiment.config
        self._experiment = experiment
        self._lag = config.train.consistency_lag
        self._images = [source[i] for i in source.spread(config.train.panels)]
        self.ids = [example["id"] for example in self._images]
        # Features of an untrained projection head have no consistency worth measuring.
        self._measured = experiment.method.projection and bool(self._images)
        self._crops = _centre_crops(self._images, config.data.crop_size) if self._measured else None
        self._then: jax.Array | np.ndarray | None = None
        method = experiment.method

        def features(student: Network, images: jax.Array) -> jax.Array | None:
            projection = method.task.eval_forward(student, images, projection=True).projection
            return None if projection is None else projection.astype(jnp.float32)

        # Replicated, so that each of several processes can read them.
        whole = replicated(experiment.mesh)
        self._features = jax.jit(features, out_shardings=whole)
        self._consistency = jax.jit(contrast.consistency, out_shardings=whole)
        self._pseudo_labels = jax.jit(method.pseudo_labels, out_shardings=whole)

    def measure(self, step: int, state: TrainState) -> float | None:
        """Returns Cons (Eq. 7) at every T-th step, T = `train.consistency_lag`; else None.

        A run that starts or resumes on a multiple of T recomputes the features to compare with;
        elsewhere it takes them from the checkpoint (`features_to_keep`, `resume`).
        """
        if not self._measured or step % self._lag:
            return None
        now = self._features(state.student, self._crops)
        then, self._then = self._then, now
        return None if then is None or now is None else float(self._consistency(now, then))

    def features_to_keep(self, step: int) -> jax.Array | np.ndarray | None:
        """Returns what a checkpoint of this step must hold for a restart to go on measuring."""
        return self._then if step % self._lag else None

    def resume(self, features: np.ndarray | None, ids: list[str] | None) -> None:
        """Takes what `features_to_keep` gave, unless it is of other images than `ids`.

        Cons then begins anew, as the images follow from fields that may change within a run.
        """
        self._then = features if ids == self.ids else None

    def panel(self, state: TrainState) -> dict[str, list[np.ndarray]]:
        """Returns the columns of a panel: header -> one picture an image."""
        experiment = self._experiment
        name = experiment.config.eval.network
        network = getattr(state, name)
        key = jax.random.fold_in(jax.random.key(_SALT), state.step)
        columns: dict[str, list[np.ndarray]] = {
            "image": [example["image"] for example in self._images],
            "ground truth": [example["label"] for example in self._images],
            name: [],
        }
        for example in self._images:
            columns[name].append(experiment.predict_image(network, example["image"]))
            pseudo = self._pseudo_labels(key, state, example["image"][None])
            if pseudo is not None:
                column = columns.setdefault(PSEUDO_LABEL, [])
                column.append(np.asarray(pseudo)[0].astype(np.uint8))
        return columns


def _centre_crops(examples: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """(P, h, w, K), the middle of each image at the training crop's size."""
    crops = []
    for example in examples:
        image = example["image"]
        height, width = image.shape[:2]
        if height < size[0] or width < size[1]:
            pad = ((0, max(size[0] - height, 0)), (0, max(size[1] - width, 0)), (0, 0))
            image = np.pad(image, pad, mode="edge")
            height, width = image.shape[:2]
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        crops.append(image[top : top + size[0], left : left + size[1]])
    return np.stack(crops)
