"""Reads the text of a compiled program: what runs how often, what it computes, moves and sends.

XLA's own cost analysis counts the body of a loop once, and says nothing of a program for a GPU that
is not there. Where the text does not say how often a loop turns, it counts once here too
(`Program.unknown_loops`). All numbers are those of one device.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Neither compute nor move anything by themselves.
FREE = (
    *("after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter"),
    *("partition-id", "replica-id", "tuple", "while", "conditional", "call"),
)
# A TPU's fusion of other work with a part of an exchange, and what the latter consists of.
_GOES_ON = "async_collective_fusion"
_CARRIED = (*COLLECTIVES, "custom-call", "get-tuple-element", "parameter", "tuple")
_SLICES = ("dynamic-slice", "gather", "slice")  # read as much as they yield

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_OPERANDS = re.compile(r"(.*?)\)(?:, [a-z_]+=|$)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")


class Array(NamedTuple):
    """One array of a type."""

    dtype: str  # as in the text: f32, bf16, s32, pred
    dims: tuple[int, ...]
    bytes: int
    stored: int  # bytes of main memory, a TPU's padding to whole tiles included; 0 on the chip


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]  # of the result, a tuple's one after the other
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # the line from the operands on
    is_root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def stored(self) -> int:
        """Bytes of main memory that the result takes; see `Array`."""
        return sum(array.stored for array in self.arrays)

    @property
    def source(self) -> str:
        """What the program's text calls it: the path of modules and functions; "" if nothing."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """Returns the value of an attribute, "" if it has none; of braces what is within."""
        found = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|([^\s,]+))", self.attributes)
        return (found[1] or found[2] or "") if found else ""


class Execution(NamedTuple):
    """An instruction that a device carries out."""

    instruction: Instruction
    computation: str  # that it stands in
    times: int  # a step: the turns of the loops around it, multiplied
    in_loop: bool


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str  # one of COLLECTIVES
    bytes: int  # of the whole array: what a gather yields, what a reduction or a permutation takes
    devices: int  # that exchange with each other; 0 = all
    asynchronous: bool  # other work goes on meanwhile
    times: int
    in_loop: bool
    source: str


class Product(NamedTuple):
    """A matrix product or convolution, or what an attention consists of, as one."""

    flops: int  # 2 for each multiplication with an element that is no padding
    dtype: str  # of the factors
    precision: str  # "", "high", "highest" or the name of an algorithm


