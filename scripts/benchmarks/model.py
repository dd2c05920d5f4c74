"""`benchmark.py model`: our network and PyTorch's, and the convolutions that they are made of.

Forward is in evaluation mode; forward and backward in training mode, cross entropy on the logits at
full size. Both networks have the same layers (the tests compare their outputs). FLOP are those of
the products in our program, shares are of the best that a square matrix product reaches here; on a
CPU both by the seconds that its cores were busy, so that other work on the machine counts less.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    Candidate,
    Timing,
    candidate,
    in_a_row,
    machine,
    side_by_side,
    table,
    take_turns,
)
from csc_jax import losses, models
from csc_jax.models.convolution import convolve
from csc_jax.models.vit import FORMS
from csc_jax.planning.hlo import Program

DILATIONS = (1, 2, 4, 8, 12, 16, 24, 36)


def run() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="benchmark.py model", description=__doc__)
    parser.add_argument("--backbone", default="resnet50", choices=models.names())
    parser.add_argument("--size", type=int, nargs=2, help="height, width in px; 321 or 518 each")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--remat", action="store_true", help="also with `model.remat`")
    parser.add_argument("--convolutions", action="store_true", help="only 3x3 ones by dilation")
    parser.add_argument("--dilations", type=int, nargs="+", default=DILATIONS, help="of these")
    options = parser.parse_args()
    options.size = options.size or 2 * ((518,) if options.backbone in FORMS else (321,))
    print(machine())
    dtype = jnp.dtype(options.dtype)
    peak = _peak(dtype)
    what = "GFLOP/s of a core" if _on_cpu() else "GFLOP/s"
    print(f"{options.dtype} matrix products: {peak / 1e9:.0f} {what}")
    if options.convolutions:
        _convolutions(options, dtype, peak)
        return
    for title, candidates in _networks(options, dtype).items():
        print(f"\n{title}, {options.backbone}, {options.batch} x {tuple(options.size)}:")
        timings = take_turns(
            {name: entry for name, (entry, _) in candidates.items()}, options.repeats
        )
        print(table(timings))
        for name, (_, flops) in candidates.items():
            print(_rates(name, timings[name], options.batch, flops, peak))
        if len(timings) > 1:
            first, *_, last = timings.values()
            print(_pairs(first, last))


def _rates(name: str, timing: Timing, images: int, flops: float, peak: float) -> str:
    seconds = min(timing.busy) if _on_cpu() else timing.median
    share = f", {flops / 1e9:.0f} GFLOP, {flops / seconds / peak:.0%} of the peak"
    return f"{name}: {images / timing.median:.2f} images/s{share if flops else ''}"


def _pairs(first: Timing, last: Timing) -> str:
    """Of neighbours in time, so that a machine whose speed changes does not decide."""
    ratios = [b / a for a, b in zip(first.seconds, last.seconds, strict=True)]
    return (
        f"last to first row: {statistics.median(ratios):.2f}, median of {len(ratios)} pairs; "
        f"by CPU time {min(last.busy) / min(first.busy):.2f} "
        f"({min(last.busy):.2f} and {min(first.busy):.2f} s, the least of each)"
    )


def _networks(
    options: argparse.Namespace, dtype: Any
) -> dict[str, dict[str, tuple[Candidate, float]]]:
    """Candidates with the FLOP of each (0 where nobody counts them), by table."""
    rng = np.random.default_rng(0)
    shape = (options.batch, *options.size)
    images = rng.standard_normal((*shape, 3)).astype(np.float32)
    labels = rng.integers(0, options.classes, shape)
    forward, backward = {}, {}
    for remat in (False, True) if options.remat else (False,):
        name = "ours, remat" if remat else "ours"
        forward[name], backward[name] = _ours(options, dtype, remat, images, labels)
    if options.backbone in FORMS and not FORMS[options.backbone].grid:
        print("There is no DINOv3 in PyTorch here, so its rows are missing.")
        return {"Forward": forward, "Forward and backward": backward}
    try:
        forward["PyTorch"], backward["PyTorch"] = _theirs(options, images, labels)
    except ImportError:
        print("PyTorch is not installed, so its rows are missing.")
    return {"Forward": forward, "Forward and backward": backward}


def _ours(
    options: argparse.Namespace, dtype: Any, remat: bool, images: np.ndarray, labels: np.ndarray
) -> tuple[tuple[Candidate, float], tuple[Candidate, float]]:
    build = functools.partial(models.DeepLabV3Plus, output_stride=8)
    if options.backbone in FORMS:
        build = models.DPT
    network = build(options.classes, options.backbone, dtype=dtype, remat=remat)
    variables = jax.jit(lambda key: models.initialize(network, key))(jax.random.key(0))
    size = (images.shape[1], images.shape[2])

    def forward(variables: Any, images: jax.Array) -> Any:
        outputs = network.apply(variables, images, train=False)
        return outputs.logits, outputs.projection

    def backward(variables: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            outputs, updates = network.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(1)},
            )
            logits = models.resize_aligned(outputs.logits, size)
            # The projection takes part, as in PyTorch, where its gradient would be missing else.
            value = losses.cross_entropy(logits, labels) + jnp.mean(outputs.projection**2)
            return value, updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    device_images, device_labels = jnp.asarray(images), jnp.asarray(labels)
    programs = [
        (forward, variables, device_images),
        (backward, variables, device_images, device_labels),
    ]
    timed, timed_backward = side_by_side(lambda program: _counted(*program), programs)
    return timed, timed_backward


def _counted(function: Callable[..., Any], *arguments: Any) -> tuple[Candidate, float]:
    program = jax.jit(function).lower(*arguments).compile()
    memory, times = program.memory_analysis(), in_a_row()

    def call() -> None:
        for _ in range(times):
            results = program(*arguments)
        jax.block_until_ready(results)

    entry = Candidate(call, None if memory is None else memory.temp_size_in_bytes, times=times)
    text = Program(program.as_text())  # XLA's own analysis counts a loop's body once
    return entry, sum(e.times * p.flops for e in text.executions for p in text.products(e))


def _theirs(
    options: argparse.Namespace, images: np.ndarray, labels: np.ndarray
) -> tuple[tuple[Candidate, float], tuple[Candidate, float]]:
    import torch
    from torch.nn import functional

    from benchmarks.torch_network import DeepLabV3Plus
    from benchmarks.torch_transformer import DPT

    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.benchmark = True
    build = DPT if options.backbone in FORMS else DeepLabV3Plus
    network = build(options.classes, options.backbone).to(device)
    network = network.to(memory_format=torch.channels_last)
    pictures = torch.tensor(images.transpose(0, 3, 1, 2), device=device)
    pictures = pictures.to(memory_format=torch.channels_last)
    truth = torch.tensor(labels, device=device)
    mixed = functools.partial(
        torch.autocast, device.type, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"
    )

    def forward() -> None:
        network.eval()
        with torch.no_grad(), mixed():
            network(pictures)

    def backward() -> None:
        network.train()
        network.zero_grad(set_to_none=True)
        with mixed():
            logits, projection = network(pictures)
            full = functional.interpolate(
                logits.float(), pictures.shape[2:], mode="bilinear", align_corners=True
            )
            loss = functional.cross_entropy(full, truth) + projection.float().square().mean()
        loss.backward()

    times = in_a_row()

    def timed(once: Callable[[], None]) -> tuple[Candidate, float]:
        def call() -> None:
            for _ in range(times):
                once()
            if on_gpu:
                torch.cuda.synchronize()

        return Candidate(call, times=times), 0.0

    return timed(forward), timed(backward)


def _peak(dtype: Any) -> float:
    """FLOP/s of the fastest of ten square matrix products."""
    size = 2048 if _on_cpu() else 8192  # a smaller one does not fill a GPU
    a = jnp.ones((size, size), dtype)
    timing = take_turns({"product": candidate(jnp.matmul, a, a)}, 10)["product"]
    return 2 * size**3 / min(timing.busy if _on_cpu() else timing.seconds)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _convolutions(options: argparse.Namespace, dtype: Any, peak: float) -> None:
    """Times value and gradients of ASPP's 3x3 convolution at the output stride, by dilation."""
    batch, size = options.batch, options.size
    height, width, channels, features = -(-size[0] // 8), -(-size[1] // 8), 2048, 256
    x = jax.random.normal(jax.random.key(0), (batch, height, width, channels), dtype)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, features), dtype) / 100
    flops = 2 * batch * height * width * 9 * channels * features  # of each, padding included
    print(f"\n3x3 convolution of ({batch}, {height}, {width}, {channels}) to {features} channels:")

    def programs(dilation: int) -> dict[str, Candidate]:
        def value(x: Any, kernel: Any) -> Any:
            return convolve(x, kernel, dilation=dilation)

        def energy(x: Any, kernel: Any) -> Any:
            return jnp.sum(value(x, kernel).astype(jnp.float32) ** 2)

        def plain(x: Any, kernel: Any) -> Any:
            value = jax.lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(1, 1),
                padding=((dilation, dilation), (dilation, dilation)),
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            return jnp.sum(value.astype(jnp.float32) ** 2)

        return {
            f"dilation {dilation}, value": candidate(value, x, kernel),
            "… and gradient of the input": candidate(jax.grad(energy, 0), x, kernel),
            "… and gradient of the kernel": candidate(jax.grad(energy, 1), x, kernel),
            "… the same by XLA alone": candidate(jax.grad(plain, 1), x, kernel),
        }

    for rows in side_by_side(programs, options.dilations):
        timings = take_turns(rows, options.repeats)
        for count, (name, timing) in zip((1, 2, 2, 2), timings.items(), strict=True):
            share = count * flops / timing.median / peak
            print(f"{name:<32} {1e3 * timing.median:8.1f} ms  {share:5.0%} of the peak")
