"""The reader of compiled programs against XLA's own cost analysis and programs of known content."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from csc_jax.planning.hlo import Program

CONVOLUTIONS = {
    "plain": {},
    "strided": {"window_strides": (2, 3)},
    "dilated": {"rhs_dilation": (2, 4), "padding": ((2, 2), (4, 4))},
    "transposed": {"lhs_dilation": (2, 2), "padding": ((1, 2), (2, 1))},
    "unpadded": {"padding": ((0, 0), (0, 0))},
    "grouped": {"feature_group_count": 4},
}


def convolve(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1))} | options
    return jax.lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def flop(program):
    return sum(
        execution.times * product.flops
        for execution in program.executions
        for product in program.products(execution)
    )


def compiled_on(devices, function, *arguments):
    place = NamedSharding(devices, PartitionSpec("data"))
    return jax.jit(function, in_shardings=place).lower(*arguments).compile()


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("gradient", ["none", "input", "kernel"])
def test_products_of_convolutions_are_as_many_as_xla_counts(name, gradient):
    options = CONVOLUTIONS[name]
    x = jnp.ones((2, 9, 12, 8))
    kernel = jnp.ones((3, 3, 8 // options.get("feature_group_count", 1), 12))
    of_input = partial(convolve, kernel=kernel, **options)
    of_kernel = partial(convolve, x, **options)
    above = jnp.ones(of_input(x).shape)
    function, argument = {
        "none": (of_input, x),
        "input": (lambda above: jax.vjp(of_input, x)[1](above), above),
        "kernel": (lambda above: jax.vjp(of_kernel, kernel)[1](above), above),
    }[gradient]
    compiled = jax.jit(function).lower(argument).compile()
    np.testing.assert_allclose(
        flop(Program(compiled.as_text())), compiled.cost_analysis()["flops"], rtol=1e-3
    )


def test_products_of_matrices():
    a, b = jnp.ones((5, 3, 7)), jnp.ones((5, 7, 2))
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    assert flop(Program(compiled.as_text())) == 2 * 5 * 3 * 7 * 2


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_precisions_are_named(precision):
    x = jnp.ones((2, 2))
    compiled = jax.jit(partial(jnp.matmul, precision=precision)).lower(x, x).compile()
    program = Program(compiled.as_text())
    (found,) = [product for each in program.executions for product in program.products(each)]
    assert (found.dtype, found.precision) == ("f32", precision)


def test_exchanges_count_as_often_as_their_loop_turns(mesh4):
    """A gather before the loop, a sum in each turn of two loops within each other."""

    def each(x):
        def inner(_, x):
            return jax.lax.psum(jnp.sin(x), "data")

        x = jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.fori_loop(0, 7, inner, x), x)
        return jax.lax.psum(jax.lax.all_gather(x, "data"), "data")

    split, whole = PartitionSpec("data"), PartitionSpec()
    function = jax.shard_map(each, mesh=mesh4, in_specs=split, out_specs=whole, check_vma=False)
    program = Program(compiled_on(mesh4, function, jnp.ones((8, 6))).as_text())
    found = {c.kind + " in a loop" * c.in_loop: c for c in program.collectives()}
    assert set(found) == {"all-reduce in a loop", "all-gather", "all-reduce"}
    assert found["all-reduce in a loop"].times == 35
    assert found["all-reduce in a loop"].bytes == 2 * 6 * 4
    assert found["all-gather"].times == found["all-reduce"].times == 1
    assert found["all-gather"].bytes == found["all-reduce"].bytes == 8 * 6 * 4
    assert {c.devices for c in found.values()} == {4}
    assert not program.unknown_loops


def test_a_loop_without_a_known_length_is_named(mesh4):
    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100.0, lambda x: x * 2, x)

    program = Program(compiled_on(mesh4, function, jnp.ones((8, 6))).as_text())
    assert len(program.unknown_loops) == 1
    # What its condition asks of the other devices is asked in each turn.
    assert [(each.kind, each.in_loop) for each in program.collectives()] == [("all-reduce", True)]


def test_of_a_condition_the_dearer_branch_counts():
    def function(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x + 1, x)

    text = jax.jit(function).lower(True, jnp.ones((8, 8))).compile().as_text()
    assert flop(Program(text)) == 2 * (2 * 8**3)


# In the ways in which the compilers for GPUs and TPUs write what a CPU's has not.
TEXT = """HloModule jit_step, is_scheduled=true

%fused_slice (p.0: f32[10,64,8], p.1: s32[]) -> f32[1,64,8] {
  %p.0 = f32[10,64,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,64,8]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,8}
}

