"""What the devices of a compiled program send each other, read from its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")
_CALLED = re.compile(r" (?:calls|to_apply|condition|body|\w+_computations?)=(\{.*?\}|[%\w.-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str  # one of KINDS
    size: int  # bytes of its result on one device
    times: float  # executions of the program's one; NaN where a loop's turns are not known
    in_loop: bool
    source: str  # the JAX operation that it comes from

    @property
    def total(self) -> float:
        """Bytes of all its executions."""
        return self.size * self.times


def collectives(program: str) -> list[Collective]:
    """Returns the collectives of an optimised HLO text, those of all branches of a conditional."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[2]
            computations[name] = []
            entry = name if start[1] else entry
        elif name:
            computations[name].append(line)
    assert entry, "no HLO text"

    def walk(name: str, times: float, in_loop: bool) -> Iterator[Collective]:
        for line in computations[name]:
            instruction = _INSTRUCTION.match(line)
            if not instruction:
                continue
            shape, operation = instruction.groups()
            kind = operation.removesuffix("-start")
            turns = 1.0
            if kind in KINDS:
                source = re.search(r'op_name="([^"]*)"', line)
                size = _bytes(shape, of_one=operation != kind and kind != "all-reduce")
                yield Collective(kind, size, times, in_loop, source[1] if source else "")
                continue  # `to_apply` is its sum
            if operation == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                turns = float(known[1]) if known else math.nan
            for called in _CALLED.findall(line):
                for each in re.findall(r"[\w.-]+", called):
                    yield from walk(each, times * turns, in_loop or operation == "while")

    return list(walk(entry, 1.0, False))


def _bytes(shape: str, *, of_one: bool) -> int:
    """Bytes of an array or a tuple of arrays; the largest one's where a tuple holds operands too."""
    sizes = []
    for kind, dims in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return max(sizes, default=0) if of_one else sum(sizes)
