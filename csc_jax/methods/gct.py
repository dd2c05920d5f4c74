"""Guided collaborative training: two networks, and a detector of the flaws in their predictions.

Ke et al., "Guided collaborative training for pixel-wise semi-supervised learning", ECCV 2020:
Sec. 3: two task networks of different initialisation; a flaw detector on image and prediction, its
target made of the error on labelled images by blurring, dilating and normalising; the dynamic
consistency constraint (where one network's flaw is larger, it follows the other) and the flaw
correction constraint (where both are bad, the flaw map is pushed to 0). Constants are those of the
authors' code (PixelSSL, semantic segmentation on VOC); so are the detector's layers, its Adam with
betas 0.9 and 0.99, and the blurs, whose size goes with the image's.

What differs: the detector's stride-1 layers keep the size of their input, where theirs lose a pixel
each, so that smaller crops do (32 px make a map of one pixel, 64 px one of four); it sees the maps
of both networks as one batch; a pixel without a label counts as no flaw in its target, 0.5 in
theirs; a flaw map that stays below 0.1 becomes 0, as theirs is meant to, which turns negative, its
minimum still subtracted; maps are stretched with 1e-4 in the denominator, theirs with 1e-9, which
would stretch the rounding errors of a constant one; padding is left out of every loss. Before
`method.supervised_only` networks and detector learn from labels alone. Networks, schedule and
supervised loss are those of every other row, but without dropout, as theirs: what one network
predicts is the other's target. What is evaluated is the EMA of the first network, the student,
theirs is that network itself (`eval.network`).
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from scipy.ndimage import gaussian_filter1d

from csc_jax import losses
from csc_jax.methods import shared
from csc_jax.methods.base import Batch, LossOutputs, Method, Task
from csc_jax.models import resize_aligned
from csc_jax.models.layers import BatchNorm
from csc_jax.optimizer import polynomial_decay
from csc_jax.state import Network, TrainState

_CLIP = 0.1  # a flaw map that stays below it shows no flaw (FlawmapHandler of the authors' code)


class GCT(Method):
    """L = L_s + w_dc(t) L_dc + w_fc L_fc for "student" and "second", L_fd for "detector"."""

    def __init__(self, task: Task, *, with_pixels: bool = False):
        super().__init__(task, with_pixels=with_pixels)
        self.detector = FlawDetector(task.config.method.gct.detector_width)

    def init_companions(self, key: Array) -> dict[str, Network]:
        second_key, detector_key = jax.random.split(key)
        image = jnp.zeros((1, 32, 32, self.task.config.data.bands + self.task.num_classes))
        variables = self.detector.init(detector_key, image, train=False)
        return {
            "second": self.task.init_network(second_key, projection=False),
            "detector": Network(variables["params"], variables["batch_stats"]),
        }

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        config = self.task.config
        rate = polynomial_decay(
            config.method.gct.detector_rate, config.optimizer.power, self.task.total_steps
        )
        return super().optimizers() | {"detector": optax.adam(rate, b1=0.9, b2=0.99)}

    def loss(
        self, params: dict[str, Any], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, LossOutputs]:
        task, config = self.task, self.task.config.method
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        halves = labeled["image"], unlabeled["image"]
        images = shared.join(*halves)
        inside = shared.join(labeled["inside"], unlabeled["inside"])
        size = shared.size_of(images)

        batch_stats, outputs, soft = {}, {}, {}
        networks = {"student": state.student, "second": state.companions["second"]}
        for i, (name, network) in enumerate(networks.items()):
            outputs[name], batch_stats[name] = task.train_forward(
                params[name],
                network.batch_stats,
                images,
                jax.random.fold_in(key, i),
                projection=self.with_pixels and name == "student",
                dropout=False,
            )
            soft[name] = jax.nn.softmax(resize_aligned(outputs[name].logits, size))
        loss_s = {}
        for name, out in outputs.items():
            of_labeled = shared.split(out, *halves)[0]
            loss_s[name] = task.supervised_loss(of_labeled.logits, of_labeled.aux, labeled["label"])

        both = shared.join(soft["student"], soft["second"])  # (2B, H, W, C)
        fixed = jax.lax.stop_gradient(both)
        # One pass teaches the detector, one teaches the networks through the detector as it is.
        flaws, batch_stats["detector"] = self._detect(params["detector"], state, images, fixed)
        constant = jax.lax.stop_gradient(params["detector"])
        flaws_of_networks, _ = self._detect(constant, state, images, both)

        labels = labeled["label"]

        def of_labeled_images(x: Array) -> Array:  # (2B, …) -> (2Bl, …)
            parts = shared.split(x, images, images)
            return shared.join(*(shared.split(part, *halves)[0] for part in parts))

        truth, inside_l = (shared.join(x, x) for x in (labels, labeled["inside"]))
        flaw_truth = flaw_target(of_labeled_images(fixed), truth, config.gct.repeats)
        loss_fd = shared.masked_mean((of_labeled_images(flaws) - flaw_truth) ** 2, inside_l)

        handled = handle_flaws(jax.lax.stop_gradient(flaws))
        first, second = shared.split(fixed, images, images)
        flaws1, flaws2 = shared.split(handled, images, images)
        targets, both_bad = dynamic_targets(first, second, flaws1, flaws2, config.gct.threshold)
        twice = shared.join(inside, inside)
        # Sums of the two networks' means, as each is trained with its own losses.
        bad = shared.join(both_bad, both_bad)
        loss_fc = 2 * shared.masked_mean(bad * flaws_of_networks**2, twice)
        squares = jnp.mean((both - shared.join(*targets)) ** 2, axis=-1)
        loss_dc = 2 * shared.masked_mean(squares, twice)

        length = config.gct.ramp_up * task.total_steps
        ramp = shared.ramp_up(state.step, config.supervised_only, length)
        active = state.step >= config.supervised_only
        total = loss_s["student"] + loss_s["second"]
        total = total + config.gct.consistency * ramp * loss_dc
        total = total + jnp.where(active, config.gct.correction, 0.0) * loss_fc
        total = total + config.gct.detector_weight * loss_fd

        target, inside_u = shared.split(targets[0], *halves)[1], unlabeled["inside"]
        metrics = {"loss_s": loss_s["student"], "loss_s_second": loss_s["second"]}
        metrics |= {"loss_u": loss_dc, "loss_fc": loss_fc, "loss_fd": loss_fd}
        metrics |= {"both_bad": shared.masked_mean(both_bad, inside), "ramp_up": ramp}
        metrics |= shared.pseudo_label_metrics(
            shared.likeliest(target, inside_u), inside_u, unlabeled["label"]
        )
        pixels = None
        if self.with_pixels:
            confident = shared.likeliest(target, inside_u, config.pseudo_label.threshold)
            pixel_labels = shared.join(labels.astype(jnp.int32), confident)
            student = outputs["student"]
            features = shared.bank_features(
                task, state, student, labeled["image"], unlabeled["image"]
            )
            pixels = shared.pixels(student, features, pixel_labels)
        return total, LossOutputs(batch_stats, metrics, pixels)

    def _detect(
        self, params: Any, state: TrainState, images: Array, probabilities: Array
    ) -> tuple[Array, Any]:
        """Returns the flaw maps (2B, H, W) of both networks' (2B, H, W, C), and new statistics."""
        normalized = self.task.normalize(images)
        x = jnp.concatenate([shared.join(normalized, normalized), probabilities], axis=-1)
        variables = {
            "params": params,
            "batch_stats": state.companions["detector"].batch_stats,
        }
        flaws, updates = self.detector.apply(variables, x, train=True, mutable=["batch_stats"])
        return flaws, updates["batch_stats"]

    def pseudo_labels(self, key: Array, state: TrainState, images: Array) -> Array:
        """See `Method.pseudo_labels`: what the student is to follow."""
        detector = state.companions["detector"].variables
        networks = (state.student, state.companions["second"])
        soft, flaws = [], []
        for network in networks:
            logits = self.task.eval_forward(network, images).logits
            soft.append(jax.nn.softmax(resize_aligned(logits, shared.size_of(images))))
            x = jnp.concatenate([self.task.normalize(images), soft[-1]], axis=-1)
            flaws.append(handle_flaws(cast(Array, self.detector.apply(detector, x, train=False))))
        threshold = self.task.config.method.gct.threshold
        (target, _), _ = dynamic_targets(soft[0], soft[1], flaws[0], flaws[1], threshold)
        return jnp.argmax(target, axis=-1).astype(jnp.int32)


