"""Guided collaborative training: flaw maps, targets and losses against slow NumPy versions."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from toy_network import cross_entropy, softmax, toy_batch, toy_method

from csc_jax.methods import gct
from csc_jax.models import resize_aligned

KEY = jax.random.key(11)


def blur_slowly(image, size):
    """Gaussian blur pixel by pixel, the image reflected without repeating its edge.

    The kernel is that of the authors' code: SciPy's blur of a single pixel.
    """
    size += 1 - size % 2
    sigma, radius = 0.3 * ((size - 1) / 2 - 1) + 0.8, size // 2
    point = np.zeros((size, size))
    point[radius, radius] = 1
    kernel = scipy.ndimage.gaussian_filter(point, sigma)
    padded = np.pad(image, radius, mode="reflect")
    out = np.empty(image.shape)
    for y, x in np.ndindex(image.shape):
        out[y, x] = np.sum(padded[y : y + size, x : x + size] * kernel)
    return out


def stretch(image):
    return (image - image.min()) / (image.max() - image.min())


def flaw_target_slowly(probabilities, label, repeats):
    """Sec. 3.1, pipeline C, of one image (H, W, C)."""
    height, width, classes = probabilities.shape
    flaws = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        if label[y, x] != 255:
            truth = np.eye(classes)[label[y, x]]
            flaws[y, x] = 0.5 * np.abs(truth - probabilities[y, x]).sum()
    short = min(height, width)
    flaws = blur_slowly(flaws, short // 8)
    for _ in range(repeats):
        padded = np.pad(flaws, 1, mode="reflect")
        flaws = np.array(
            [[padded[y : y + 3, x : x + 3].max() for x in range(width)] for y in range(height)]
        )
        flaws = blur_slowly(flaws, short // 4)
    return stretch(flaws)


def handle_slowly(flaws):
    blurred = blur_slowly(np.maximum(flaws, 0), min(flaws.shape) // 16)
    return stretch(blurred) if blurred.max() > 0.1 else np.zeros(flaws.shape)


def follow_slowly(own, other, flaw, flaw_other, threshold=0.6):
    """What a network is to follow, pixel by pixel, (H, W, C)."""
    target = own.copy()
    for place in np.ndindex(flaw.shape):
        both_bad = flaw[place] > threshold and flaw_other[place] > threshold
        if flaw[place] > flaw_other[place] and not both_bad:
            target[place] = other[place]
    return target


def test_blur():
    image = np.random.default_rng(0).random((2, 20, 33))
    for size in (1, 2, 5, 8):
        expected = np.stack([blur_slowly(one, size) for one in image])
        np.testing.assert_allclose(gct.blur(jnp.asarray(image), size), expected, atol=1e-5)


def test_the_kernels_tails_are_reflected_at_its_borders():
    """By hand for 3 px: sigma is 0.8, and SciPy cuts the tails off after 3 px."""
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 0.8**2))
    weights /= weights.sum()
    one, two, three = weights[4:]
    line = np.array([one + two, weights[3] + 2 * three, one + two])
    point = jnp.zeros((1, 7, 7)).at[0, 3, 3].set(1.0)
    expected = np.zeros((7, 7))
    expected[2:5, 2:5] = line[:, None] * line
    np.testing.assert_allclose(gct.blur(point, 3)[0], expected, atol=1e-6)


def test_the_target_of_the_flaw_detector():
    rng = np.random.default_rng(1)
    probabilities, labels = softmax(2 * rng.normal(size=(2, 24, 40, 3))), np.zeros((2, 24, 40), int)
    labels[:, :, 20:], labels[0, 5:9, 3:9] = 2, 255
    for repeats in (0, 1, 2):
        found = gct.flaw_target(jnp.asarray(probabilities), jnp.asarray(labels), repeats)
        for image in range(2):
            expected = flaw_target_slowly(probabilities[image], labels[image], repeats)
            np.testing.assert_allclose(found[image], expected, atol=2e-3)


def test_handled_flaw_maps():
    flaws = np.random.default_rng(2).normal(size=(3, 32, 48))
    flaws[1] *= 0.05  # no flaw
    flaws[2] -= 10.0  # negative everywhere
    found = gct.handle_flaws(jnp.asarray(flaws))
    for image in range(3):
        np.testing.assert_allclose(found[image], handle_slowly(flaws[image]), atol=2e-3)
    assert np.ptp(found[0]) > 0.99
    assert not np.any(found[1:])


def test_each_network_follows_the_one_with_the_smaller_flaw():
    rng = np.random.default_rng(3)
    first, second = softmax(rng.normal(size=(2, 2, 9, 8, 3)))
    flaws1, flaws2 = rng.random((2, 2, 9, 8)).round(1)  # with ties
    arguments = [jnp.asarray(x) for x in (first, second, flaws1, flaws2)]
    (target1, target2), both_bad = gct.dynamic_targets(*arguments, 0.6)
    expected = [follow_slowly(*x) for x in zip(first, second, flaws1, flaws2, strict=True)]
    np.testing.assert_allclose(target1, expected, rtol=1e-6)
    expected = [follow_slowly(*x) for x in zip(second, first, flaws2, flaws1, strict=True)]
    np.testing.assert_allclose(target2, expected, rtol=1e-6)
    np.testing.assert_array_equal(both_bad, (flaws1 > 0.6) & (flaws2 > 0.6))


def louder(state):
    """Makes the detector see flaws, where one as drawn stays below 0.1."""
    layer = state.companions["detector"].params["classifier"]["conv"]
    layer["kernel"], layer["bias"] = 20 * layer["kernel"], jnp.full((1,), 0.5)


def test_the_loss_is_the_papers():
    method, state = toy_method(
        method__name="gct",
        method__gct__detector_width=2,
        method__gct__ramp_up=0.4,
        train__steps=10,
    )
    louder(state)
    state = state.replace(step=jnp.int32(2))  # half of the ramp's four steps are over
    batch = toy_batch(size=(2, 64, 64))
    images = jnp.concatenate([batch["labeled"]["image"], batch["unlabeled"]["image"]])
    second, detector = state.companions["second"], state.companions["detector"]

    @jax.jit
    def run(state):
        loss = method.loss(state.trained, state, batch, KEY)
        soft = [
            jax.nn.softmax(
                resize_aligned(
                    method.task.train_forward(
                        network.params, network.batch_stats, images, KEY, projection=False
                    )[0].logits,
                    (64, 64),
                )
            )
            for network in (state.student, second)
        ]
        in_turn = jnp.stack(soft, axis=1).reshape(8, 64, 64, -1)  # both networks' of each image
        flaws, _ = method._detect(detector.params, state, images, in_turn)
        return loss, soft, flaws

    (loss, outputs), soft, flaws = run(state)
    soft, flaws = np.asarray(soft, np.float64), np.asarray(flaws, np.float64)
    flaws = flaws.reshape(4, 2, 64, 64).swapaxes(0, 1)
    label = np.asarray(batch["labeled"]["label"])
    inside = np.concatenate([np.ones((2, 64, 64), bool), batch["unlabeled"]["inside"]])
    handled = np.array([[handle_slowly(one) for one in row] for row in flaws])
    bad = np.all(handled > 0.6, axis=0)  # (4, H, W)
    loss_s, loss_dc, loss_fc, loss_fd = [], 0.0, 0.0, 0.0
    for own, other in ((0, 1), (1, 0)):
        loss_s.append(cross_entropy(np.log(soft[own, :2]), label, np.ones(label.shape, bool)))
        target = np.array(
            [
                follow_slowly(*x)
                for x in zip(soft[own], soft[other], handled[own], handled[other], strict=True)
            ]
        )
        loss_dc += np.mean((soft[own] - target)[inside] ** 2)
        loss_fc += np.mean((bad * flaws[own] ** 2)[inside])
        truth = [flaw_target_slowly(soft[own, i], label[i], 1) for i in range(2)]
        loss_fd += np.mean((flaws[own, :2] - truth) ** 2) / 2
    assert loss_dc > 0
    assert loss_fc > 0
    metrics = outputs.metrics
    np.testing.assert_allclose([metrics["loss_s"], metrics["loss_s_second"]], loss_s, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_u"], loss_dc, rtol=5e-3)
    np.testing.assert_allclose(metrics["loss_fc"], loss_fc, rtol=5e-3)
    np.testing.assert_allclose(metrics["loss_fd"], loss_fd, rtol=5e-3)
    expected = sum(loss_s) + np.exp(-5 * 0.25) * 100 * loss_dc + loss_fc + 10 * loss_fd
    np.testing.assert_allclose(loss, expected, rtol=5e-3)


def test_the_detector_has_its_own_optimizer_and_learns_from_its_own_loss_alone():
    method, state = toy_method(
        method__name="gct", method__gct__detector_width=2, method__gct__detector_weight=0.0
    )
    louder(state)
    gradients, outputs = jax.jit(jax.grad(method.loss, has_aux=True))(
        state.trained, state.replace(step=jnp.int32(5)), toy_batch(size=(2, 64, 64)), KEY
    )
    assert outputs.metrics["loss_fc"] > 0  # which reaches the networks through the detector
    assert not any(np.any(x) for x in jax.tree.leaves(gradients["detector"]))
    assert np.any(gradients["student"]["body"]["kernel"])
    assert np.any(gradients["second"]["body"]["kernel"])
    tx, params = method.optimizers()["detector"], {"w": jnp.zeros(())}
    update, _ = tx.update({"w": jnp.ones(())}, tx.init(params), params)
    np.testing.assert_allclose(update["w"], -1e-4, rtol=1e-4)  # Adam's first step
