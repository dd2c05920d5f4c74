"""Compiles the step of a run for hardware that is not there, and says what the program promises.

Nothing runs. Memory is what the compiler has laid out. Times are lower bounds from the rates in
`chips.py`: an instruction takes as long as its products or its traffic with the memory, whichever
is more, one comes after the other, and so does an exchange between devices unless the compiler lets
other work go on meanwhile. Arithmetic without products, what a program does between instructions,
and waiting for images are free here.
"""

import dataclasses
import json
import logging
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from csc_jax import config as config_lib
from csc_jax import data
from csc_jax.config import bands, choose
from csc_jax.data import ade20k, camvid, cityscapes, coco, pascal_voc, synthetic
from csc_jax.errors import UserError
from csc_jax.planning.chips import HOP, Chip, Topology, topology
from csc_jax.planning.hlo import COLLECTIVES, FREE, Collective, Product, Program
from csc_jax.training import experiment
from csc_jax.training.background import in_background, wait_for
from csc_jax.training.step import compile_step, lower_step

log = logging.getLogger("csc_jax")

_NAMED = 6  # arrays that are listed


class DataSet(NamedTuple):
    """What a plan needs to know of a data set."""

    classes: int
    unlabeled: int | None  # images of the unlabelled list; None = not known


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a step once it is compiled; bytes, FLOP and seconds are those of a device.

    All of it is planned, nothing measured, but for the seconds that compiling took.
    """

    topology: str
    chip: str
    devices: int
    hosts: int
    versions: str
    method: str
    classes: int
    crop: tuple[int, int]  # px
    dtype: str
    labeled: int  # images of a step, all devices together
    unlabeled: int
    trace_seconds: float
    compile_seconds: float
    memory: int  # bytes at the peak, state and code included
    arguments: int  # of these the state and the batch
    capacity: float  # bytes that a program may take
    largest: list[tuple[str, int, int]]  # arrays made: name, bytes of each, how many
    flop: dict[str, float]  # of products, by the precision of their factors
    moved: float  # bytes read from and written to the main memory
    collectives: dict[str, tuple[int, float, float]]  # times, bytes, of these in loops
    unknown_loops: int  # whose turns the program does not tell; counted once
    product_seconds: float  # of the products alone
    memory_seconds: float  # of the traffic with the memory alone
    link_seconds: float  # of the exchanges alone
    step_seconds: float  # of the step, at least
    steps: int  # of the run
    fits: int | None = None  # times its images that a device has memory for, if it was asked

    @property
    def images_per_second(self) -> float:
        """Labelled and unlabelled images of all devices, at most."""
        return (self.labeled + self.unlabeled) / self.step_seconds

    @property
    def days(self) -> float:
        """Of the whole run's steps, at least."""
        return self.steps * self.step_seconds / 86400


