"""Active learning: which images to label next.

Two networks, the student and its EMA teacher, see each unlabelled image. It counts for more

- the less certain the teacher is: the mean over pixels of its entropy (uncertainty sampling, Lewis
  and Gale, "A sequential algorithm for training text classifiers", SIGIR 1994), and the more often
  both disagree (query by committee, Seung et al., COLT 1992);
- the farther it is from every image that is labelled or ranked before it, in the network's features
  (the k-center selection of Sener and Savarese, "Active learning for convolutional neural networks:
  a core-set approach", ICLR 2018).

The product of both is the weighted k-center rule: greedily take the image with the largest weight
times distance (Dyer and Frieze, "A simple heuristic for the p-centre problem", Operations Research
Letters 1985). It has no weight to choose, and no two of many neighbouring frames of a video come
first, as their distance is nearly zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from csc_jax.methods import Task
from csc_jax.state import Network

MOST_GREEDY = 1000  # images taken one by one; each costs a pass over the features of all
_CHUNK = 1024  # labelled images whose distances are in memory at a time


class Measures(NamedTuple):
    """What is kept of images; the leading axis counts them."""

    entropy: np.ndarray  # (N,) float32, mean over pixels, as a share of log C
    disagreement: np.ndarray  # (N,) float32, share of the pixels
    features: np.ndarray  # (N, D) float32, mean over pixels of what the decoder reads

    @property
    def uncertainty(self) -> np.ndarray:
        """(N,) float32 in [0, 1], the mean of entropy and disagreement."""
        return (self.entropy + self.disagreement) / 2


class Ranking(NamedTuple):
    """Unlabelled images by expected use of a label; each array is in that order.

    Attributes:
      order: (N,) int64, their indices.
      score: (N,) float64, uncertainty times distance, never rising.
      distance: (N,) float64 in [0, 2], to the nearest image that is labelled or before it.
      nearest: (N,) int64, which image that is: the index of one of the M labelled, or M + its own.
    """

    order: np.ndarray
    score: np.ndarray
    distance: np.ndarray
    nearest: np.ndarray


def make_measure(task: Task) -> Callable[[Network, Network, np.ndarray], Measures]:
    """Returns (network, other network, images (B, H, W, K)) -> `Measures` of B images.

    Images are seen whole, as they are; it is compiled for each size of them. Entropy and features
    are the first network's.
    """

    @jax.jit
    def measure(network: Network, other: Network, images: jax.Array) -> tuple[jax.Array, ...]:
        pixels = images.astype(jnp.float32)
        outputs, others = (task.eval_forward(each, pixels) for each in (network, other))
        log_probabilities = jax.nn.log_softmax(outputs.logits)
        entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
        most = np.log(max(task.num_classes, 2))
        differs = jnp.argmax(outputs.logits, axis=-1) != jnp.argmax(others.logits, axis=-1)
        return (
            jnp.mean(entropy, axis=(1, 2)) / most,
            jnp.mean(differs.astype(jnp.float32), axis=(1, 2)),
            jnp.mean(outputs.encoded, axis=(1, 2)),
        )

    return lambda network, other, images: Measures(*jax.device_get(measure(network, other, images)))


def rank(uncertainty: np.ndarray, features: np.ndarray, labeled: np.ndarray) -> Ranking:
    """Orders unlabelled images by the weighted k-center rule.

    The first `MOST_GREEDY` are taken one by one, the others follow by the score that they have
    then.

    Args:
      uncertainty: (N,), at least 0.
      features: (N, D); their directions are compared.
      labeled: (M, D) likewise, of the labelled images; M is at least 1.
    """
    count, known = len(features), len(labeled)
    features, labeled = _directions(features), _directions(labeled)
    distance, nearest = np.full(count, np.inf), np.zeros(count, np.int64)
    for first in range(0, known, _CHUNK):
        to_chunk = _distances(features, labeled[first : first + _CHUNK])
        _bring_nearer(distance, nearest, to_chunk.min(axis=1), first + to_chunk.argmin(axis=1))
    left = np.ones(count, bool)
    order, scores, distances, nearests = list[int](), [], [], []

    def take(index: int) -> None:
        order.append(index)
        scores.append(uncertainty[index] * distance[index])
        distances.append(distance[index])
        nearests.append(nearest[index])
        left[index] = False

    for _ in range(min(count, MOST_GREEDY)):
        index = int(np.argmax(np.where(left, uncertainty * distance, -1)))
        take(index)
        to_taken = _distances(features, features[index : index + 1])[:, 0]
        _bring_nearer(distance, nearest, to_taken, np.full(count, known + index))
    rest = np.flatnonzero(left)
    for index in rest[np.argsort(-(uncertainty * distance)[rest], kind="stable")]:
        take(int(index))
    return Ranking(np.array(order), np.array(scores), np.array(distances), np.array(nearests))


def _directions(features: np.ndarray) -> np.ndarray:
    """(N, D) -> (N, D) float64 of length 1, but for zeros."""
    features = features.astype(np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(lengths > 0, lengths, 1)


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, D) and (M, D) of length 1 -> (N, M), Euclidean."""
    return np.sqrt(np.maximum(2 - 2 * one @ other.T, 0))


def _bring_nearer(
    distance: np.ndarray, nearest: np.ndarray, new: np.ndarray, which: np.ndarray
) -> None:
    """Takes over, in place, the distances that are smaller than before, and to which image."""
    closer = new < distance
    distance[closer], nearest[closer] = new[closer], which[closer]
