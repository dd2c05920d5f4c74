"""Vision transformers of the DINOv2 and DINOv3 families, as encoders of a dense head.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023), Darcet et al.,
"Vision Transformers Need Registers" (2023), Siméoni et al., "DINOv3" (2025). Layers, names and
constants are those of the published code: LayerScale after each branch of a block, one final
LayerNorm on every level that is read. DINOv2 learns a grid of position embeddings, which is resized
to the image's patches; DINOv3 rotates queries and keys by the position of their patch instead.

Shapes: B images of r x c patches; N = 1 + registers + r c tokens of K channels, T heads.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from csc_jax.contrast import devices
from csc_jax.models import plain
from csc_jax.models.convolution import convolve
from csc_jax.models.layers import Features, parameter


@dataclasses.dataclass(frozen=True)
class Form:
    """What tells one transformer from another."""

    width: int  # K
    depth: int  # blocks
    heads: int  # T, of K / T channels each
    levels: tuple[int, ...]  # blocks whose outputs the head reads, counted from 1 (UniMatch V2)
    patch: int = 14  # px, sides of a patch
    grid: int = 37  # patches, sides of the learnt position grid; 0 = rotary positions
    registers: int = 0  # tokens without a place in the image
    offset: float = 0.1  # patches added to the size that the grid is resized to (DINOv2's code)
    antialias: bool = False  # as the grid is resized
    epsilon: float = 1e-6  # of LayerNorm


_SMALL = Form(width=384, depth=12, heads=6, levels=(3, 6, 9, 12))
_BASE = Form(width=768, depth=12, heads=12, levels=(3, 6, 9, 12))
_LARGE = Form(width=1024, depth=24, heads=16, levels=(5, 12, 18, 24))
_REGISTERS: dict[str, Any] = {"registers": 4, "offset": 0.0, "antialias": True}
_DINOV3: dict[str, Any] = {"registers": 4, "patch": 16, "grid": 0, "epsilon": 1e-5}

FORMS: dict[str, Form] = {
    "dinov2_small": _SMALL,
    "dinov2_base": _BASE,
    "dinov2_large": _LARGE,
    "dinov2_small_reg": dataclasses.replace(_SMALL, **_REGISTERS),
    "dinov2_base_reg": dataclasses.replace(_BASE, **_REGISTERS),
    "dinov2_large_reg": dataclasses.replace(_LARGE, **_REGISTERS),
    "dinov3_small": dataclasses.replace(_SMALL, **_DINOV3),
    "dinov3_base": dataclasses.replace(_BASE, **_DINOV3),
    # Of no publication: for tests, and for demos on a CPU.
    "vit_tiny": Form(width=64, depth=4, heads=2, levels=(1, 2, 3, 4), patch=8, grid=8),
}


class ViT(nn.Module):
    """Encoder: (B, H, W, K) normalised image, sides multiples of a patch -> `Features`.

    The levels are (B, r, c, K) maps of the patches' tokens alone. The blocks' parameters are
    stacked, (depth, ...) each, and one program serves them all.
    """

    form: Form  # which transformer
    dtype: Any = jnp.float32  # compute type; parameters, LayerNorm's and softmax's sums are float32
    remat: bool = False  # keep only the blocks' inputs for the gradient, compute the rest again
    drop_path: float = 0.0  # probability that the last block's branches skip an image

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> Features:
        """Needs a "dropout" key where `train` and `drop_path` are on."""
        form = self.form
        x = PatchEmbedding(form, self.dtype, name="patch_embed")(x)
        size = x.shape[1], x.shape[2]
        x = self._with_other_tokens(x)
        rates = jnp.linspace(0.0, self.drop_path, form.depth)
        # One program for all blocks on a CPU: with gradients, 12 blocks of 384 channels compiled in
        # 12 s as a loop and in 69 s written out, on 2 busy CPU cores, and ran as fast (3.3 s and
        # 3.7 s). Elsewhere they are written out: a step is planned with less memory and traffic,
        # for a TPU in half the time, and takes a third more time to compile at most
        # (docs/performance.md). With remat the loop has to stay, as it keeps XLA from merging what
        # is computed twice.
        block: Any = nn.remat(Block, prevent_cse=False) if self.remat else Block
        blocks: Any = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=form.depth,
            unroll=1 if self.remat or devices.platform() == "cpu" else form.depth,
        )
        dropping = train and self.drop_path > 0
        blocks = blocks(form, self.dtype, dropping, name="blocks")
        _, outputs = blocks(x, rates, rotations(form, size))
        norm = LayerNorm(form.epsilon, self.dtype, name="norm")
        levels = (norm(outputs[i - 1][:, -size[0] * size[1] :]) for i in form.levels)
        maps = tuple(level.reshape(-1, *size, form.width) for level in levels)
        return Features(levels=maps, middle=None)

    def _with_other_tokens(self, x: jax.Array) -> jax.Array:
        """(B, r, c, K) patches to (B, N, K), positions added, class and register tokens first."""
        form = self.form
        images, *size, width = x.shape
        embedding = functools.partial(parameter, self)
        first = [embedding("cls_token", _draw, (1, width))]
        # Of the pretraining alone; published files hold it, and a file written here is to be whole.
        embedding("mask_token", nn.initializers.zeros, (1, width))
        if form.grid:
            learnt = embedding("pos_embed", _draw, (1 + form.grid**2, width))
            first[0] = first[0] + learnt[:1]
            grid = learnt[1:].reshape(form.grid, form.grid, width)
            places = resize_positions(grid, (size[0], size[1]), form.offset, form.antialias)
            x = x + places[None].astype(self.dtype)
        if form.registers:
            first.append(embedding("register_tokens", _draw, (form.registers, width)))
        tokens = jnp.concatenate(first).astype(self.dtype)
        tokens = jnp.broadcast_to(tokens, (images, *tokens.shape))
        return jnp.concatenate([tokens, x.reshape(images, -1, width)], axis=1)


_draw = nn.initializers.normal(0.02)


class PatchEmbedding(nn.Module):
    """A convolution of size and stride `patch`, as a product: (B, H, W, bands) to (B, r, c, K)."""

    form: Form
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        patch, width = self.form.patch, self.form.width
        images, height, length, channels = x.shape
        kernel = parameter(self, "kernel", _draw, (patch, patch, channels, width))
        bias = parameter(self, "bias", nn.initializers.zeros, (width,))
        rows, columns = height // patch, length // patch
        x = x.reshape(images, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(images, rows, columns, -1).astype(self.dtype)
        y = convolve(x, kernel.reshape(1, 1, -1, width))
        return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class Block(nn.Module):
    """Attention and perceptron, each with LayerNorm before, LayerScale behind and a shortcut."""

    form: Form
    dtype: Any
    dropping: bool  # whether branches are dropped

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_path: jax.Array, rotation: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the block's output (B, N, K) twice: to be carried on, and to be kept.

        Args:
          x: (B, N, K).
          drop_path: () probability that a branch skips an image.
          rotation: of `rotations`.
        """
        form, width = self.form, self.form.width
        dense = functools.partial(Dense, dtype=self.dtype)
        norm = functools.partial(LayerNorm, form.epsilon, self.dtype)
        scale = functools.partial(LayerScale, self.dtype)

        y = norm(name="norm1")(x)
        y = dense(3 * width, name="qkv", silent_key=not form.grid)(y)
        query, key, value = jnp.split(y.reshape(*y.shape[:2], 3 * form.heads, -1), 3, axis=2)
        if rotation is not None:
            query, key = (rotate(each, *rotation) for each in (query, key))
        y = attend(query, key, value).reshape(x.shape)
        y = scale(name="scale1")(dense(width, name="proj")(y))
        x = x + self._dropped(y, drop_path)

        y = dense(4 * width, name="fc1")(norm(name="norm2")(x))
        y = dense(width, name="fc2")(nn.gelu(y, approximate=False))
        x = x + self._dropped(scale(name="scale2")(y), drop_path)
        return x, x

    def _dropped(self, branch: jax.Array, rate: jax.Array) -> jax.Array:
        """Sets the branch of an image to 0 with probability `rate`, and scales the others up."""
        if not self.dropping:
            return branch
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, (len(branch), 1, 1))
        return branch * (kept / (1.0 - rate)).astype(branch.dtype)