class Program:
    """A compiled program, read from `jax.stages.Compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.unknown_loops: list[str] = []  # bodies of loops whose turns the text does not tell
        self._entry = ""
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                lines = self.computations[head[2]] = {}
                if head[1]:
                    self._entry = head[2]
            elif found := _INSTRUCTION.match(line):
                root, name, kind, opcode, rest = found.groups()
                inner = _OPERANDS.match(rest)
                operands = tuple(re.findall(r"%([\w.\-]+)", inner[1])) if inner else ()
                lines[name] = Instruction(
                    name, _arrays(kind), opcode, operands, rest, root is not None
                )
        self.executions = self._walk(self._entry, 1, in_loop=False)

    def collectives(self) -> list[Collective]:
        """Returns the exchanges, wherever they stand.

        A TPU's compiler writes one that other work goes on beside into several fusions: that which
        starts it, those with the other work, also in loops, and that which ends it. It counts once,
        where it starts.
        """
        found: list[Collective] = []
        for execution in self.executions:
            for computation, instruction in self._inside(execution):
                each = self._collective(execution, computation, instruction)
                goes_on = computation.startswith(_GOES_ON)
                ends = execution.instruction.name.startswith("async-collective-done")
                if each and not goes_on and not ends:
                    found.append(each)
        return found

    def products(self, execution: Execution) -> list[Product]:
        """Returns the products in an instruction, those of a fusion included."""
        return [
            found
            for computation, instruction in self._inside(execution)
            if (found := self._product(computation, instruction))
        ]

    def bytes_moved(self, execution: Execution) -> int:
        """Returns the bytes of main memory that an instruction reads and writes, once.

        Of an array that it only slices, those of the slices.
        """
        instruction, lines = execution.instruction, self.computations[execution.computation]
        operands = [lines[name].stored for name in instruction.operands]
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return 0
        if instruction.opcode == "slice-start":
            whole, part = instruction.arrays[:2]
            return part.bytes * (whole.stored > 0) + part.stored
        # The result of what starts holds the operands as well.
        asynchronous = instruction.opcode.endswith("-start")
        if asynchronous and instruction.opcode != "fusion-start":
            return max(instruction.stored, sum(operands))
        if instruction.opcode == "dynamic-update-slice":  # in place
            return 2 * operands[1]
        if instruction.opcode in _SLICES:
            return 2 * instruction.stored
        called = instruction.attribute("calls").lstrip("%")
        fused = self.computations.get(called, {})
        root = next((line for line in fused.values() if line.is_root), None)
        written = root.stored if asynchronous and root is not None else instruction.stored
        if root is not None and root.opcode == "dynamic-update-slice":
            written = fused[root.operands[1]].stored
        if root is not None and called.startswith(_GOES_ON):  # the exchange's arrays are handed on
            results = zip(instruction.arrays, root.operands, strict=False)
            written = sum(x.stored for x, name in results if fused[name].opcode not in _CARRIED)
        read = [self._bytes_read(called, i, whole) for i, whole in enumerate(operands)]
        return written + sum(map(min, read, operands))

    def _bytes_read(self, called: str, number: int, whole: int) -> int:
        """Returns how much a fusion reads of its operand of that number."""
        fused = self.computations.get(called, {})
        lines, read = fused.values(), 0
        wanted = [
            x.name
            for x in lines
            if x.opcode == "parameter" and x.attributes.startswith(f"{number})")
        ]
        while wanted:
            name = wanted.pop()
            for line in lines:
                if name not in line.operands:
                    continue
                if called.startswith(_GOES_ON) and line.opcode in _CARRIED:
                    continue
                if line.opcode == "bitcast":
                    wanted.append(line.name)
                elif line.opcode in _SLICES and line.operands[0] == name:
                    read += line.stored
                elif line.opcode == "dynamic-update-slice" and line.operands[0] == name:
                    continue  # what is there already stays
                elif line.opcode == "fusion":  # one within another
                    inner = line.attribute("calls").lstrip("%")
                    read += self._bytes_read(inner, line.operands.index(name), whole)
                else:
                    return whole
        return read if fused else whole

    def _walk(self, name: str, times: int, *, in_loop: bool) -> list[Execution]:
        found: list[Execution] = []
        for line in self.computations[name].values():
            found.append(Execution(line, name, times, in_loop))
            if line.opcode == "while":
                turns = self._turns(line)
                body = line.attribute("body").lstrip("%")
                if turns is None:
                    self.unknown_loops.append(body)
                for part in (body, line.attribute("condition").lstrip("%")):
                    found += self._walk(part, times * (1 if turns is None else turns), in_loop=True)
            elif line.opcode == "conditional":
                names = line.attribute("branch_computations") or ",".join(
                    line.attribute(f"{value}_computation") for value in ("true", "false")
                )
                branches = [
                    self._walk(branch.strip().lstrip("%"), times, in_loop=in_loop)
                    for branch in names.split(",")
                ]
                found += max(branches, key=lambda each: sum(map(self._weight, each)))
            elif line.opcode == "call":
                found += self._walk(line.attribute("to_apply").lstrip("%"), times, in_loop=in_loop)
        return found

    def _weight(self, execution: Execution) -> int:
        return execution.times * execution.instruction.bytes

    def _turns(self, loop: Instruction) -> int | None:
        """Returns how often a loop turns: as XLA says, or the one bound that its condition has."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        bounds, todo = [], [loop.attribute("condition").lstrip("%")]
        while todo:
            for line in self.computations.get(todo.pop(), {}).values():
                if line.opcode == "constant" and line.arrays[0].dtype in ("s32", "u32"):
                    bounds += re.findall(r"^(\d+)\)", line.attributes)
                todo += [line.attribute("calls").lstrip("%")]
        return int(bounds[0]) if len(bounds) == 1 else None

    def _inside(self, execution: Execution) -> Iterator[tuple[str, Instruction]]:
        """Yields an instruction and all that it is fused of, each with its computation."""
        todo = [(execution.computation, execution.instruction)]
        while todo:
            computation, line = todo.pop()
            yield computation, line
            called = line.attribute("calls").lstrip("%")
            todo += [(called, each) for each in self.computations.get(called, {}).values()]

    def _collective(
        self, execution: Execution, computation: str, line: Instruction
    ) -> Collective | None:
        kind = line.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        lines = self.computations[computation]
        taken = sum(lines[name].bytes for name in line.operands)
        given = line.bytes
        started = line.opcode.endswith("-start")
        if started and kind != "all-reduce":  # the result holds the operands as well
            given -= taken
        return Collective(
            kind,
            max(taken, given),
            _group(line.attributes),
            (started and '"is_sync":true' not in line.attributes)
            or execution.instruction.opcode == "async-start"
            or execution.instruction.name.startswith("async-collective-start"),
            execution.times,
            execution.in_loop,
            line.source,
        )

    def _product(self, computation: str, line: Instruction) -> Product | None:
        target = line.attribute("custom_call_target").strip('"')
        factors = [self.computations[computation][name].arrays for name in line.operands[:2]]
        if line.opcode == "dot" or target.startswith(("__cublas$", "__triton_gemm")):
            axes = re.search(
                r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d,"]*)', line.attributes
            )
            lhs = factors[0][0]
            depth = math.prod(lhs.dims[int(i)] for i in re.findall(r"\d+", axes[1] if axes else ""))
            flops = 2 * depth * math.prod(line.arrays[0].dims)
        elif line.opcode == "convolution" or target.startswith("__cudnn$conv"):
            lhs = factors[0][0]
            flops = _convolution(line, lhs.dims, factors[1][0].dims, target)
        elif target.startswith("__cudnn$fmha"):
            # (B, N, T, K / T) each. Scores and mixture; backward the scores again, two of each.
            lhs = factors[0][0]
            flops = 2 * (5 if "Backward" in target else 2) * math.prod(lhs.dims)
            flops *= factors[1][0].dims[1]
        else:
            return None
        precision = line.attribute("algorithm") or line.attribute("operand_precision")
        return Product(flops, lhs.dtype, precision.partition(",")[0])


