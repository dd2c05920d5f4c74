"""`benchmark.py contrast`: the paper's module against a dense version and against PyTorch."""

import argparse
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import dense
from benchmarks.timing import Candidate, candidate, machine, table, take_turns
from csc_jax import contrast
from csc_jax.models.convolution import convolve


def run() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="benchmark.py contrast", description=__doc__)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--bank_size", type=int, default=2000, help="S, entries per class")
    parser.add_argument("--dim", type=int, default=256, help="D")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--side", type=int, default=160, help="px, of a square feature map")
    parser.add_argument("--views", type=int, default=64, help="queries per class and image")
    parser.add_argument("--pixels_per_class", type=int, default=10, help="enqueued per image")
    parser.add_argument("--top_n", type=int, default=1, help="0 = all positives")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no_dense", action="store_true", help="leave out what needs much memory")
    parser.add_argument(
        "--head",
        type=int,
        default=0,
        help="only the module with the head on maps of so many channels",
    )
    options = parser.parse_args()
    print(machine())
    if options.head:
        _with_head(options)
        return
    data = _Data(options)
    print(
        f"{options.classes} classes, S = {options.bank_size}, D = {options.dim}, "
        f"{data.queries.shape[0]} queries, N = {options.top_n or 'all'}"
    )
    losses = _losses(options, data)
    print("\nLoss and gradient:\n" + table(take_turns(losses, options.repeats)))
    parts = take_turns(_parts(options, data), options.repeats)
    print("\nThe rest of the module:\n" + table(parts, ratios=False))


class _Data:
    """A full bank, and features with every class in every image."""

    def __init__(self, options: argparse.Namespace):
        keys = jax.random.split(jax.random.key(0), 5)
        classes, dim, images = options.classes, options.dim, options.images
        shape = (classes, options.bank_size, dim)
        self.bank = contrast.init_memory_bank(*shape)._replace(
            features=contrast.normalize(jax.random.normal(keys[0], shape)),
            count=jnp.full((classes,), options.bank_size, jnp.int32),
        )
        pixels = options.side**2
        self.features = jax.random.normal(keys[1], (images, pixels, dim))
        self.labels = jax.random.randint(keys[2], (images, pixels), 0, classes)
        self.predictions = jax.random.randint(keys[3], (images, pixels), 0, classes)
        self.keys = jax.random.split(keys[4], images)

        sampled = jax.jit(self.sample, static_argnums=0)(options.views)
        self.image_queries = contrast.normalize(sampled.features).reshape(images, -1, dim)
        ids = jnp.arange(classes, dtype=jnp.int32)[None, :, None]
        self.image_labels = jnp.broadcast_to(ids, sampled.valid.shape).reshape(images, -1)
        self.image_valid = sampled.valid.reshape(images, -1)
        self.queries = self.image_queries.reshape(-1, dim)
        self.query_labels = self.image_labels.reshape(-1)
        self.query_valid = self.image_valid.reshape(-1)

    def sample(self, views: int) -> contrast.Samples:
        def one(key: jax.Array, *image: jax.Array) -> contrast.Samples:
            classes = self.bank.count.shape[0]
            return contrast.semi_hard_sample(key, *image, num_classes=classes, views=views)

        return jax.vmap(one)(self.keys, self.features, self.labels, self.predictions)


def _losses(options: argparse.Namespace, data: _Data) -> dict[str, Candidate]:
    constants = {"temperature": options.temperature, "top_n": options.top_n or None}

    def gradient(loss: Any) -> Candidate:
        def function(queries: jax.Array, bank: contrast.MemoryBank) -> Any:
            return jax.value_and_grad(loss)(
                queries, data.query_labels, data.query_valid, bank, **constants
            )

        return candidate(function, data.queries, data.bank)

    losses = {"streamed (csc_jax.contrast)": gradient(contrast.contrastive_loss)}
    if not options.no_dense:
        losses["dense, JAX"] = gradient(dense.contrastive_loss)
    if importlib.util.find_spec("torch") is None:
        print("(PyTorch is not installed: its row is left out)")
    elif not options.no_dense:
        losses["dense, PyTorch"] = _torch_loss(data, **constants)
    return losses