class Dense(nn.Module):
    """A layer of (B, N, K) to (B, N, F), F being `features`."""

    features: int
    dtype: Any
    # Of queries, keys and values in one: the keys' bias is left out, as in DINOv3.
    silent_key: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", _draw, (x.shape[-1], self.features))
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        if self.silent_key:
            bias = bias * np.repeat(np.array([1, 0, 1], np.float32), self.features // 3)
        # As a map of one row: `convolve` sums the kernel's gradient in float32.
        y = convolve(x[:, None], kernel[None, None])[:, 0]
        return y + bias.astype(self.dtype).reshape(1, 1, -1)


class LayerNorm(nn.Module):
    """Normalises (..., K) over K, in float32 inside."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:])
        bias = parameter(self, "bias", nn.initializers.zeros, x.shape[-1:])
        row = (1,) * (x.ndim - 1) + x.shape[-1:]
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(variance + self.epsilon)
        return (y * scale.reshape(row) + bias.reshape(row)).astype(self.dtype)


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al. 2021)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:])
        return x * scale.astype(self.dtype).reshape(1, 1, -1)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Returns softmax(query key' / sqrt(K / T)) value, (B, N, T, K / T) each; sums are float32."""
    if devices.platform() == "cpu" and not plain.is_on():
        return _attend_by_heads(query, key, value)
    # JAX takes cuDNN's fused kernel, which keeps no (N, N) map, only where it is asked to. It is
    # for half precision, and for the GPUs that have TF32 too.
    fused = query.dtype == jnp.bfloat16 and devices.has_tf32() and not plain.is_on()
    return jax.nn.dot_product_attention(
        query, key, value, implementation="cudnn" if fused else "xla"
    )


def _attend_by_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attend`, one head after the other, whose (N, N) map is computed again for the gradient.

    For CPUs: a map that is used while it is in the cache. Of two images of 518x518 px, 6 heads and
    float32, a core took 98 ms in place of `jax.nn`'s 352, with the gradients 355 in place of 1,090.
    """

    @jax.checkpoint
    def head(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, key, value = parts  # (B, N, K / T)
        sums = {"preferred_element_type": jnp.float32}
        scores = jnp.einsum("bnd,bmd->bnm", query * query.shape[-1] ** -0.5, key, **sums)
        highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - highest)
        mixed = jnp.einsum("bnm,bmd->bnd", weights.astype(value.dtype), value, **sums)
        return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(value.dtype)

    # Over heads alone: the images may be split over devices.
    heads = tuple(x.transpose(2, 0, 1, 3) for x in (query, key, value))
    return jax.lax.map(head, heads).transpose(1, 2, 0, 3)


def rotations(form: Form, size: tuple[int, int]) -> tuple[jax.Array, jax.Array] | None:
    """Returns cosine and sine of the angles by which DINOv3 turns queries and keys, or None.

    Half of a head's pairs of channels turn by the row, half by the column, with periods from 1 to
    100 times the image (Siméoni et al., and the published code; without the random shifts and
    scales of its pretraining).

    Args:
      form: rotary where its grid is 0.
      size: r, c.

    Returns:
      (N, K / T) float32 each, or None; class and register tokens do not turn.
    """
    if form.grid:
        return None
    head = form.width // form.heads
    frequency = 100.0 ** -np.arange(0, 1, 4 / head)  # (K / 4T,)
    rows, columns = (2 * (np.arange(n) + 0.5) / n - 1 for n in size)
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = np.tile((2 * np.pi * places * frequency).reshape(len(places), -1), 2)
    still = np.zeros((1 + form.registers, head))
    angles = np.concatenate([still, angles])
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Turns (B, N, T, K / T) by angles (N, K / T), channel i together with i + K / 2T."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cosine, sine = (each[None, :, None] for each in (cosine, sine))
    return (x * cosine + turned * sine).astype(x.dtype)


def resize_positions(
    grid: jax.Array, size: tuple[int, int], offset: float, antialias: bool
) -> jax.Array:
    """Resizes position embeddings bicubically, as PyTorch does for DINOv2's code.

    Args:
      grid: (g, g, K) float32.
      size: (rows, columns) of the result; (g, g) returns the grid as it is.
      offset: the factors are (rows + offset) / g and (columns + offset) / g.
      antialias: PyTorch's kernel of that name; without an offset alone.

    Returns:
      (rows, columns, K) float32.
    """
    side = grid.shape[0]
    if size == (side, side):
        return grid
    weights = _antialiased if antialias else functools.partial(_bicubic, offset=offset)
    rows, columns = (weights(side, n) for n in size)
    grid = jnp.einsum("rg,ghk->rhk", rows, grid, precision="highest")
    return jnp.einsum("ch,rhk->rck", columns, grid, precision="highest")


def _bicubic(side: int, length: int, offset: float) -> np.ndarray:
    """Interpolation matrix (length, side), float32: of four pixels, those at the edge repeated."""
    place = (np.arange(length) + 0.5) * side / (length + offset) - 0.5
    first = np.floor(place).astype(int) - 1
    matrix = np.zeros((length, side))
    for tap in range(4):
        pixel = first + tap
        weight = _cubic(place - pixel, -0.75)
        np.add.at(matrix, (np.arange(length), pixel.clip(0, side - 1)), weight)
    return matrix.astype(np.float32)


def _antialiased(side: int, length: int) -> np.ndarray:
    """Interpolation matrix (length, side), float32: the kernel grows as the grid shrinks.

    Its a is -0.5, as Pillow's; weights beyond the edge are left out and the others sum to 1.
    """
    scale = side / length
    stretch = max(scale, 1.0)
    centre = (np.arange(length) + 0.5) * scale
    lowest = np.maximum(np.floor(centre - 2 * stretch + 0.5), 0)
    highest = np.minimum(np.floor(centre + 2 * stretch + 0.5), side)
    pixel = np.arange(side)[None]
    matrix = _cubic((pixel - centre[:, None] + 0.5) / stretch, -0.5)
    matrix *= (pixel >= lowest[:, None]) & (pixel < highest[:, None])
    return (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel of cubic convolution."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
