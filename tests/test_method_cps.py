"""Cross pseudo supervision: its loss against Sec. 3 of Chen et al., in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_network import (
    assert_statistics,
    cross_entropy,
    running_statistics,
    softmax,
    toy_batch,
    toy_method,
)

from csc_jax import augment
from csc_jax.models import resize_aligned

KEY = jax.random.key(5)
EVERYWHERE = np.ones((2, 32, 32), bool)


def logits_of(method, network, images):
    """Both networks' logits (B, 32, 32, C) without a gradient; the toy network has no dropout."""
    out, _ = method.task.train_forward(
        network.params, network.batch_stats, images, KEY, projection=False
    )
    return np.asarray(resize_aligned(out.logits, (32, 32)))


@pytest.mark.parametrize("cutmix", [False, True])
def test_each_network_learns_the_arg_max_of_the_other(cutmix, monkeypatch):
    method, state = toy_method(method__name="cps", method__cps__cutmix=cutmix)
    mask = jnp.broadcast_to(jnp.arange(32) < 12, (2, 32, 32))
    monkeypatch.setattr(augment, "cutmix_mask", lambda *_: mask)
    batch = toy_batch()
    loss, outputs = jax.jit(method.loss)(state.trained, state, batch, KEY)

    labeled, unlabeled = batch["labeled"]["image"], batch["unlabeled"]["image"]
    inside = np.asarray(batch["unlabeled"]["inside"])
    networks = {"student": state.student, "second": state.companions["second"]}
    if cutmix:  # the next image shows in the first 12 columns, for labels and padding alike
        mixed = np.array(unlabeled).astype(np.float32)
        mixed[:, :, :12] = np.asarray(unlabeled)[::-1, :, :12]
        inside_mixed = inside.copy()
        inside_mixed[:, :, :12] = inside[::-1, :, :12]
        taught = {name: logits_of(method, n, unlabeled) for name, n in networks.items()}
        batches = (unlabeled, mixed, labeled)  # each normalised by itself
    else:
        mixed, batches = unlabeled, (labeled, unlabeled)
    logits = {
        name: np.concatenate([logits_of(method, n, labeled), logits_of(method, n, mixed)])
        for name, n in networks.items()
    }
    expected, label = 0.0, np.asarray(batch["labeled"]["label"])
    for name, other in (("student", "second"), ("second", "student")):
        loss_s = cross_entropy(logits[name][:2], label, EVERYWHERE)
        if cutmix:
            pseudo = taught[other].argmax(-1)
            pseudo[:, :, :12] = pseudo[::-1, :, :12].copy()
            loss_u = cross_entropy(logits[name][2:], pseudo, inside_mixed)
        else:
            pseudo = logits[other].argmax(-1)
            loss_u = cross_entropy(logits[name], pseudo, np.concatenate([EVERYWHERE, inside]))
        suffix = "" if name == "student" else "_second"
        np.testing.assert_allclose(outputs.metrics["loss_s" + suffix], loss_s, rtol=1e-4)
        np.testing.assert_allclose(outputs.metrics["loss_u" + suffix], loss_u, rtol=1e-4)
        expected += loss_s + 1.5 * loss_u
        statistics = running_statistics(method, networks[name], *batches)
        assert_statistics(outputs.batch_stats[name], statistics)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_networks_start_apart_and_learn_from_labels_alone_at_first():
    method, state = toy_method(method__name="cps", method__supervised_only=2)
    kernels = [n.params["body"]["kernel"] for n in (state.student, state.companions["second"])]
    assert not np.allclose(*kernels, atol=1e-3)
    assert set(method.optimizers()) == {"student", "second"}
    loss = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    for step, weight in ((1, 0.0), (2, 1.5)):
        now = state.replace(step=jnp.int32(step))
        (value, outputs), gradients = loss(now.trained, now, toy_batch(), KEY)
        m = outputs.metrics
        expected = m["loss_s"] + m["loss_s_second"] + weight * (m["loss_u"] + m["loss_u_second"])
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for name in ("student", "second"):
            assert np.any(gradients[name]["classifier"]["kernel"])


def test_a_module_on_top_gets_the_second_networks_labels_mixed_as_the_images_are():
    method, state = toy_method(
        method__name="cps", method__contrast="csc", method__pseudo_label__threshold=0.0
    )
    batch = toy_batch()
    batch["unlabeled"]["inside"] = jnp.asarray(EVERYWHERE)
    _, outputs = jax.jit(method.base.loss)(state.trained, state, batch, KEY)
    taught = softmax(logits_of(method, state.companions["second"], batch["unlabeled"]["image"]))
    pseudo = taught.argmax(-1)[:, ::4, ::4]
    labels = np.asarray(outputs.pixels.labels)[1::2]  # the halves are dealt out in turn
    own, pasted = labels == pseudo, labels == pseudo[::-1]
    assert np.all(own | pasted)
    assert np.any(~own)
    assert np.any(~pasted)
    assert "projection" not in state.companions["second"].params
