"""3x3 convolutions with 2.25 products per pixel in place of 9 (Winograd's minimal filtering).

F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), Sec. 4:
an output tile of 4x4 pixels is A' [(G g G') * (B' d B)] A for the kernel g and the 6x6 pixels d
that the tile sees; `*` goes element by element, and over all tiles and channels it is 36 matrix
products. The gradients are of the same kind: that of the input is a convolution with the turned
kernel, that of the kernel is G' [(B' d B) * (A e A')] G for a tile e of the output's gradient.

The transforms evaluate polynomials at 0, ±2/3, ±3/2 and infinity. With the customary 0, ±1, ±2 the
rounding error is twice as large, root mean square: see `tests/test_models_winograd.py`.

Shapes: B images of h x w pixels, K channels to F; T tiles of all images. All float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import polynomial

TILE = 4  # pixels of a side of an output tile
_SEEN = TILE + 2  # pixels of a side of what it sees


# Jitted, so that layers of one shape are traced once.
@partial(jax.jit, static_argnames="dilation")
def convolve(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """Convolves (B, h, w, K) with (3, 3, K, F), zero padding of `dilation`: (B, h, w, F)."""
    phases = _phases(x, dilation)
    products = jnp.einsum("abtk,abkf->abtf", _seen(phases), _both_axes(_G, kernel))
    maps = _tiles_to_maps(_both_axes(_A.T, products), phases.shape[:3])
    return _joined(maps, x.shape[:3], dilation)


def input_gradient(kernel: jax.Array, gradient: jax.Array, dilation: int) -> jax.Array:
    """Returns the gradient of `convolve` by x, (B, h, w, K), from that by its output."""
    return convolve(gradient, kernel[::-1, ::-1].swapaxes(2, 3), dilation)


@partial(jax.jit, static_argnames="dilation")
def kernel_gradient(x: jax.Array, gradient: jax.Array, dilation: int) -> jax.Array:
    """Returns the gradient of `convolve` by the kernel, (3, 3, K, F), from that by its output."""
    tiles = _both_axes(_A, _maps_to_tiles(_phases(gradient, dilation)))  # (6, 6, T, F)
    products = jnp.einsum("abtk,abtf->abkf", _seen(_phases(x, dilation)), tiles)
    return _both_axes(_G.T, products)


def covered(height: int, width: int, dilation: int) -> float:
    """Returns how many pixels the tiles have for each one of a map; 1 where they fit it exactly."""
    cells = 1
    for length in (height, width):
        cells *= dilation * TILE * _tiles(-(-length // dilation))
    return cells / (height * width)


def _tiles(length: int) -> int:
    return -(-length // TILE)


def _phases(x: jax.Array, dilation: int) -> jax.Array:
    """Every `dilation`-th row and column as an image of its own: (B dilation^2, h', w', K).

    A dilated convolution is a plain one of each of them.
    """
    if dilation == 1:
        return x
    batch, height, width, channels = x.shape
    pad = ((0, 0), (0, -height % dilation), (0, -width % dilation), (0, 0))
    x = jnp.pad(x, pad)
    rows, columns = x.shape[1] // dilation, x.shape[2] // dilation
    x = x.reshape(batch, rows, dilation, columns, dilation, channels)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, channels)


def _joined(phases: jax.Array, size: tuple[int, ...], dilation: int) -> jax.Array:
    """The inverse of `_phases` for maps of size (B, h, w)."""
    if dilation == 1:
        return phases
    batch, height, width = size
    _, rows, columns, channels = phases.shape
    x = phases.reshape(batch, dilation, dilation, rows, columns, channels)
    x = x.transpose(0, 3, 1, 4, 2, 5).reshape(batch, rows * dilation, columns * dilation, channels)
    return x[:, :height, :width]


def _seen(x: jax.Array) -> jax.Array:
    """B' d B of the pixels d that each tile sees: (B, h, w, K) to (6, 6, T, K)."""
    pad = [(1, TILE * _tiles(length) - length + 1) for length in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *pad, (0, 0)))
    for axis in (-2, -3):  # columns, then rows, so that rows come first in the end
        end = x.shape[axis] - _SEEN + 1
        parts = [jax.lax.slice_in_dim(x, i, i + end, TILE, axis) for i in range(_SEEN)]
        # As sums, since overlapping pixels would have to be written out for a matrix product.
        rows = [[(float(c), part) for c, part in zip(row, parts, strict=True) if c] for row in _B]
        x = jnp.stack([sum(c * part for c, part in row) for row in rows])
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _both_axes(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """Applies a matrix (p, q) to the first two axes of (q, q, M, N): (p, p, M, N)."""
    both = np.kron(matrix, matrix).astype(np.float32)  # one product in place of two
    y = jnp.matmul(both, x.reshape(both.shape[1], -1), precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*matrix.shape[:1] * 2, *x.shape[2:])


def _tiles_to_maps(tiles: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """(4, 4, T, F) to the maps (B, h, w, F) of `size` (B, h, w)."""
    batch, height, width = size
    rows, columns, features = _tiles(height), _tiles(width), tiles.shape[-1]
    maps = tiles.reshape(TILE, TILE, batch, rows, columns, features).transpose(2, 3, 0, 4, 1, 5)
    return maps.reshape(batch, rows * TILE, columns * TILE, features)[:, :height, :width]


def _maps_to_tiles(maps: jax.Array) -> jax.Array:
    """The inverse of `_tiles_to_maps`; what a tile has beyond the map is 0."""
    batch, height, width, features = maps.shape
    rows, columns = _tiles(height), _tiles(width)
    pad = ((0, 0), (0, rows * TILE - height), (0, columns * TILE - width), (0, 0))
    tiles = jnp.pad(maps, pad).reshape(batch, rows, TILE, columns, TILE, features)
    return tiles.transpose(2, 4, 0, 1, 3, 5).reshape(TILE, TILE, -1, features)


def transforms(
    points: tuple[float, ...] = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns B' (6, 6), G (6, 3) and A (6, 4) after Toom and Cook, float64.

    Args:
      points: five, at which the polynomials are evaluated; infinity is the sixth.
    """
    seen, kernel, output = np.zeros((_SEEN, _SEEN)), np.zeros((_SEEN, 3)), np.zeros((_SEEN, TILE))
    for i, point in enumerate(points):
        others = [p for p in points if p != point]
        seen[i, :-1] = polynomial.polyfromroots(others)
        kernel[i] = point ** np.arange(3) / np.prod([point - p for p in others])
        output[i] = point ** np.arange(TILE)
    seen[-1] = polynomial.polyfromroots(points)
    kernel[-1, -1] = output[-1, -1] = 1.0
    return seen, kernel, output


_B, _G, _A = transforms()  # _B is B' of the paper