class FlawDetector(nn.Module):
    """Maps image and probabilities (B, H, W, K + C) to flaw maps (B, H, W), not squashed."""

    width: int  # channels of the first layer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        size = (x.shape[1], x.shape[2])
        layers = ((1, 2), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1))  # width factor, stride
        for i, (factor, stride) in enumerate(layers, 1):
            x = _Conv4(factor * self.width, stride, use_bias=False, name=f"conv{i}")(x)
            # Half of the channels are normalised over the batch, half over their own image.
            half = x.shape[-1] // 2
            batch = BatchNorm(name=f"bn{i}")(x[..., :half], train)
            x = jnp.concatenate([batch, _instance_norm(x[..., half:])], axis=-1)
            x = nn.leaky_relu(x, 0.2)
        x = _Conv4(1, 2, name="classifier")(x)
        return resize_aligned(x, size)[..., 0]


class _Conv4(nn.Module):
    """4x4 convolution with PyTorch's initial variance; sizes are divided by the stride."""

    features: int
    stride: int
    use_bias: bool = True  # without effect before a normalisation

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pad = (1, 1) if self.stride == 2 else (1, 2)
        return nn.Conv(
            self.features,
            (4, 4),
            self.stride,
            padding=(pad, pad),
            use_bias=self.use_bias,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            name="conv",
        )(x)


