"""Images larger than memory: read, segmented and written in overlapping tiles.

A TIFF or GeoTIFF is read and written by windows with rasterio, the extra `tiles`. Where it lies on
the globe is kept.
"""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from csc_jax.config import bands
from csc_jax.deploy.images import check_bands
from csc_jax.errors import UserError
from csc_jax.text import name as printable_name

SUFFIXES = (".tif", ".tiff")
_BLOCK = 256  # px, sides of the blocks that are written
_CACHE = 128  # MiB that GDAL keeps of blocks
_MOST_BLOCK = 1 << 28  # bytes of a block that is read, which GDAL holds as a whole
_MOST_SIDE = 1 << 20  # px


class Tile(NamedTuple):
    """A part of an image that is segmented at once, and the part of it that is kept.

    Attributes:
      top, left: px of the part that is read.
      height, width: px of it.
      inner: (top, bottom, left, right) px in the image of what is written.
    """

    top: int
    left: int
    height: int
    width: int
    inner: tuple[int, int, int, int]


def plan(height: int, width: int, tile: int, overlap: int) -> Iterator[Tile]:
    """Yields tiles, row by row, whose inner parts cover each pixel once.

    Args:
      height, width: px of the image.
      tile: px, sides of a tile; smaller images have smaller ones.
      overlap: px by which neighbours reach into each other, less than `tile`; of these each keeps
        half, so that all but the image's own border is seen with its surroundings.
    """
    rows, columns = _spans(height, tile, overlap), _spans(width, tile, overlap)
    for top, (first_row, last_row) in rows:
        for left, (first_column, last_column) in columns:
            inner = first_row, last_row, first_column, last_column
            yield Tile(top, left, min(tile, height), min(tile, width), inner)


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, tuple[int, int]]]:
    """Returns, of one axis, the first px of each tile and (first, end) of what is kept."""
    if length <= tile:
        return [(0, (0, length))]
    stride = tile - overlap
    starts = [*range(0, length - tile, stride), length - tile]
    edges = [0]
    # Half way between the end of a tile and the start of the next one.
    edges += [(start + tile + after) // 2 for start, after in itertools.pairwise(starts)]
    return [
        (start, (first, last))
        for start, first, last in zip(starts, edges, [*edges[1:], length], strict=True)
    ]


def segment(
    predict: Callable[[np.ndarray], Any],
    palette: np.ndarray,
    image: Path,
    out: Path,
    confidence: Path | None = None,
    *,
    data: ConfigDict,
    tile: int = 1024,
    overlap: int | None = None,
) -> tuple[int, int]:
    """Writes the class ids of a TIFF of any size as a TIFF, tile by tile.

    The result is compressed and has the palette, and the georeference of the image if it has one.
    Not more than a few rows of blocks are in memory.

    Args:
      predict: image (H, W, K) -> `Result`.
      palette: (C, 3) uint8 RGB.
      image: of 8 bits a channel, with 1 channel or at least 3, of which the first three are RGB; or
        where images keep their values, with the bands and of the type of the training images.
      out: TIFF to write.
      confidence: TIFF to write the probability of each pixel's class to, times 255; None = none.
      data: that part of the config.
      tile: px, sides of what is segmented at once.
      overlap: px, as in `plan`; None = a quarter of `tile`.

    Returns:
      (height, width) px of the image.

    Raises:
      UserError: rasterio is not installed, or the image cannot be read in this way.
    """
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise UserError(f"The overlap is {overlap} px; it is at least 0 and less than {tile}.")
    rasterio = library()
    finished = [out] if confidence is None else [out, confidence]
    unfinished = [path.with_name(path.name + ".unfinished") for path in finished]
    try:
        size = _segment(rasterio, predict, image, unfinished, palette, data, tile, overlap)
        for path, target in zip(unfinished, finished, strict=True):
            path.replace(target)
    except rasterio.errors.RasterioError as error:
        reason = printable_name(error)[:200]
        raise UserError(f"{image} cannot be segmented in tiles: {reason}.") from error
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
    return size


def _segment(
    rasterio: Any,
    predict: Callable[[np.ndarray], Any],
    image: Path,
    out: list[Path],
    palette: np.ndarray,
    data: ConfigDict,
    tile: int,
    overlap: int,
) -> tuple[int, int]:
    """Writes class ids and, to a second file, confidence."""
    with contextlib.ExitStack() as stack:
        # Nothing but the file: no side-cars beside it, no formats that name other files.
        options = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": _CACHE}
        stack.enter_context(rasterio.Env(**options))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        source = stack.enter_context(rasterio.open(image, driver="GTiff"))
        _check(source, image, data)
        channels = _channels(source, data)
        targets = [stack.enter_context(_target(rasterio, path, source)) for path in out]
        targets[0].write_colormap(1, dict(enumerate(map(tuple, palette.tolist()))))
        for part in plan(source.height, source.width, tile, overlap):
            result = predict(_read(rasterio, source, part, channels))
            maps = [result.classes]
            if len(out) > 1:
                maps.append(np.round(255 * result.confidence).astype(np.uint8))
            for target, values in zip(targets, maps, strict=True):
                _write(rasterio, target, part, values)
        return source.height, source.width


def library() -> Any:
    """Returns rasterio; UserError where it is not installed."""
    try:
        import rasterio
        import rasterio.errors
        import rasterio.windows
    except ImportError as error:
        raise UserError("Tiles need rasterio: pip install 'csc-jax[tiles]'.") from error
    return rasterio


def _check(source: Any, image: Path, data: ConfigDict) -> None:
    """Raises UserError for an image that the network does not take, or of too large blocks."""
    if bands.keeps_values(data):
        if len(set(source.dtypes)) > 1:
            raise UserError(f"{image} has bands of several types. Convert it first.")
        check_bands(len(_channels(source, data)), source.dtypes[0], data, image)
    elif set(source.dtypes) != {"uint8"} or source.count == 2:
        raise UserError(
            f"{image} has {source.count} channels of {source.dtypes[0]}; it takes uint8, grey or "
            "RGB. Convert it first."
        )
    if max(source.height, source.width) > _MOST_SIDE:
        raise UserError(f"{image} is {source.height}x{source.width} px; a side is {_MOST_SIDE}.")
    pixels = max(height * width for height, width in source.block_shapes)
    if pixels * source.count * np.dtype(source.dtypes[0]).itemsize > _MOST_BLOCK:
        raise UserError(
            f"{image} is stored in blocks of {pixels} px, each of which must be in memory as a "
            "whole. Store it in smaller ones: gdal_translate -co TILED=YES."
        )


def _target(rasterio: Any, path: Path, source: Any) -> Any:
    """Opens a TIFF of one channel, as large and at the same place as `source`."""
    where: dict[str, Any] = {}
    if source.crs is not None:
        where = {"crs": source.crs, "transform": source.transform}
    elif not source.transform.is_identity:
        where = {"transform": source.transform}
    return rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=source.height,
        width=source.width,
        count=1,
        dtype="uint8",
        compress="deflate",
        tiled=True,
        blockxsize=_BLOCK,
        blockysize=_BLOCK,
        BIGTIFF="IF_SAFER",
        **where,
    )


def _channels(source: Any, data: ConfigDict) -> list[int]:
    """Returns the numbers of the channels that the network sees, from 1."""
    if not bands.keeps_values(data):
        return [1, 2, 3] if source.count >= 3 else [1, 1, 1]
    alpha = source.colorinterp[-1].name == "alpha" and source.count == data.bands + 1
    return list(range(1, source.count + 1 - alpha))


def _read(rasterio: Any, source: Any, part: Tile, channels: list[int]) -> np.ndarray:
    """Returns a tile as (height, width, K)."""
    window = rasterio.windows.Window(part.left, part.top, part.width, part.height)
    return np.ascontiguousarray(source.read(channels, window=window).transpose(1, 2, 0))


def _write(rasterio: Any, target: Any, part: Tile, values: np.ndarray) -> None:
    """Writes what is kept of a tile's map (height, width) uint8."""
    top, bottom, left, right = part.inner
    window = rasterio.windows.Window(left, top, right - left, bottom - top)
    inner = values[top - part.top : bottom - part.top, left - part.left : right - part.left]
    target.write(np.ascontiguousarray(inner), 1, window=window)
