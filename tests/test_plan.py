"""Plans: what is known without a compiler, and one real one for TPUs where libtpu is installed."""

import dataclasses
import json
import logging
import math
import re
from importlib.util import find_spec

import jax
import pytest
from tiny import tiny_config
from toy_network import ToyNetwork

from csc_jax import models
from csc_jax.errors import UserError
from csc_jax.planning import chips, plan
from csc_jax.planning.hlo import Collective, Product, Program
from csc_jax.training import experiment

H100 = chips.GPUS["h100"]


def hardware(chip=H100, devices=8, hops=1):
    return chips.Topology("test", chip, "jax", [None] * devices, hops)


def exchange(kind, size, devices=0, asynchronous=False):
    return Collective(kind, size, devices, asynchronous, 1, False, "")


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("all-gather", 7 / 8 * 9e9 / 450e9),
        ("reduce-scatter", 7 / 8 * 9e9 / 450e9),
        ("all-reduce", 2 * 7 / 8 * 9e9 / 450e9),
        ("collective-permute", 9e9 / 450e9),
    ],
)
def test_an_exchange_takes_as_long_as_its_bytes_on_the_links(kind, seconds):
    assert plan._exchange(exchange(kind, 9 * 10**9), hardware()) == pytest.approx(seconds)


def test_small_exchanges_take_their_hops_and_large_ones_the_network():
    tpus = hardware(chips.TPUS["v5e"], devices=64, hops=8)
    assert plan._exchange(exchange("all-reduce", 64), tpus) == pytest.approx(2 * 8e-6)
    # Four hosts of eight: 50 GB/s a device between hosts, after a sum within each.
    gpus = hardware(devices=32, hops=2)
    found = plan._exchange(exchange("all-reduce", 10**9), gpus)
    assert found == pytest.approx(2 * 31 / 32 * 1e9 / 8 / 50e9)
    assert plan._exchange(exchange("all-gather", 10**9, devices=8), gpus) < found


@pytest.mark.parametrize(
    ("dtype", "precision", "h100", "v5e"),
    [
        ("bf16", "", 989.4e12, 197e12),
        ("f32", "", 494.7e12, 197e12),
        ("f32", "highest", 66.9e12, 197e12 / 6),
        ("f32", "dot_tf32_tf32_f32_x3", 494.7e12 / 3, 197e12 / 3),
    ],
)
def test_products_run_at_the_rate_of_their_precision(dtype, precision, h100, v5e):
    product = Product(1, dtype, precision)
    assert plan._rate(H100, product)[1] == pytest.approx(h100)
    assert plan._rate(chips.TPUS["v5e"], product)[1] == pytest.approx(v5e)


STEP = """HloModule jit_step

ENTRY %main (a: bf16[4096,4096], b: f32[1000,1000,1000]) -> f32[1000] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %b = f32[1000,1000,1000]{2,1,0} parameter(1)
  %product = bf16[4096,4096]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sine = f32[1000,1000,1000]{2,1,0} sine(%b), metadata={op_name="jit(train_step)/transpose(jvp(Net))/body/sin"}
  %sum-start = f32[1000,1000,1000]{2,1,0} all-reduce-start(%sine), replica_groups={{0,1,2,3,4,5,6,7}}
  %sum-done = f32[1000,1000,1000]{2,1,0} all-reduce-done(%sum-start)
  ROOT %sum = f32[1000]{0} all-reduce(%v), replica_groups={{0,1,2,3,4,5,6,7}}
  %v = f32[1000]{0} negate(%sum)
}
"""  # noqa: E501


def test_a_step_is_the_sum_of_what_cannot_go_on_at_once():
    work = plan.work(Program(STEP), hardware())
    product, sine, small = 2 * 4096**3 / 989.4e12, 2 * 4e9 / 3352e9, 2e-6
    assert work["flop"] == {"bfloat16": 2 * 4096**3}
    assert work["product_seconds"] == pytest.approx(product)
    # The large sum goes on beside the rest and is longer than it.
    large = 2 * 7 / 8 * 4e9 / 450e9
    assert work["link_seconds"] == pytest.approx(large + small)
    assert work["step_seconds"] == pytest.approx(large + small)
    without = Program(re.sub(r"^.*sum-(start|done) =.*\n", "", STEP, flags=re.MULTILINE))
    assert plan.work(without, hardware())["step_seconds"] == pytest.approx(
        product + sine + small, rel=1e-4
    )


def test_the_largest_arrays_have_the_names_of_modules():
    (name, size, times), *_ = plan._largest(Program(STEP))
    assert (name, size, times) == ("f32[1000,1000,1000] gradient of body/sin", 4 * 10**9, 1)