def _instance_norm(x: Array) -> Array:
    """(B, h, w, K) with mean 0 and variance 1 in each channel of each image."""
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    variance = jnp.var(x, axis=(1, 2), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def flaw_target(probabilities: Array, labels: Array, repeats: int) -> Array:
    """Returns what the detector is to predict, (B, H, W) in [0, 1] (Sec. 3.1, pipeline C).

    Half the summed absolute error (mu = 0.5), blurred, dilated by 3x3 and blurred again, each image
    stretched to [0, 1].

    Args:
      probabilities: (B, H, W, C).
      labels: (B, H, W) int, 255 = ignored.
      repeats: nu, of dilation and second blur.
    """
    classes = probabilities.shape[-1]
    valid = losses.valid_pixels(labels, classes)
    error = 0.5 * jnp.sum(jnp.abs(jax.nn.one_hot(labels, classes) - probabilities), axis=-1)
    short = min(shared.size_of(labels))
    flaws = blur(jnp.where(valid, error, 0.0), short // 8)
    for _ in range(repeats):
        dilated = jax.lax.reduce_window(flaws, -jnp.inf, jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME")
        flaws = blur(dilated, short // 4)
    return _stretch(flaws)


def handle_flaws(flaws: Array) -> Array:
    """Returns flaw maps (B, H, W) clipped at 0, blurred, and stretched to [0, 1] each.

    A map that stays below 0.1 becomes 0.
    """
    flaws = blur(jnp.maximum(flaws, 0.0), min(shared.size_of(flaws)) // 16)
    some = jnp.max(flaws, axis=(1, 2), keepdims=True) > _CLIP
    return jnp.where(some, _stretch(flaws), 0.0)


def dynamic_targets(
    first: Array, second: Array, flaws1: Array, flaws2: Array, threshold: float
) -> tuple[tuple[Array, Array], Array]:
    """Returns what each network is to follow, (B, H, W, C) twice, and where both are bad.

    Each follows itself where its flaw is not the larger one, else the other; a flaw above
    `threshold` counts as 1, so that where both are bad each follows itself (Sec. 3.2).

    Args:
      first: (B, H, W, C) probabilities; second alike.
      second: of the second network.
      flaws1: (B, H, W) in [0, 1], see `handle_flaws`; flaws2 alike.
      flaws2: of the second network.
      threshold: xi.
    """
    bad1, bad2 = flaws1 > threshold, flaws2 > threshold
    flaws1, flaws2 = jnp.where(bad1, 1.0, flaws1), jnp.where(bad2, 1.0, flaws2)
    target1 = jnp.where((flaws1 <= flaws2)[..., None], first, second)
    target2 = jnp.where((flaws2 <= flaws1)[..., None], second, first)
    return (target1, target2), (bad1 & bad2).astype(jnp.float32)


def blur(x: Array, size: int) -> Array:
    """Blurs (B, H, W) with a Gaussian of about `size` px, images reflected at their edges."""
    rows, columns = _blur_matrix(x.shape[1], size), _blur_matrix(x.shape[2], size)
    y = jnp.einsum("Hh,bhw->bHw", rows, x, precision="highest")
    return jnp.einsum("Ww,bhw->bhW", columns, y, precision="highest")


def _blur_matrix(length: int, size: int) -> np.ndarray:
    """One axis of a separable blur as a matrix (length, length), float32; each row sums to 1."""
    size += 1 - size % 2  # odd, as in the authors' code
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8  # theirs, and OpenCV's
    # Their kernel is the blur of a single pixel in an image of the kernel's own size, whose tails
    # the borders reflect.
    weights = gaussian_filter1d(np.eye(size)[size // 2], sigma)
    offsets = np.arange(size) - size // 2
    place = np.abs(np.arange(length)[:, None] + offsets[None])  # reflected at the first pixel
    place = np.where(place >= length, 2 * (length - 1) - place, place)
    matrix = np.zeros((length, length))
    np.add.at(matrix, (np.arange(length)[:, None], place), weights)
    return matrix.astype(np.float32)


def _stretch(x: Array) -> Array:
    """(B, H, W) with minimum 0 and maximum 1 in each image."""
    low = jnp.min(x, axis=(1, 2), keepdims=True)
    high = jnp.max(x, axis=(1, 2), keepdims=True)
    return (x - low) / (high - low + 1e-4)


METHOD = GCT