def plan(
    config: ConfigDict,
    topology_name: str,
    *,
    classes: int | None = None,
    unlabeled: int | None = None,
    fit: bool = False,
    out: Path | None = None,
) -> None:
    """Plans the step of a run and logs one screen.

    Args:
      config: valid.
      topology_name: what to compile for, as in `chips.topology`.
      classes: C, where the config's data set does not say.
      unlabeled: images of the unlabelled list, where the config's data set does not say.
      fit: also look for the largest batch of a device, by some more compilations.
      out: JSON file to write the plan to.

    Raises:
      UserError: the hardware or its compiler is not known, a field does not fit it, the step does
        not compile, or `out` cannot be written.
    """
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out={out} is no file that could be written; its folder must be there.")
    if left := choose.open_fields(config):
        raise UserError(
            f"The config leaves {', '.join(left)} to be chosen from the data, which a plan does "
            "not read. Give the values, as in --config.data.crop_size=512,512 "
            "--config.batch.labeled=8 --config.batch.unlabeled=8 --config.train.steps=40000, or "
            "the --workdir of a run without --config."
        )
    hardware = topology(topology_name)
    known = _data_set(config, classes, unlabeled)
    compiled = (_fit if fit else compile_for)(config, hardware, known)
    log.info("%s", describe(compiled))
    if out is not None:
        rates = {"images_per_second": compiled.images_per_second, "days": compiled.days}
        try:
            out.write_text(json.dumps(dataclasses.asdict(compiled) | rates, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error}.") from error


def compile_for(config: ConfigDict, hardware: Topology, known: DataSet) -> Plan:
    """Compiles the step that `config` describes and reads the program.

    Raises:
      UserError: a field does not fit the hardware, cuDNN is needed and missing, or the step does
        not compile.
    """
    steps_per_epoch = max(1, (known.unlabeled or 0) // config.batch.unlabeled)
    config = bands.with_measured(config_lib.resolve(config, steps_per_epoch), None)
    names = tuple(map(str, range(known.classes)))
    built = experiment.build(
        config,
        names,
        np.zeros((known.classes, 3), np.uint8),
        hardware.devices,
        labeled_pixels=(1,) * known.classes,  # any weights cost the same
    )
    begin = time.perf_counter()
    state = built.abstract_state()
    step = compile_step(built.method, built.tx, built.mesh, state)
    try:
        lowered = lower_step(step, state, data.abstract_batch(config))
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise UserError(
            f"A step of {config.model.backbone} in {config.model.dtype} asks for the version of "
            "cuDNN, whose attention it takes on GPUs, and cuDNN is not installed: pip install -e "
            "'.[gpu]', or nvidia-cudnn-cu12 alone. It needs no GPU."
        ) from error
    traced = time.perf_counter()
    what = f"compiling the step of {config.method.name} for {hardware.name}"
    try:
        compiled = wait_for(in_background(lowered.compile), what, traced)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(_why_not(error, config, hardware)) from error
    done = time.perf_counter()

    memory: Any = compiled.memory_analysis()
    program = Program(compiled.as_text() or "")
    collectives: dict[str, tuple[int, float, float]] = {}
    for each in program.collectives():
        times, moved, in_loops = collectives.get(each.kind, (0, 0.0, 0.0))
        size = float(each.times * each.bytes)
        collectives[each.kind] = (
            times + each.times,
            moved + size,
            in_loops + size * each.in_loop,
        )
    method = config.method
    return Plan(
        topology=hardware.name,
        chip=hardware.chip.name,
        devices=built.mesh.size,
        hosts=len({device.process_index for device in built.mesh.devices.flat}),
        versions=f"jax {jax.__version__}, {hardware.compiler} {version(hardware.compiler)}",
        method=method.name + (f" + {method.contrast}" if method.contrast != "none" else ""),
        classes=known.classes,
        crop=tuple(config.data.crop_size),
        dtype=config.model.dtype,
        labeled=config.batch.labeled,
        unlabeled=config.batch.unlabeled,
        trace_seconds=traced - begin,
        compile_seconds=done - traced,
        memory=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        capacity=hardware.chip.memory,
        largest=_largest(program),
        collectives=collectives,
        unknown_loops=len(program.unknown_loops),
        steps=config.train.steps,
        **work(program, hardware),
    )


def describe(plan: Plan) -> str:
    """Returns the screen."""
    flop = ", ".join(f"{n / 1e12:.3g} in {kind}" for kind, n in plan.flop.items())
    rows = [
        (
            "compiles",
            f"yes, in {plan.compile_seconds:.0f} s on this machine, {plan.trace_seconds:.0f} s of "
            "tracing before",
        ),
        (
            "memory of a device",
            f"{_size(plan.memory)}, {_size(plan.arguments)} of them for state and batch; a program "
            f"may take {_size(plan.capacity)}: "
            + ("fits" if plan.memory <= plan.capacity else "DOES NOT FIT"),
        ),
    ]
    rows += [("  large array", f"{times} x {_size(n)}: {name}") for name, n, times in plan.largest]
    rows += [
        ("products of a device", f"{sum(plan.flop.values()) / 1e12:.3g} TFLOP ({flop})"),
        ("  at its peak", _duration(plan.product_seconds)),
        ("memory traffic of a device", _size(plan.moved)),
        ("  at its peak", _duration(plan.memory_seconds)),
    ]
    for kind, (times, moved, in_loops) in sorted(plan.collectives.items()):
        loops = f", {_size(in_loops)} of them IN LOOPS" if in_loops else ""
        rows.append((kind, f"{times:,} times, {_size(moved)}{loops}"))
    rows += [
        ("  all at the links' peak", _duration(plan.link_seconds)),
        ("a step, at least", _duration(plan.step_seconds)),
        (
            "images a second, at most",
            f"{plan.images_per_second:,.0f}; each of {plan.hosts} hosts reads "
            f"{plan.images_per_second / plan.hosts:,.0f}",
        ),
        ("the run, at least", f"{plan.days:.2g} days for {plan.steps:,} steps"),
    ]
    if plan.unknown_loops:
        rows.append(("loops of unknown length", f"{plan.unknown_loops}, taken for one turn each"))
    if plan.fits is not None:
        rows.append(("largest batch that fits", _fitting(plan)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        [
            f"PLANNED, not measured: {plan.method}, {plan.classes} classes, {plan.labeled} + "
            f"{plan.unlabeled} images of {plan.crop[0]}x{plan.crop[1]} a step, {plan.dtype}",
            f"compiled for {plan.devices} x {plan.chip} ({plan.topology}) by {plan.versions}",
            *(f"{name:<{width}}  {text}" for name, text in rows),
        ]
    )


def _size(count: float) -> str:
    """Returns bytes in the binary unit that suits them, three digits."""
    exponent = min(3, int(math.log2(max(count, 1)) // 10))
    return f"{count / 2 ** (10 * exponent):.3g} {('B', 'KiB', 'MiB', 'GiB')[exponent]}"


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _fitting(plan: Plan) -> str:
    unit = math.gcd(plan.labeled, plan.unlabeled)
    labeled, unlabeled = (n // unit * (plan.fits or 0) for n in (plan.labeled, plan.unlabeled))
    together = f"{labeled * plan.devices} + {unlabeled * plan.devices}"
    return f"{labeled} + {unlabeled} images a device, {together} together"


def _data_set(config: ConfigDict, classes: int | None, unlabeled: int | None) -> DataSet:
    """Returns the data set of a config, as published and not as found on a disk."""
    names: tuple[str, ...]
    if config.data.name == "synthetic":
        names, train = synthetic.CLASS_NAMES, config.data.synthetic.train
    elif config.data.name == "camvid":
        names, train = camvid.CLASS_NAMES, 367
    elif config.data.name == "cityscapes":
        names, train = cityscapes.CLASS_NAMES, 2975
    elif config.data.name == "pascal_voc":
        names, train = pascal_voc.CLASS_NAMES, 10_582
    elif config.data.name == "ade20k":
        names, train = ade20k.CLASS_NAMES, 20_210
    elif config.data.name == "coco":
        names, train = coco.CLASS_NAMES, 118_287
    else:
        names, train = (), 0
    if classes is None and not names:
        raise UserError(
            f"data.name is {config.data.name!r}, whose classes a plan cannot know without reading "
            "it: say how many there are with --classes=N."
        )
    labels = 1464 if config.data.pascal_voc.pool == "classic" and names else train
    labeled = math.ceil(labels * Fraction(config.data.labeled_fraction))
    extra = 19_998 if config.data.name == "cityscapes" and config.data.cityscapes.extra else 0
    listed = config.data.labeled_list or config.data.unlabeled_list or not train
    if unlabeled is None and not listed:
        unlabeled = train + extra - labeled or train
    in_epochs = config.train.epochs and not config.train.steps
    if unlabeled is None and (in_epochs or config.method.supervised_only_epochs):
        raise UserError(
            "The config counts in epochs, passes over an unlabelled list that a plan cannot know "
            "without reading it: say how many images are on it with --unlabeled=N."
        )
    return DataSet(classes or len(names), unlabeled)


def work(program: Program, hardware: Topology) -> dict[str, Any]:
    """Returns the fields of `Plan` that say what a step computes and moves, and how long it takes.

    Copies between the memories of a TPU that run beside other work count in the traffic alone.
    """
    chip, flop = hardware.chip, defaultdict[str, float](float)
    products = moved = busy = 0.0
    for execution in program.executions:
        seconds = 0.0
        for product in program.products(execution):
            kind, rate = _rate(chip, product)
            flop[kind] += execution.times * product.flops
            seconds += product.flops / rate
        size, opcode = program.bytes_moved(execution), execution.instruction.opcode
        products += execution.times * seconds
        moved += execution.times * size
        if not opcode.endswith("-start") and opcode not in COLLECTIVES:
            busy += execution.times * max(seconds, size / chip.bandwidth)
    links = waited = 0.0
    for collective in program.collectives():
        seconds = collective.times * _exchange(collective, hardware)
        links += seconds
        waited += 0 if collective.asynchronous else seconds
    return {
        "flop": dict(flop),
        "moved": moved,
        "product_seconds": products,
        "memory_seconds": moved / chip.bandwidth,
        "link_seconds": links,
        "step_seconds": max(busy + waited, moved / chip.bandwidth, links),
    }


def _rate(chip: Chip, product: Product) -> tuple[str, float]:
    """Returns the name of a product's precision and the FLOP/s of a chip at it."""
    if product.dtype not in ("f32", "f64"):
        return "bfloat16", chip.bfloat16
    if product.precision == "highest":
        return "full float32", chip.full
    passes = re.search(r"_x(\d)$", product.precision)
    split = 3 if product.precision == "high" else int(passes[1]) if passes else 1
    return "float32" + (f" in {split} passes" if split > 1 else ""), chip.float32 / split


def _exchange(collective: Collective, hardware: Topology) -> float:
    """Returns the seconds that an exchange takes at least.

    Every device sends its share of what all others lack, once, or twice for a sum that all are to
    have. Between hosts of GPUs it is first put together within each.
    """
    chip = hardware.chip
    group = collective.devices or len(hardware.devices)
    rounds = 2 if collective.kind == "all-reduce" else 1
    sent = collective.bytes * (group - 1) / group
    if collective.kind == "collective-permute":
        sent = collective.bytes
    seconds = max(sent / chip.link, HOP * hardware.hops)
    if chip.per_host and group > chip.per_host:
        seconds = max(seconds, sent / chip.per_host / chip.network)
    return rounds * seconds


def _largest(program: Program) -> list[tuple[str, int, int]]:
    """Returns the largest arrays that a step makes: name, bytes of each, how many there are.

    Not all are there at the same time.
    """
    found = Counter[tuple[str, int]]()
    for execution in program.executions:
        line = execution.instruction
        if line.opcode in FREE or line.opcode.endswith(("-start", "-done")):
            continue
        for array in line.arrays:
            shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
            found[f"{shape} {_short(line.source) or line.opcode}", array.stored] += 1
    largest = sorted(found.items(), key=lambda item: (-item[0][1], item[0][0]))[:_NAMED]
    return [(name, size, times) for (name, size), times in largest]


def _short(source: str) -> str:
    """Returns the path of modules in the name that JAX has given to an instruction."""
    parts = [part for part in source.split("/") if "(" not in part]
    path = "/".join(part for part in parts if not re.fullmatch(r"cond|branch_\d+_fun", part))
    return f"gradient of {path}" if "transpose(" in source else path


def _fit(config: ConfigDict, hardware: Topology, known: DataSet) -> Plan:
    """Returns the plan of a config that knows the largest batch of its ratio that fits.

    Where its own batch does not compile, it is the plan of that one.
    """
    unit = math.gcd(config.batch.labeled, config.batch.unlabeled)
    devices = config.parallel.devices or len(hardware.devices)
    plans: dict[int, Plan] = {}

    def memory(times: int) -> float:
        tried = config.copy_and_resolve_references()
        for half in ("labeled", "unlabeled"):
            tried.batch[half] = config.batch[half] // unit * devices * times
        try:
            plans[times] = compile_for(tried, hardware, known)
        except UserError as error:
            log.info("%s", error)
            return math.inf
        return plans[times].memory

    start = max(1, unit // devices)
    fits = largest_that_fits(memory, start, hardware.chip.memory)
    if start not in plans and not fits:
        raise UserError(
            f"{config.method.name} compiles for {hardware.name} with no batch at all; the reasons "
            "are above."
        )
    return dataclasses.replace(plans[start if start in plans else fits], fits=fits)


def largest_that_fits(memory: Callable[[int], float], start: int, capacity: float) -> int:
    """Returns the largest n with `memory(n) <= capacity`, 0 if there is none.

    Memory is all but linear in n, so that two values mostly tell where to look.

    Args:
      memory: grows with n; asked as seldom as possible; inf where it does not say how much.
      start: where to begin, at least 1.
      capacity: of the same unit.
    """
    seen: dict[int, float] = {0: 0.0}
    n = start
    while True:
        seen[n] = memory(n)
        low = max(n for n, size in seen.items() if size <= capacity)
        high = min((n for n, size in seen.items() if size > capacity), default=None)
        if high == low + 1:
            return low
        n = 2 * low or 1
        known = sorted((n, size) for n, size in seen.items() if n and size < math.inf)[-2:]
        if len(known) == 2:
            (a, at_a), (b, at_b) = known
            n = int(a + (capacity - at_a) * (b - a) / (at_b - at_a))
        n = max(n, low + 1)
        n = n if high is None else min(n, high - 1)


def _why_not(error: Exception, config: ConfigDict, hardware: Topology) -> str:
    text = re.sub(r"\s+", " ", str(error))
    batch = config.batch
    images = f"{batch.labeled} + {batch.unlabeled} images on {len(hardware.devices)} devices"
    what = f"{config.method.name} with {images} does not compile for {hardware.name}"
    if "RESOURCE_EXHAUSTED" in text:
        used = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+", text)
        return (
            f"{what}: it wants more memory than a chip has ({used[0] if used else text[:300]}). "
            "Take fewer images a device, --config.model.dtype=bfloat16, --config.model.remat=True "
            "or --config.parallel.fsdp=N; --fit tells how many images fit."
        )
    return f"{what}. XLA says: {text[:600]}"