@pytest.mark.parametrize(
    ("name", "fields", "classes", "unlabeled"),
    [  # published counts: 372 and 1,323 labelled at 1/8, 183 of VOC's own at 1/8
        ("cityscapes", {}, 19, 2975 - 372),
        ("cityscapes", {"data.cityscapes.extra": True}, 19, 2975 + 19_998 - 372),
        ("pascal_voc", {}, 21, 10_582 - 1323),
        ("pascal_voc", {"data.pascal_voc.pool": "classic"}, 21, 10_582 - 183),
        ("ade20k", {}, 150, 20_210 - 2527),
        ("coco", {}, 81, 118_287 - 14_786),
        ("camvid", {}, 11, 367 - 46),
        ("camvid", {"data.labeled_fraction": "1"}, 11, 367),
    ],
)
def test_published_data_sets_need_no_disk(name, fields, classes, unlabeled):
    config = tiny_config(data__name=name, data__labeled_fraction="1/8")
    config.update_from_flattened_dict(fields)
    assert plan._data_set(config, None, None) == (classes, unlabeled)
    assert plan._data_set(config, 5, 6) == (5, 6)


def test_what_a_plan_cannot_know_is_asked_for():
    config = tiny_config(data__name="folder", train__steps=0, train__epochs=2.0)
    with pytest.raises(UserError, match="--classes=N"):
        plan._data_set(config, None, None)
    with pytest.raises(UserError, match="--unlabeled=N"):
        plan._data_set(config, 3, None)
    assert plan._data_set(config, 3, 100) == (3, 100)
    assert plan._data_set(tiny_config(data__name="folder"), 3, None) == (3, None)


@pytest.mark.parametrize("start", [1, 2, 6, 7, 40])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("largest", [0, 1, 6, 100])
def test_the_largest_batch_is_found_with_few_compilations(start, told, largest):
    asked = []

    def memory(n):
        asked.append(n)
        size = 3.0 + 2 * n + 0.1 * math.sin(n)
        return size if told or n <= largest else math.inf

    capacity = 3.0 + 2 * largest + 1 if largest else 4.0
    assert plan.largest_that_fits(memory, start, capacity) == largest
    assert len(asked) == len(set(asked)) <= (5 if told else 10)


PLAN = plan.Plan(
    topology="h100:16",
    chip="H100",
    devices=16,
    hosts=2,
    versions="jax 1",
    method="csc",
    classes=19,
    crop=(640, 480),
    dtype="bfloat16",
    labeled=64,
    unlabeled=32,
    trace_seconds=3.0,
    compile_seconds=95.0,
    memory=7 * 2**30,
    arguments=2**29,
    capacity=6 * 2**30,
    largest=[("f32[2,2] body/conv", 3 * 2**20, 4)],
    flop={"bfloat16": 3e12, "full float32": 1e12},
    moved=1e11,
    collectives={"all-gather": (40, 2.0**22, 2.0**21)},
    unknown_loops=1,
    product_seconds=0.016,
    memory_seconds=0.032,
    link_seconds=0.004,
    step_seconds=0.048,
    steps=1_800_000,
)


def test_the_screen_says_what_is_planned():
    screen = plan.describe(PLAN)
    for line in (
        r"PLANNED, not measured: csc, 19 classes, 64 \+ 32 images of 640x480 a step, bfloat16",
        r"memory of a device +7 GiB, 512 MiB of them .*may take 6 GiB: DOES NOT FIT",
        r"large array +4 x 3 MiB: f32\[2,2\] body/conv",
        r"products of a device +4 TFLOP \(3 in bfloat16, 1 in full float32\)",
        r"all-gather +40 times, 4 MiB, 2 MiB of them IN LOOPS",
        r"a step, at least +48 ms",
        r"images a second, at most +2,000; each of 2 hosts reads 1,000",
        r"the run, at least +1 days for 1,800,000 steps",
        r"loops of unknown length +1,",
    ):
        assert re.search(line, screen), line


@pytest.mark.parametrize("batch", [16, 64, 640])
def test_the_largest_batch_keeps_the_ratio_of_the_halves(batch, monkeypatch):
    """Room for five times 2 + 1 images a device; 40 + 20 and more do not even compile."""

    def compile_for(config, hardware, known):
        labeled, unlabeled = config.batch.labeled, config.batch.unlabeled
        if labeled >= 40 * 8:
            raise UserError("too many")
        return dataclasses.replace(
            PLAN,
            devices=8,
            labeled=labeled,
            unlabeled=unlabeled,
            memory=2**30 * (1 + labeled // 8 * 10),
        )

    monkeypatch.setattr(plan, "compile_for", compile_for)
    config = tiny_config(batch__labeled=batch, batch__unlabeled=batch // 2, parallel__devices=0)
    chip = dataclasses.replace(H100, memory=101.0 * 2**30)
    found = plan._fit(config, hardware(chip), plan.DataSet(19, None))
    assert found.fits == 5
    # The plan is that of the config itself, or of the largest batch where that does not compile.
    assert found.labeled == 2 * found.unlabeled == (batch if batch < 320 else 80)
    assert "10 + 5 images a device, 80 + 40 together" in plan.describe(found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", r"--topology=v5e .*v5e:4x4 .*h100:8"),
        ("v9:2x2", r"--topology=v9:2x2 .*v4, v5e, v5p, v6e"),
        ("h100:eight", "--topology=h100:eight"),
        ("", "--topology= "),
    ],
)
def test_unknown_hardware_is_answered_with_the_known(name, message):
    with pytest.raises(UserError, match=message):
        chips.topology(name)


def test_a_file_that_cannot_be_written_is_named_before_anything_compiles(tmp_path):
    for out in (tmp_path, tmp_path / "none" / "plan.json"):
        with pytest.raises(UserError, match=f"--out={out} "):
            plan.plan(tiny_config(), "v5e:2x2", out=out)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "plan"), ("h100:8", "gpu")])