@functools.cache
def _arrays(kind: str) -> tuple[Array, ...]:
    return tuple(_array(*found) for found in _ARRAY.findall(kind))


def _array(dtype: str, dims: str, layout: str) -> Array:
    sides = tuple(int(side.lstrip("<=")) for side in dims.split(",") if side)
    bits = re.search(r"\d+", dtype)
    size = int(bits[0]) / 8 if bits else float(dtype == "pred")  # a token has none
    order, _, memory = layout.partition(":")
    axes = [int(axis) for axis in order.split(",") if axis] or range(len(sides))
    padded = [sides[axis] for axis in axes]  # the minor one first
    if tile := re.search(r"T\(([\d,]+)\)", memory):
        for i, side in enumerate(reversed(tile[1].split(","))):
            if i < len(padded):
                padded[i] = -(-padded[i] // int(side)) * int(side)
    on_chip = re.search(r"S\([1-9]", memory) is not None  # a TPU's vector or scalar memory
    stored = 0 if on_chip else math.ceil(size * math.prod(padded))
    return Array(dtype, sides, math.ceil(size * math.prod(sides)), stored)


def _group(attributes: str) -> int:
    """Returns the devices of a group from the three ways in which XLA writes groups; 0 = all."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    return 0


def _convolution(line: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...], target: str) -> int:
    """Returns the FLOP of a convolution, or of a gradient of one that cuDNN computes."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    if not found:
        raise ValueError(f"a convolution without dim_labels: {line.name}")
    result = line.arrays[0].dims
    # What cuDNN computes is described as the convolution whose gradient it is.
    arrays = [lhs, rhs, result]
    if "BackwardInput" in target:
        arrays = [result, rhs, lhs]
    elif "BackwardFilter" in target:
        arrays = [lhs, result, rhs]
    image, kernel, output = (
        dict(zip(labels, dims, strict=False))
        for labels, dims in zip(found.groups(), arrays, strict=True)
    )
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", line.attribute("window")))
    axes = [label for label in found[2] if label.isdigit()]
    flops = 2 * image["b"] * kernel["i"] * kernel["o"]
    flops //= int(line.attribute("batch_group_count") or 1)
    for axis in axes:
        options = {name: values.split("x")[int(axis)] for name, values in window.items()}
        flops *= _products_of_an_axis(image[axis], kernel[axis], output[axis], options)
    return flops


def _products_of_an_axis(length: int, window: int, positions: int, options: dict[str, str]) -> int:
    """Returns how many pairs of window element and position meet an element of the image."""
    stride, spread, apart = (
        int(options.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate")
    )
    before = int(options.get("pad", "0_0").partition("_")[0])
    place = np.arange(positions)[:, None] * stride + np.arange(window)[None] * spread - before
    inside = (place >= 0) & (place <= (length - 1) * apart) & (place % apart == 0)
    return int(inside.sum())