%outer (p.4: f32[10,64,8], p.5: s32[]) -> f32[1,64,8] {
  %p.4 = f32[10,64,8]{2,1,0} parameter(0)
  %p.5 = s32[] parameter(1)
  %inner = f32[1,64,8]{2,1,0} fusion(%p.4, %p.5), kind=kLoop, calls=%fused_slice
  ROOT %minus = f32[1,64,8]{2,1,0} negate(%inner)
}

%start (p.2: f32[64]) -> (f32[64], f32[4,64]) {
  %p.2 = f32[64] parameter(0)
  %gather.1 = f32[4,64] all-gather(%p.2), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %both.1 = (f32[64], f32[4,64]) custom-call(%p.2, %gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.3: f32[64], p.6: f32[9]) -> (f32[9], f32[4,64]) {
  %p.6 = f32[9] parameter(1)
  %work = f32[9] negate(%p.6)
  %p.3 = f32[64] parameter(0)
  %gather.2 = f32[4,64] all-gather(%p.3), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %step = f32[4,64] custom-call(%p.3, %gather.2), custom_call_target="AsyncCollectiveStep"
  ROOT %other.1 = (f32[9], f32[4,64]) tuple(%work, %step)
}

ENTRY %main (a: f32[2,20,20,64], k: f32[32,3,3,64], g: f32[2,10,10,32], s: f32[10,64,8], i: s32[]) -> f32[2,20,20,64] {
  %a = f32[2,20,20,64]{3,2,1,0} parameter(0)
  %k = f32[32,3,3,64]{3,2,1,0} parameter(1)
  %g = f32[2,10,10,32]{3,2,1,0} parameter(2)
  %s = f32[10,64,8]{2,1,0} parameter(3)
  %i = s32[] parameter(4)
  %cudnn-conv.1 = (f32[2,10,10,32]{3,2,1,0}, u8[0]{0}) custom-call(%a, %k), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %cudnn-conv.2 = (f32[2,20,20,64]{3,2,1,0}, u8[0]{0}) custom-call(%g, %k), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %cudnn-conv.3 = (f32[32,3,3,64]{3,2,1,0}, u8[0]{0}) custom-call(%a, %g), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %gather-start = (f32[2,10,10,32]{3,2,1,0}, f32[8,10,10,32]{3,2,1,0}) all-gather-start(%g), replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(train_step)/gather"}
  %gather-done = f32[8,10,10,32]{3,2,1,0} all-gather-done(%gather-start)
  %sum = (f32[64]{0:T(128)S(1)}, f32[64]{0:T(128)S(1)}) all-reduce(%v, %v), replica_groups=mesh['data'=4,'fsdp'=2] {'data','fsdp'}, to_apply=%add
  %v = f32[64]{0:T(128)S(1)} fusion(%i), kind=kLoop, calls=%none
  %tiled = bf16[2,161,64]{2,1,0:T(8,128)(2,1)} fusion(%v), kind=kLoop, calls=%none
  %async-collective-start = (f32[64], f32[4,64]) fusion(%v), kind=kCustom, calls=%start
  %nine = f32[9] negate(%i)
  %other = (f32[9], f32[4,64]) fusion(%v, %nine), kind=kCustom, calls=%async_collective_fusion.1
  %async-collective-done = f32[4,64] fusion(%v), kind=kCustom, calls=%start
  %slice-start.1 = (f32[10,64,8]{2,1,0}, f32[2,64,8]{2,1,0:T(8,128)S(1)}, s32[]) slice-start(%s), slice={[0:2], [0:64], [0:8]}
  %bare = f32[3,5] negate(%i)
  %one = f32[1,64,8]{2,1,0} fusion(%s, %i), kind=kLoop, calls=%fused_slice
  %within = f32[1,64,8]{2,1,0} fusion(%s, %i), kind=kOutput, calls=%outer
  ROOT %out = f32[2,20,20,64]{3,2,1,0} get-tuple-element(%cudnn-conv.2), index=0
}
"""  # noqa: E501


def test_what_cudnn_computes_has_the_flop_of_its_convolution():
    program = Program(TEXT)
    found = {
        execution.instruction.name: product.flops
        for execution in program.executions
        for product in program.products(execution)
    }
    # Of 10 positions along an axis all but the first meet three pixels, the first two.
    expected = 2 * 2 * 64 * 32 * (3 * 10 - 1) ** 2
    assert found == {f"cudnn-conv.{i}": expected for i in (1, 2, 3)}


ATTENTION = """HloModule jit_attend, num_partitions=1

ENTRY %main (q: bf16[2,9,6,64], k: bf16[2,9,6,64], m: f32[2,6,9]) -> bf16[2,6,9,64] {
  %q = bf16[2,9,6,64]{3,2,1,0} parameter(0)
  %k = bf16[2,9,6,64]{3,2,1,0} parameter(1)
  %m = f32[2,6,9]{2,1,0} parameter(2)
  %forward = (bf16[2,6,9,64]{3,1,2,0}, f32[2,6,9]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[2,9,6,64]{3,2,1,0}}
  %backward = (bf16[2,6,9,64]{3,1,2,0}, bf16[2,6,9,64]{3,1,2,0}, bf16[2,6,9,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k, %m, %q, /*index=5*/%k), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %out = bf16[2,6,9,64]{3,1,2,0} get-tuple-element(%forward), index=0
}
"""  # noqa: E501


STACK = """HloModule jit_scan, num_partitions=1

%wrapped_update (p.0: f32[12,2,8], p.1: s32[], p.2: f32[2,8]) -> f32[12,2,8] {
  %p.0 = f32[12,2,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[2,8]{1,0} parameter(2)
  %whole = f32[1,2,8]{2,1,0} bitcast(%p.2)
  %zero = s32[] constant(0)
  ROOT %update = f32[12,2,8]{2,1,0} dynamic-update-slice(%p.0, %whole, %p.1, %zero, %zero)
}

ENTRY %main (a: f32[12,2,8], i: s32[], x: f32[2,8]) -> f32[12,2,8] {
  %a = f32[12,2,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[2,8]{1,0} parameter(2)
  %start = ((f32[12,2,8]{2,1,0}, s32[], f32[2,8]{1,0}), f32[12,2,8]{2,1,0}, u32[]) fusion-start(%a, %i, %x), kind=kLoop, calls=%wrapped_update
  ROOT %done = f32[12,2,8]{2,1,0} fusion-done(%start)
}
"""  # noqa: E501


def test_a_slice_that_is_written_beside_other_work_is_no_whole_array():
    program = Program(STACK)
    (start,) = (e for e in program.executions if e.instruction.opcode == "fusion-start")
    assert program.bytes_moved(start) == 2 * 2 * 8 * 4 + 4  # read and written, and the index


def test_fused_attention_has_the_flop_of_its_products():
    program = Program(ATTENTION)
    found = {
        execution.instruction.name: product
        for execution in program.executions
        for product in program.products(execution)
    }
    one = 2 * 2 * 6 * 9 * 9 * 64  # of queries with keys, for two images and six heads
    assert {name: product.flops for name, product in found.items()} == {
        "forward": 2 * one,
        "backward": 5 * one,
    }
    assert {product.dtype for product in found.values()} == {"bf16"}


def test_asynchronous_and_grouped_exchanges():
    gather, total, once = Program(TEXT).collectives()
    assert (gather.kind, gather.bytes, gather.devices) == ("all-gather", 8 * 10 * 10 * 32 * 4, 4)
    assert gather.asynchronous
    assert gather.source == "jit(train_step)/gather"
    assert (total.kind, total.bytes, total.devices) == ("all-reduce", 2 * 64 * 4, 8)
    assert not total.asynchronous
    # Of a TPU, in the fusion that starts it and again in the one with other work.
    assert (once.kind, once.bytes, once.devices, once.times) == ("all-gather", 4 * 64 * 4, 4, 1)
    assert once.asynchronous


def test_memory_traffic_knows_tiles_slices_and_memory_on_the_chip():
    program = Program(TEXT)
    moved = {e.instruction.name: program.bytes_moved(e) for e in program.executions}
    assert moved["tiled"] == 2 * 168 * 128 * 2  # tiles of 8 x 128, factor on the chip
    # One slice of ten read, one written, the index; also where a fusion is within another.
    assert moved["one"] == moved["within"] == 2 * 64 * 8 * 4 + 4
    assert moved["slice-start.1"] == 2 * 64 * 8 * 4  # onto the chip
    assert moved["other"] == 2 * 9 * 4  # what an exchange hands on meanwhile stays where it is
    assert moved["v"] == 4
    assert moved["bare"] == 3 * 5 * 4 + 4
    assert moved["out"] == moved["a"] == 0
    assert moved["cudnn-conv.1"] == 4 * (2 * 400 * 64 + 9 * 64 * 32 + 2 * 100 * 32)


def test_traffic_of_a_program_is_what_xla_counts():
    """For instructions that read all of their operands: the same by XLA's own analysis."""
    x = jnp.ones((64, 33))
    compiled = jax.jit(lambda x: jnp.tanh(x @ x.T)).lower(x).compile()
    program = Program(compiled.as_text())
    moved = sum(program.bytes_moved(execution) for execution in program.executions)
    np.testing.assert_allclose(moved, compiled.cost_analysis()["bytes accessed"], rtol=0.02)