def test_a_missing_compiler_is_named_with_its_extra(name, extra, monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"{name} needs .*'\.\[{extra}\]'"):
        chips.topology(name)


@pytest.fixture(scope="module")
def v5e():
    if find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install -e '.[plan]'")
    return chips.topology("v5e:2x2")


def toy_config(monkeypatch, **overrides):
    monkeypatch.setattr(models, "build", lambda config, classes, **_: ToyNetwork(classes))
    return tiny_config(parallel__devices=0, model__projection_dim=4, **overrides)


def test_a_missing_cudnn_is_named_with_its_package(monkeypatch):
    def lower(*_):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(plan, "lower_step", lower)
    here = chips.Topology("h100:1", H100, "jax", jax.devices()[:1], 1)
    with pytest.raises(UserError, match="nvidia-cudnn-cu12"):
        plan.compile_for(tiny_config(), here, plan.DataSet(3, 100))


def test_slices_that_cannot_be_are_refused(v5e):
    assert (len(v5e.devices), v5e.hops) == (4, 2)
    with pytest.raises(UserError, match=r"v5e:3x3 is no slice that libtpu knows"):
        chips.topology("v5e:3x3")


def test_a_small_run_is_planned_for_four_tpus(v5e, monkeypatch, tmp_path, caplog):
    config = toy_config(monkeypatch, train__steps=0, train__epochs=3.0)
    caplog.set_level(logging.INFO, "csc_jax")
    plan.plan(config, "v5e:2x2", out=tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert "PLANNED, not measured: csc, 7 classes, 4 + 4 images of 32x32" in caplog.text
    assert (found["devices"], found["hosts"]) == (4, 1)
    assert found["steps"] == 3 * (12 // 4)  # 16 images, a quarter labelled
    built = experiment.build(config, tuple("abcdefg"), None, v5e.devices)
    state = jax.tree.leaves(built.abstract_state())
    assert sum(x.size * x.dtype.itemsize for x in state) < found["arguments"] < found["memory"]
    parameters = built.abstract_state().student.params
    gradients = 4 * sum(x.size for x in jax.tree.leaves(parameters))
    assert found["collectives"]["all-reduce"][1] >= gradients
    assert found["flop"]["bfloat16"] > 0  # what float32 is on a TPU unless more is asked for
    assert 0 < found["step_seconds"] < 1e-3
    assert found["images_per_second"] == pytest.approx(8 / found["step_seconds"])


def test_a_batch_that_does_not_divide_is_refused(v5e, monkeypatch):
    config = toy_config(monkeypatch, batch__labeled=2)
    with pytest.raises(UserError, match=r"batch\.labeled is 2.*the 4 devices"):
        plan.compile_for(config, v5e, plan.DataSet(7, None))


def test_a_step_that_wants_too_much_memory_is_one_paragraph(v5e, monkeypatch):
    # 10,000 x 10,000 px: the images of a device alone are more than its 16 GiB.
    config = toy_config(
        monkeypatch,
        method__name="supervised",
        data__crop_size=(10_000, 10_000),
        batch__labeled=40,
        batch__unlabeled=4,
    )
    with pytest.raises(UserError, match=r"supervised with 40 \+ 4 images .*more memory") as error:
        plan.compile_for(config, v5e, plan.DataSet(7, None))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="with no batch at all"):
        plan._fit(config, v5e, plan.DataSet(7, None))


@pytest.mark.skipif(find_spec("jax_plugins") is None, reason="no plugin: pip install -e '.[gpu]'")
def test_gpus_come_in_hosts_of_eight():
    found = chips.topology("h100:16")
    assert (len(found.devices), found.hops) == (16, 2)
    assert {device.process_index for device in found.devices} == {0, 1}
    assert {device.compute_capability for device in found.devices} == {"9.0"}
    assert len(chips.topology("a100:3").devices) == 3
    with pytest.raises(UserError, match=r"h100:12 has 12 GPUs; give 1 to 8, or a multiple of 8"):
        chips.topology("h100:12")
