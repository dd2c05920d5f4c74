"""What training, evaluation and methods ask of a network, whichever it is."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from csc_jax.models.layers import Features


class Segmenter(Protocol):
    """A Flax module of segmentation: `DeepLabV3Plus` or `DPT`.

    Its parameters have the top-level keys "backbone", which learns at a rate of its own or not at
    all, and "projection", which only some methods have.
    """

    @property
    def bands(self) -> int:
        """Channels of an image, K."""

    @property
    def patch(self) -> int:
        """Training crops have sides that are multiples of so many px; 1 = any."""

    @property
    def encoded_width(self) -> int:
        """Channels of `Outputs.encoded`."""

    @property
    def encoded_scale(self) -> int:
        """How much finer the logits are than `Outputs.encoded`, about; a power of 2."""

    def without_dropout(self) -> "Segmenter":
        """Returns the same network without any random choice."""

    def logits_size(self, size: Any) -> Any:
        """Returns the sides of the logits of images with sides `size`, int or int array, px."""

    def init(self, rngs: Any, x: Any, *, train: bool, projection: bool = True) -> Any:
        """Returns {"params"} and, of a network with BatchNorm, {"batch_stats"}."""

    def apply(
        self,
        variables: Any,
        x: jax.Array,
        *,
        train: bool,
        projection: bool = True,
        perturb: Callable[[Features], Features] | None = None,
        mutable: Any = False,
        rngs: Any = None,
    ) -> Any:
        """Returns `Outputs`, and with `mutable` what has changed.

        Args:
          variables: of `init`.
          x: (B, H, W, K) normalised image.
          train: whether random choices are made and statistics are those of the batch; it then
            needs a key "dropout" in `rngs`, and "batch_stats" in `mutable`.
          projection: whether the projection is computed.
          perturb: changes the backbone's features before anything is made of them; they may come
            out for another number of images, as where each is decoded with and without noise.
          mutable: collections that may change.
          rngs: keys by name.
        """
