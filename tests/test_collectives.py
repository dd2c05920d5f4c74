"""What goes over the wire in a step, read from compiled programs: where, how often and how much.

They are compiled for eight virtual CPU devices, without the pass that takes exchanges out of loops:
the compilers of GPUs and TPUs leave them there.
"""

import jax
import jax.numpy as jnp
import pytest
from contrast_cases import AS_WRITTEN, compiled_module
from jax.sharding import NamedSharding, PartitionSpec
from tiny import CLASSES, tiny_config
from toy_network import toy_harness

from csc_jax import contrast, methods
from csc_jax.parallel import sharding
from csc_jax.planning.hlo import Program
from csc_jax.training.step import abstract_state


@pytest.mark.parametrize(
    ("top_n", "with_bank", "max_keys"),
    [(1, True, 0), (3, True, 0), (None, True, 0), (1, False, 0), (1, True, 1000)],
)
def test_what_the_module_sends_grows_with_the_samples_alone(top_n, with_bank, max_keys):
    """At sizes of many blocks: the samples cross once, and nothing does in a loop."""
    classes, dim, views, new, pixels = 19, 256, 50, 10, 64 * 64
    mesh, sent = sharding.make_mesh(8), {}
    for images in (16, 32):
        shapes = (
            jax.ShapeDtypeStruct((images, pixels, dim), jnp.float32),
            jax.ShapeDtypeStruct((images, pixels), jnp.int32),
            jax.ShapeDtypeStruct((images, pixels), jnp.int32),
            jax.eval_shape(lambda: contrast.init_memory_bank(classes, 2000, dim)),
            jax.eval_shape(lambda b=images: jax.random.split(jax.random.key(0), b)),
        )
        constants = {"views": views, "new": new, "top_n": top_n, "with_bank": with_bank}
        program = Program(compiled_module(shapes, mesh, max_keys=max_keys, **constants).as_text())
        collectives = program.collectives()
        assert not [each for each in collectives if each.in_loop]
        # A key or what is new for the bank, and a few numbers that go with it. Of bounded keys also
        # the gradient.
        keys = 2 * max_keys or images * classes * views
        samples = (keys + images * classes * new) * (dim + 8) * 4
        sent[images] = sum(each.bytes * each.times for each in collectives)
        assert 0.9 * samples < sent[images] < 1.02 * samples, sent[images] / samples
        turns = [each.times for each in program.executions if each.in_loop]
        assert max(turns) > 10  # blocks, so that an exchange in a loop would have been seen
    assert sent[32] < 2.01 * sent[16]


def test_an_exchange_in_a_loop_would_be_seen(mesh4):
    whole, split = (NamedSharding(mesh4, spec) for spec in (PartitionSpec(), PartitionSpec("data")))

    def total(x):
        return jax.lax.fori_loop(0, 5, lambda _, t: jnp.sum(x * t), 1.0)

    program = jax.jit(total, in_shardings=split, out_shardings=whole).lower(jnp.zeros(4000))
    text = program.compile(compiler_options=AS_WRITTEN).as_text()
    assert sum(each.times for each in Program(text).collectives() if each.in_loop) >= 5


IMAGES, SIDE, DIM = 16, 128, 8  # of each half, two a device; px; channels of all features
# The smallest map, labels of a device's images at stride 4 as bytes, is as large; the next has 16
# times as many. Counts, metrics and statistics of BatchNorm are smaller together.
SMALL = 4096


def step_program(method, fsdp, monkeypatch, **more):
    """Returns the train step of a method and the bytes of what it trains."""
    monkeypatch.setattr(sharding, "_SMALLEST", 1)  # fsdp splits the toy network as it would others
    fields = {f"cct__{name}": 1 for name in ("con_msk", "dropout", "f_drop", "f_noise")}
    fields |= {f"cct__{name}": 1 for name in ("g_cutout", "i_vat", "obj_msk")}
    fields |= {"gct__detector_width": 4, "u2pl__queue_size": 50, "u2pl__queue_size_first": 50}
    fields |= {"u2pl__anchors": 8}
    for view in ("", "unimatch_view__"):  # which no device asks another for
        fields |= {f"{view}{name}": 0.0 for name in ("color_jitter", "grayscale", "blur")}
    config = tiny_config(
        **{f"method__{name}": value for name, value in fields.items()},
        method__name=method,
        data__crop_size=(SIDE, SIDE),
        batch__labeled=IMAGES,
        batch__unlabeled=IMAGES,
        loss__name="ohem",
        loss__ohem_min_kept=1000,
        **more,
    )
    harness = toy_harness(config, devices=8, fsdp=fsdp)
    state = abstract_state(harness.method, harness.tx, harness.mesh)
    trained = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.trained))
    return Program(harness.lower().compile(compiler_options=AS_WRITTEN).as_text()), trained


def samples(method, config):
    """Bytes of what a method asks of the pixels of all images: keys of a contrastive loss."""
    if method == "csc":
        slots = config.contrast.views_per_class + config.contrast.pixels_per_class
        return 2 * IMAGES * CLASSES * slots * (DIM + 8) * 4
    if method == "u2pl":  # any pixel may enter a queue
        pixels = 2 * IMAGES * (SIDE // 4) ** 2
        return pixels * (DIM * 4 + 2 * CLASSES)
    return 0


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize("method", methods.available())
def test_a_step_sends_gradients_once_and_no_maps(method, fsdp, monkeypatch):
    program, trained = step_program(method, fsdp, monkeypatch)
    collectives = program.collectives()
    assert not [each for each in collectives if each.in_loop]
    # CutMix pastes the next image of the batch, of a device's last one the next device's first.
    pasted = [each for each in collectives if "_roll_static" in each.source]
    assert {each.kind for each in pasted} <= {"collective-permute"}
    assert max((each.bytes for each in pasted), default=0) <= SIDE * SIDE * 3 * 4
    sent = {}
    for each in collectives:
        if each not in pasted:
            sent[each.kind] = sent.get(each.kind, 0) + each.bytes * each.times
    # With fsdp each part is summed over the devices that have it, once more.
    summed = sent.pop("all-reduce") + sent.pop("reduce-scatter", 0)
    assert trained <= summed <= trained * (1 + (fsdp > 1) / fsdp) + SMALL
    # … and each kernel is gathered for each pass, forward and backward, of each network.
    kernels = 8 * trained if fsdp > 1 else 0
    assert sum(sent.values()) <= samples(method, tiny_config()) + kernels + SMALL, sent


def test_accumulation_sends_gradients_once_a_part_and_no_maps(monkeypatch):
    parts = 2
    program, trained = step_program("csc", 1, monkeypatch, train__accumulate=parts)
    sent = {"all-reduce": 0, "collective-permute": 0}
    for each in program.collectives():
        sent[each.kind] = sent.get(each.kind, 0) + each.bytes * each.times
    # Of each part its gradients, what CutMix pastes of the next device's image and label, and the
    # keys of both halves. No image changes its device.
    assert trained <= sent.pop("all-reduce") <= parts * (trained + SMALL)
    assert sent.pop("collective-permute") <= parts * SIDE * SIDE * (3 + 1) * 4
    assert sum(sent.values()) <= samples("csc", tiny_config()) + SMALL, sent
