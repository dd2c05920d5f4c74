"""A trained network that segments images, wherever its weights came from."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from csc_jax.data import transforms
from csc_jax.deploy.description import Description
from csc_jax.deploy.images import as_image
from csc_jax.errors import UserError
from csc_jax.evaluation import enlarge_planes
from csc_jax.reporting import visualize


@dataclasses.dataclass(frozen=True)
class Result:
    """One image, segmented.

    Attributes:
      image: (H, W, 3) uint8 RGB; or (H, W, K) where the network was trained on K bands.
      classes: (H, W) uint8 class ids.
      confidence: (H, W) float32, probability of that class, in [0, 1].
      probabilities: (H, W, C) float32 of all classes; None where they were not asked for.
      class_names: C names.
      palette: (C, 3) uint8 RGB.
    """

    image: np.ndarray
    classes: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray | None
    class_names: tuple[str, ...]
    palette: np.ndarray

    def overlay(self, *, legend: bool = False) -> np.ndarray:
        """Returns the image under the classes' colours, (H, W, 3) uint8 RGB.

        Args:
          legend: whether the names of the classes are added below, which makes it taller.
        """
        blend = visualize.overlay(self.image, self.classes, self.palette)
        if legend:
            return visualize.with_legend(blend, self.palette, self.class_names)
        return blend


class Model:
    """A network and how it is applied to images; `load` makes one.

    Attributes:
      description: classes, colours, config and step of the training.
      arrays: the weights by name, float32 on the host.
    """

    def __init__(
        self,
        description: Description,
        predict_scores: Callable[[np.ndarray], jax.Array],
        arrays: Mapping[str, np.ndarray] | None = None,
    ):
        """Takes what `load` has found.

        Args:
          description: of the network.
          predict_scores: images (B, H, W, K), all of one size -> (B, H', W', C) float32 of
            which the upper left (H, W) is meant: logits, or sums of probabilities where
            `config.eval` has flips or scales (`make_predictor` with `as_logits`).
          arrays: the weights by name.
        """
        self.description = description
        self.arrays = dict(arrays or {})
        self._predict_scores = predict_scores
        views = description.config.eval
        self._summed = bool(views.flip) or tuple(views.scales) != (1.0,)

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self.description.class_names

    @property
    def palette(self) -> np.ndarray:
        """(C, 3) uint8 RGB."""
        return self.description.palette

    @overload
    def predict(
        self, images: list[Any] | tuple[Any, ...], *, probabilities: bool = False
    ) -> list[Result]: ...

    @overload
    def predict(self, images: Any, *, probabilities: bool = False) -> Result: ...

    def predict(self, images: Any, *, probabilities: bool = False) -> Result | list[Result]:
        """Segments an image, or a list of images of any sizes.

        The program is compiled for each size of images, or for each size that
        `eval.size_multiple` pads them to. Of a list, `batch.eval` images of one size run together,
        those left over one by one.

        Args:
          images: a path; an image of Pillow; an array of uint8, (H, W, 3) RGB, (H, W, 4) or grey
            (H, W); or a list of these. For a network that was trained on images that keep their
            values, an array is (H, W, K), or (H, W) for one band, of their type and in their units.
          probabilities: whether results hold those of all classes, 4 C bytes a pixel.

        Returns:
          One result, or a list of them in the order of the images.

        Raises:
          UserError: an image that cannot be read, or is of another type or has other bands than
            those of the training; of a list, it says which.
        """
        data = self.description.config.data
        if not isinstance(images, (list, tuple)):
            return self._results([as_image(images, data)], probabilities)[0]
        pictures = []
        for index, image in enumerate(images):
            try:
                pictures.append(as_image(image, data))
            except UserError as error:
                raise UserError(f"Image {index} of {len(images)}: {error}") from error
        results: list[Result | None] = [None] * len(pictures)
        for group in self._groups(pictures):
            found = self._results([pictures[index] for index in group], probabilities)
            for index, result in zip(group, found, strict=True):
                results[index] = result
        return [result for result in results if result is not None]

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Returns the network's own (B, H, W, C) float32 of (B, H, W, K), sizes as it sees.

        Unlike `predict`, images are not resized to `data.image_size`.
        """
        height, width = images.shape[1:3]
        scores = self._predict_scores(images)
        return np.asarray(_probabilities(scores, self._summed))[:, :height, :width]

    def _groups(self, pictures: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Yields indices of images that run together."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, picture in enumerate(pictures):
            by_size.setdefault(self._size(picture), []).append(index)
        together = self.description.config.batch.eval
        for indices in by_size.values():
            whole = len(indices) // together * together
            yield from (indices[i : i + together] for i in range(0, whole, together))
            yield from ([index] for index in indices[whole:])

    def _size(self, picture: np.ndarray) -> tuple[int, int]:
        """Returns the (height, width) px at which the network sees an image."""
        height, width = self.description.config.data.image_size
        return (height, width) if height else (picture.shape[0], picture.shape[1])

    def _results(self, pictures: list[np.ndarray], probabilities: bool) -> list[Result]:
        """Segments images that the network sees at one size."""
        size = self._size(pictures[0])
        seen = [p if p.shape[:2] == size else transforms.resize_image(p, size) for p in pictures]
        scores = self._predict_scores(np.stack(seen))
        own = all(picture.shape[:2] == size for picture in pictures)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        if own and not probabilities:
            classes, confidence = jax.device_get(_decide(scores, self._summed))
            found = [
                (c[: size[0], : size[1]], p[: size[0], : size[1]], None)
                for c, p in zip(classes, confidence, strict=True)
            ]
        else:
            for picture, one in zip(pictures, jax.device_get(scores), strict=True):
                planes = enlarge_planes(one[: size[0], : size[1]], picture.shape[:2])
                found.append(_decide_on_host(planes, self._summed, keep=probabilities))
        return [
            Result(picture, *values, self.class_names, self.palette)
            for picture, values in zip(pictures, found, strict=True)
        ]


@jax.jit(static_argnums=1)
def _decide(scores: jax.Array, summed: bool) -> tuple[jax.Array, jax.Array]:
    """(B, H, W, C) -> class ids (B, H, W) uint8 and their probabilities (B, H, W) float32."""
    classes = jnp.argmax(scores, axis=-1).astype(jnp.uint8)
    return classes, _probabilities(scores, summed).max(axis=-1)


@jax.jit(static_argnums=1)
def _probabilities(scores: jax.Array, summed: bool) -> jax.Array:
    """(B, H, W, C) logits, or sums of probabilities -> probabilities, float32."""
    if summed:
        return scores / jnp.sum(scores, axis=-1, keepdims=True)
    return jax.nn.softmax(scores)


def _decide_on_host(
    planes: Iterator[np.ndarray], summed: bool, keep: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Does what `_decide` does, a class at a time, so that no more than asked for is in memory.

    Args:
      planes: (H, W) float32 of each class: logits or sums of probabilities.
      summed: whether they are sums of probabilities.
      keep: whether the probabilities of all classes are returned.

    Returns:
      Class ids (H, W) uint8, confidence (H, W) float32, and probabilities (H, W, C) or None.
    """
    first = next(planes)
    classes, best = np.zeros(first.shape, np.uint8), first
    total = first.copy() if summed else np.ones_like(first)  # in units of exp(best) for logits
    kept = [first]
    for index, plane in enumerate(planes, start=1):
        classes[plane > best] = index
        highest = np.maximum(best, plane)
        if summed:
            total += plane
        else:
            total = total * np.exp(best - highest) + np.exp(plane - highest)
        best = highest
        if keep:
            kept.append(plane)
    confidence = best / total if summed else 1 / total
    if not keep:
        return classes, confidence, None
    probabilities = np.stack(kept, axis=-1)
    if not summed:
        probabilities = np.exp(probabilities - best[..., None])
    return classes, confidence, probabilities / total[..., None]
