"""Cross-consistency training: auxiliary decoders under perturbed features follow the main decoder.

Ouali et al., "Semi-supervised semantic segmentation with cross-consistency training", CVPR 2020:
Sec. 3.2: L = L_s + omega_u L_u on a shared encoder, where L_u is the mean squared difference of the
auxiliary decoders' softmax from the main decoder's, which gets no gradient from it, on unlabelled
images alone; the seven perturbation functions; annealed bootstrapped cross entropy as an option for
L_s. Numbers of decoders and all constants are those of the authors' code; as in it, labelled and
unlabelled images are batches of their own, the latter without dropout but for the perturbations.

What differs: the encoder is that of every other row, of DeepLabv3+ up to ASPP, of a transformer to
its last block (`Outputs.encoded`), and so is the main decoder; auxiliary decoders are theirs, a 1x1
convolution to the classes and sub-pixel convolutions, here up to the stride of the logits. Noise
and thresholds are drawn per image instead of per batch. F-Drop's threshold is the paper's U(0.6,
0.9), which masks 10 to 40%; their code has U(0.7, 0.9). G-Cutout finds objects by 8-connectivity on
the grid of the features instead of as contours of more than 50 points. I-VAT multiplies with the
Hessian of the divergence itself, where theirs takes a difference over xi = 1e-6, less than float32
resolves: what comes out has a norm of about 5e-4 in place of 2, and the decoder sees no
perturbation. What is evaluated is the EMA of the student, theirs is that network itself
(`eval.network`). A transformer's features are of both signs, so the mean over their channels, by
which F-Drop chooses, says less than it does behind a ReLU.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from csc_jax import augment, losses
from csc_jax.contrast import devices
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method
from csc_jax.models import Outputs, resize_aligned
from csc_jax.state import Network, TrainState


class CCT(Method):
    """L = L_s + w(t) L_u; the companion "decoders" holds all auxiliary ones, stacked."""

    def init_companions(self, key: Array) -> dict[str, Network]:
        config = self.task.config
        count = sum(config.method.cct[name] for name in (*_PERTURBATIONS, "i_vat"))
        classes, model = self.task.num_classes, self.task.model
        decoders = init_decoders(key, count, model.encoded_width, classes, model.encoded_scale)
        return {"decoders": Network(decoders, {})}

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        task, config = self.task, self.task.config.method
        dropout_key, perturb_key = jax.random.split(key)
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        of_labeled, batch_stats = task.train_forward(
            params["student"],
            state.student.batch_stats,
            labeled["image"],
            dropout_key,
            projection=self.with_pixels,
        )
        of_unlabeled, batch_stats = task.train_forward(
            params["student"],
            batch_stats,
            unlabeled["image"],
            dropout_key,
            projection=self.with_pixels,
            dropout=False,
        )
        loss_s = self._supervised_loss(state.step, of_labeled, labeled["label"])

        logits_u = jax.lax.stop_gradient(of_unlabeled.logits)
        size = shared.size_of(logits_u)
        decoded = decode_perturbed(
            perturb_key,
            params["decoders"],
            of_unlabeled.encoded,
            jnp.argmax(logits_u, axis=-1) != config.cct.background,
            config.cct,
        )  # (K, B, h, w, C)
        counted = augment.nearest(unlabeled["inside"], size)
        target = jax.nn.softmax(logits_u)
        loss_u = jnp.mean(
            jax.vmap(lambda x: shared.consistency(resize_aligned(x, size), target, counted))(
                decoded
            )
        )
        length = config.cct.ramp_up * task.total_steps
        ramp = shared.ramp_up(state.step, config.supervised_only, length)
        total = loss_s + config.cct.weight * ramp * loss_u

        inside = unlabeled["inside"]
        soft = jax.nn.softmax(resize_aligned(logits_u, shared.size_of(inside)))
        metrics = {"loss_s": loss_s, "loss_u": loss_u, "ramp_up": ramp}
        metrics |= shared.pseudo_label_metrics(
            shared.likeliest(soft, inside), inside, unlabeled["label"]
        )
        pixels = None
        if self.with_pixels:
            confident = shared.likeliest(soft, inside, config.pseudo_label.threshold)
            labels = shared.join(labeled["label"].astype(jnp.int32), confident)
            student = shared.join(of_labeled, of_unlabeled)
            features = shared.bank_features(
                task, state, student, labeled["image"], unlabeled["image"]
            )
            pixels = shared.pixels(student, features, labels)
        return total, LossOutputs({"student": batch_stats, "decoders": {}}, metrics, pixels)

    def _supervised_loss(self, step: Array, student: Outputs, labels: Array) -> Array:
        logits, aux = student.logits, student.aux
        if not self.task.config.method.cct.annealed:
            return self.task.supervised_loss(logits, aux, labels)
        progress = step / self.task.total_steps

        def loss(scores: Array) -> Array:
            scores = resize_aligned(scores, shared.size_of(labels))
            return annealed_cross_entropy(scores, labels, progress)

        return loss(logits) + (0.0 if aux is None else self.task.config.loss.aux_weight * loss(aux))

    def pseudo_labels(self, key: Array, state: TrainState, images: Array) -> Array:
        logits = self.task.eval_forward(state.student, images).logits
        return jnp.argmax(resize_aligned(logits, shared.size_of(images)), -1).astype(jnp.int32)


def annealed_cross_entropy(logits: Array, labels: Array, progress: Array) -> Array:
    """Returns the cross entropy over pixels whose true class is below a threshold, () float32.

    The threshold rises from 1/C to 0.9 over the first 40% of training, as 1 - exp(-5 x). At least
    one pixel an image counts (`min_kept` of the authors' code).

    Args:
      logits: (B, H, W, C).
      labels: (B, H, W) int, 255 = ignored.
      progress: () share of training done.
    """
    start = 1.0 / logits.shape[-1]
    rise = 1.0 - jnp.exp(-5.0 * jnp.minimum(progress / 0.4, 1.0))
    threshold = start + (0.9 - start) * rise
    return losses.ohem_cross_entropy(logits, labels, threshold=threshold, min_kept=logits.shape[0])


def init_decoders(key: Array, count: int, width: int, classes: int, scale: int) -> dict[str, Any]:
    """Returns the parameters of K = `count` auxiliary decoders.

    Args:
      key: random key.
      count: K.
      width: D, channels of the encoded features.
      classes: C.
      scale: of the logits over the features; a power of 2.

    Returns:
      {"project": {"kernel" (K, D, C)}, "shuffle0": {"kernel" (K, C, 2, 2, C), "bias" (K, 2, 2, C)},
      …}, one "shuffle" for each factor of 2; kernels as He et al. draw them, and the four of a
      sub-pixel convolution equal, so that it starts as nearest-neighbour upsampling (ICNR).
    """
    key, draw = jax.random.split(key)
    kernel = jax.random.normal(draw, (count, width, classes)) * math.sqrt(2 / width)
    params = {"project": {"kernel": kernel}}
    for i in range(int(math.log2(scale))):
        key, draw = jax.random.split(key)
        kernel = jax.random.normal(draw, (count, classes, 1, 1, classes)) * math.sqrt(2 / classes)
        params[f"shuffle{i}"] = {
            "kernel": jnp.tile(kernel, (1, 1, 2, 2, 1)),
            "bias": jnp.zeros((count, 2, 2, classes)),
        }
    return params


def decode(params: dict[str, Any], features: Array) -> Array:
    """Maps features (K, B, h, w, D), one batch a decoder, to logits (K, B, H, W, C)."""
    x = jnp.einsum("kbhwd,kdc->kbhwc", features, params["project"]["kernel"])
    for i in range(len(params) - 1):
        shuffle = params[f"shuffle{i}"]
        x = jnp.einsum("kbhwc,kcyxd->kbhywxd", x, shuffle["kernel"])
        x = nn.relu(x + shuffle["bias"][:, None, None, :, None])
        count, images, height, _, width, _, classes = x.shape
        x = x.reshape(count, images, 2 * height, 2 * width, classes)
    return x


def decode_perturbed(
    key: Array, params: dict[str, Any], features: Array, objects: Array, config: ConfigDict
) -> Array:
    """Returns the logits (K, B, H, W, C) of every decoder under its own perturbation.

    Args:
      key: random key.
      params: of K decoders, see `init_decoders`.
      features: (B, h, w, D), not perturbed.
      objects: (B, H, W) bool, where the main decoder sees an object.
      config: `config.method.cct`.
    """
    objects = augment.nearest(objects, shared.size_of(features))
    perturbed = []
    for i, (name, perturb) in enumerate(_PERTURBATIONS.items()):
        if config[name]:
            keys = jax.random.split(jax.random.fold_in(key, i), config[name])
            draw = partial(perturb, features=features, objects=objects, config=config)
            perturbed.append(jax.vmap(draw)(keys))
    if config.i_vat:
        last = jax.tree.map(lambda x: x[-config.i_vat :], params)
        vat_key = jax.random.fold_in(key, len(_PERTURBATIONS))
        perturbed.append(adversarial(vat_key, last, features, config.epsilon))
    return decode(params, jnp.concatenate(perturbed))


def adversarial(key: Array, params: dict[str, Any], features: Array, epsilon: float) -> Array:
    """Returns I-VAT: features + the perturbation that changes each decoder's softmax most.

    One power iteration on the Hessian of the Kullback-Leibler divergence (Miyato et al. 2018,
    Sec. 3.3) from a random direction; the perturbation has norm `epsilon` for each image.

    Args:
      key: random key.
      params: of V decoders.
      features: (B, h, w, D).
      epsilon: norm.

    Returns:
      (V, B, h, w, D).
    """
    count = jax.tree.leaves(params)[0].shape[0]
    features = jnp.broadcast_to(features, (count, *features.shape))
    # The direction is a constant: neither decoders nor features learn through it.
    fixed, clean = jax.lax.stop_gradient((params, features))
    target = jax.nn.softmax(decode(fixed, clean))

    def divergence(offset: Array) -> Array:
        return -jnp.sum(target * jax.nn.log_softmax(decode(fixed, clean + offset)))

    direction = _unit(jax.random.uniform(key, clean.shape) - 0.5)
    gradient = jax.grad(divergence)
    _, product = jax.jvp(gradient, (jnp.zeros_like(clean),), (direction,))
    return features + epsilon * jax.lax.stop_gradient(_unit(product))


def _unit(x: Array) -> Array:
    """(V, B, h, w, D) with norm 1 for each decoder and image."""
    norm = jnp.sqrt(jnp.sum(x**2, axis=(2, 3, 4), keepdims=True))
    return x / (norm + 1e-8)


def _con_msk(key: Array, features: Array, objects: Array, config: ConfigDict) -> Array:
    return features * objects[..., None]  # the context is masked


def _obj_msk(key: Array, features: Array, objects: Array, config: ConfigDict) -> Array:
    return features * ~objects[..., None]


def _dropout(key: Array, features: Array, objects: Array, config: ConfigDict) -> Array:
    """Drops whole channels of an image."""
    images, _, _, channels = features.shape
    kept = 1.0 - config.dropout_rate
    return features * jax.random.bernoulli(key, kept, (images, 1, 1, channels)) / kept


def _f_drop(key: Array, features: Array, objects: Array, config: ConfigDict) -> Array:
    """Drops the most active pixels, by the mean over the channels."""
    attention = jnp.mean(features, axis=-1, keepdims=True)
    low, high = config.drop_range
    ratio = jax.random.uniform(key, (features.shape[0], 1, 1, 1), minval=low, maxval=high)
    return features * (attention < ratio * jnp.max(attention, axis=(1, 2, 3), keepdims=True))


def _f_noise(key: Array, features: Array, objects: Array, config: ConfigDict) -> Array:
    noise = jax.random.uniform(key, features.shape, minval=-config.noise, maxval=config.noise)
    return features * (1.0 + noise)


def _g_cutout(key: Array, features: Array, objects: Array, config: ConfigDict) -> Array:
    keys = jax.random.split(key, features.shape[0])
    holes = jax.vmap(partial(cut_objects, erase=config.erase))(keys, components(objects))
    return features * ~holes[..., None]


# By the field of `config.method.cct` that counts the decoders; I-VAT needs decoders, too.
_PERTURBATIONS: dict[str, Callable[..., Array]] = {
    "con_msk": _con_msk,
    "dropout": _dropout,
    "f_drop": _f_drop,
    "f_noise": _f_noise,
    "g_cutout": _g_cutout,
    "obj_msk": _obj_msk,
}


def components(mask: Array) -> Array:
    """Numbers the 8-connected components of (B, h, w) bool: each pixel gets the same id, int32.

    The id is the position of the component's first pixel in its flattened image; h w outside.
    """
    if not (axes := devices.axes()):
        return _components(mask)
    # Each device for itself: it need not ask the others in every turn whether they are done.
    rows = PartitionSpec(axes)
    return jax.shard_map(_components, in_specs=rows, out_specs=rows, check_vma=False)(mask)


def _components(mask: Array) -> Array:
    _, height, width = mask.shape
    none = height * width
    place = jnp.arange(none, dtype=jnp.int32).reshape(1, height, width)

    def spread(ids: Array) -> Array:
        least = jax.lax.reduce_window(
            ids, jnp.int32(none), jax.lax.min, (1, 3, 3), (1, 1, 1), "SAME"
        )
        return jnp.where(mask, least, none)

    def changed(carry: tuple[Array, Array]) -> Array:
        return jnp.any(carry[0] != carry[1])

    first = jnp.where(mask, place, none)
    before_and_after = (first, spread(first))
    _, ids = jax.lax.while_loop(changed, lambda x: (x[1], spread(x[1])), before_and_after)
    return ids


def cut_objects(key: Array, ids: Array, *, erase: float) -> Array:
    """Returns one random hole inside the bounding box of each object, (h, w) bool.

    Args:
      key: random key.
      ids: (h, w) int32, see `components`.
      erase: sides of a hole, rounded down, as a ratio of those of the box.
    """
    height, width = ids.shape
    number = height * width
    edges = []  # first and last + 1 row and column of each object's hole, (h w,) each
    for axis, draw in zip((0, 1), jax.random.split(key), strict=True):
        place = jax.lax.broadcasted_iota(jnp.int32, ids.shape, axis).reshape(-1)
        low = jax.ops.segment_min(place, ids.reshape(-1), number)
        high = jax.ops.segment_max(place, ids.reshape(-1), number) + 1
        side = jnp.where(high > low, high - low, 0)  # no such object: the minimum is the largest
        hole = jnp.floor(side * erase).astype(jnp.int32)
        room = side - hole + 1
        start = low + jnp.floor(jax.random.uniform(draw, (number,)) * room).astype(jnp.int32)
        edges += [start, start + hole]
    top, bottom, left, right = edges
    real = (bottom > top) & (right > left)
    # A rectangle is the double running sum of ±1 at its corners.
    corners = jnp.zeros((height + 1, width + 1), jnp.int32)
    for row, column, sign in (
        (top, left, 1),
        (top, right, -1),
        (bottom, left, -1),
        (bottom, right, 1),
    ):
        row, column = jnp.where(real, row, height), jnp.where(real, column, width)
        corners = corners.at[row, column].add(sign)
    return jnp.cumsum(jnp.cumsum(corners, axis=0), axis=1)[:height, :width] > 0


METHOD = CCT