def _torch_loss(data: _Data, temperature: float, top_n: int | None) -> Candidate:
    """The same loss and gradient in PyTorch, on its default device for this machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensor(x: jax.Array) -> Any:
        return torch.from_numpy(np.array(x)).to(device)

    queries, labels = tensor(data.queries), tensor(data.query_labels)
    valid, entries = tensor(data.query_valid), tensor(data.bank.features).flatten(0, 1)
    ids = torch.arange(data.bank.count.shape[0], device=device).repeat_interleave(
        data.bank.features.shape[1]
    )
    occupied = tensor(data.bank.occupied).flatten()
    key_labels, key_valid = torch.cat([labels, ids]), torch.cat([valid, occupied])

    def call() -> None:
        q = queries.clone().requires_grad_()
        similarity = q @ torch.cat([q, entries]).T / temperature
        same = labels[:, None] == key_labels[None, :]
        positive = same & key_valid[None, :]
        positive[torch.arange(len(q)), torch.arange(len(q))] = False
        negative = ~same & key_valid[None, :]
        log_sum = similarity.masked_fill(~negative, -1e30).logsumexp(dim=1)
        if top_n is None:
            chosen, weight = similarity, positive
        else:
            chosen, _ = similarity.masked_fill(~positive, -1e30).topk(top_n, dim=1)
            weight = chosen > -1e29
        terms = torch.nn.functional.softplus(log_sum[:, None] - chosen).masked_fill(~weight, 0.0)
        number = weight.sum(dim=1)
        counted = valid & (number > 0)
        per_query = terms.sum(dim=1) / number.clamp(min=1)
        ((per_query * counted).sum() / counted.sum().clamp(min=1)).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return Candidate(call)


def _parts(options: argparse.Namespace, data: _Data) -> dict[str, Candidate]:
    def sample(features: jax.Array) -> Any:
        def one(key: jax.Array, *image: jax.Array) -> Any:
            features, labels, predictions = image
            order = contrast.order_by_class(key, labels, predictions, options.classes)
            new = contrast.take_random(key, order, options.pixels_per_class)
            queries = contrast.take_semi_hard(order, options.views)
            return contrast.gather(features, *queries), contrast.gather(features, *new)

        return jax.vmap(one)(data.keys, features, data.labels, data.predictions)

    new = jax.jit(sample)(data.features)[1]

    def update(bank: contrast.MemoryBank, queries: jax.Array) -> Any:
        return contrast.update_memory_bank(
            bank, queries, data.image_labels, data.image_valid, new.features, new.valid
        )

    return {
        "sampling": candidate(sample, data.features),
        "bank update, both gates": candidate(update, data.bank, data.image_queries),
    }


def _with_head(options: argparse.Namespace) -> None:
    """Times DPT's projection head, sampling, L_c of each image and all gradients, by what is drawn.

    Labels are squares of an eighth of the map, and four of five predictions are right.
    """
    keys = jax.random.split(jax.random.key(0), 8)
    images, side, classes, dim = options.images, options.side, options.classes, options.dim
    fused = jax.random.normal(keys[0], (images, side, side, options.head))
    first = jax.random.normal(keys[1], (3, 3, options.head, options.head)) / 3 / options.head**0.5
    last = jax.random.normal(keys[2], (1, 1, options.head, dim)) / options.head**0.5
    shape = (classes, options.bank_size, dim)
    bank = contrast.init_memory_bank(*shape)._replace(
        features=contrast.normalize(jax.random.normal(keys[3], shape)),
        count=jnp.full((classes,), options.bank_size, jnp.int32),
    )
    square = -(-side // 8)
    labels = jax.random.randint(keys[4], (images, 8, 8), 0, classes)
    labels = labels.repeat(square, 1).repeat(square, 2)[:, :side, :side]
    guesses = jax.random.randint(keys[5], labels.shape, 0, classes)
    right = jax.random.uniform(keys[6], labels.shape) < 0.8
    predictions = jnp.where(right, labels, guesses)

    def candidate_of(stride: int, *, drawn_first: bool) -> Candidate:
        def loss(fused: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
            maps = jax.nn.relu(convolve(fused, first, stride))
            maps = maps if drawn_first else convolve(maps, last)

            def draw(key: jax.Array, *image: jax.Array) -> contrast.Samples:
                x, labels, predictions = image
                order = contrast.order_by_class(
                    key, labels.reshape(-1), predictions.reshape(-1), classes
                )
                queries = contrast.take_semi_hard(order, options.views)
                return contrast.gather(x.reshape(-1, x.shape[-1]), *queries)

            small = (x[:, ::stride, ::stride] for x in (labels, predictions))
            drawn = jax.vmap(draw)(jax.random.split(keys[7], images), maps, *small)
            features, valid = drawn.features, drawn.valid
            features = convolve(features, last) if drawn_first else features
            ids = jnp.broadcast_to(jnp.arange(classes)[:, None], valid.shape[1:]).reshape(-1)
            return sum(
                contrast.contrastive_loss(
                    contrast.normalize(features[i]).reshape(-1, dim),
                    ids,
                    valid[i].reshape(-1),
                    bank,
                    temperature=options.temperature,
                    top_n=options.top_n or None,
                )
                for i in range(images)
            )

        return candidate(jax.value_and_grad(loss, (0, 1, 2)), fused, first, last)

    candidates = {
        "from the full map": candidate_of(1, drawn_first=False),
        "every second pixel and row": candidate_of(2, drawn_first=False),
        "full map, last layer of drawn ones": candidate_of(1, drawn_first=True),
    }
    timings = take_turns(candidates, options.repeats)
    print("\nProjection head, sampling, L_c and gradients:\n" + table(timings))
    for name, timing in timings.items():
        print(f"{name}: {min(timing.busy):.2f} s of CPU time, the least")
