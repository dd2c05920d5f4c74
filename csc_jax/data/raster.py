"""Images that keep the values of their files: grey, multispectral, of 16 bits, of floats.

What the files may be is decided by their content, as in `codec`: see the table of docs/data.md.
Most need no more than OpenCV; TIFFs of two and of more than three channels are read with rasterio,
the extra `tiles`, as OpenCV gives only some of the channels, or others, without a word.
"""

import io
import math
import warnings
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import TiffImagePlugin

from csc_jax.data import codec
from csc_jax.data.codec import CORRUPT, Photo, Unusable

MOST_BYTES = 1 << 30  # of the values of one image
_MOST_PAGES = 1000
_MOST_BLOCK = 1 << 28  # bytes of a tile or strip that a reader holds as a whole

# Tags of TIFF.
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 254, 256, 257, 258, 262, 274
_SAMPLES, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORM = 277, 284, 322, 323, 338, 339
_REDUCED_OR_MASK = 5  # bits of the subfile type: a page that belongs to another
_WHITE_IS_ZERO, _GREY, _RGB = 0, 1, 2  # photometric interpretations
_TOGETHER = 1  # planar configuration: the channels of a pixel stand together
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # forms of values
_ALPHA = (1, 2)  # kinds of an extra channel


class _Page(NamedTuple):
    """What the header of a page of a TIFF says."""

    height: int
    width: int
    channels: int
    bits: int
    form: int
    photometric: int
    together: bool
    alpha: bool  # whether the last channel is one
    orientation: int

    @property
    def is_plain_grey(self) -> bool:
        return (
            self.channels == 1
            and self.photometric == _GREY
            and (self.bits in (8, 16) or (self.bits in (32, 64) and self.form != _UNSIGNED))
            and (self.form != _FLOAT or self.bits >= 32)
        )

    @property
    def is_plain_rgb(self) -> bool:
        deep = (self.form == _UNSIGNED and self.bits == 16) or (
            self.form == _FLOAT and self.bits in (32, 64)
        )
        return self.channels == 3 and self.photometric == _RGB and self.together and deep


def decode(data: bytes, bands: int) -> Photo:
    """Decodes an image of the user's with the values that it holds.

    Args:
      data: content of the file.
      bands: `data.bands`, K.

    Returns:
      Pixels are (H, W, K): uint8 and uint16 as they are, everything else as float32. An RGB image
      with three equal channels is a grey one, and a grey one stands for three equal channels.
      Alpha is left out, unless it is the band that K asks for.

    Raises:
      Unusable: no format of the list, corrupt, another number of channels, NaN or infinity, or
        larger than `MOST_BYTES`.
    """
    if codec.kind_of(data) == "TIFF":
        pages = _pages(data)
        pixels, alpha = _of_tiff(data, pages, bands)
        turned, as_stored = pages[0].orientation != 1, False
    else:
        kind, depth, orientation = codec.check_header(data)
        pixels = codec.turn(codec.channels(data, kind), orientation)
        alpha, turned = pixels.ndim == 3 and pixels.shape[-1] == 4, orientation != 1
        # Only then does `codec.decode_image` make the same of the file.
        kept = kind in ("JPEG", "PNG", "WEBP") and depth == 8 and not turned
        as_stored = kept and bands == 3
    return Photo(_typed(_with_bands(pixels, bands, alpha)), as_stored, turned)


def check_finite(values: np.ndarray) -> None:
    """Raises Unusable where values are NaN or infinite."""
    if values.dtype.kind == "f":
        broken = int(values.size - np.isfinite(values).sum())
        if broken:
            raise Unusable(
                f"holds {broken} values that are NaN or infinite; fill them with a number, and "
                "give their pixels 255 in the label"
            )


def _with_bands(pixels: np.ndarray, bands: int, alpha: bool) -> np.ndarray:
    """Returns (H, W, bands) of an image (H, W) or (H, W, channels)."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = pixels.shape[-1]
    if channels == bands:
        return pixels
    if alpha:
        pixels = pixels[..., :-1]
        channels -= 1
    if channels == bands:
        return pixels
    if bands == 1 and channels == 3 and (pixels == pixels[..., :1]).all():
        return pixels[..., :1]
    if bands == 3 and channels == 1:
        return pixels.repeat(3, axis=-1)
    raise Unusable(
        f"has {channels} channel{'s' * (channels > 1)}, but data.bands is {bands}; all images have "
        f"as many as --config.data.bands says"
    )


def _typed(pixels: np.ndarray) -> np.ndarray:
    """Returns the values as uint8, uint16 or float32."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    if pixels.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind not in "iuf":
        raise Unusable(f"holds values of the type {pixels.dtype}, which are no real numbers")
    with np.errstate(over="ignore"):  # what overflows is infinite
        values = np.ascontiguousarray(pixels, np.float32)
    check_finite(values)
    return values


# ---- TIFF ----------------------------------------------------------------------------------------


def _pages(data: bytes) -> list[_Page]:
    """Returns the pages of a TIFF, all alike, without reduced copies and masks."""
    found = []
    try:
        file = io.BytesIO(data)
        header = file.read(16 if data[2:3] == b"+" or data[3:4] == b"+" else 8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        at, seen = tags.next, set[int]()
        while at and at not in seen and len(seen) < _MOST_PAGES:
            seen.add(at)
            file.seek(at)
            tags.load(file)
            if not tags.get(_SUBFILE, 0) & _REDUCED_OR_MASK:
                found.append(_page(tags))
            at = tags.next
    except Unusable:
        raise
    except Exception as error:  # on a damaged file Pillow raises nearly anything
        raise Unusable(CORRUPT) from error
    if not found or at in seen:
        raise Unusable(CORRUPT)
    if at or any(page[:-1] != found[0][:-1] for page in found):
        raise Unusable("holds pages that differ; save the one that you want as a file of its own")
    total = len(found) * math.prod(found[0][:3]) * found[0].bits // 8
    if total > MOST_BYTES:
        raise Unusable(
            f"says that it holds {total} bytes of values, more than the {MOST_BYTES} of the "
            "largest image that is read; cut it into tiles"
        )
    return found


def _page(tags: Any) -> _Page:
    """Reads the header of a page; TypeError and others where it is damaged."""
    bits = set(tags.get(_BITS, (1,)))
    forms = set(tags.get(_FORM, (_UNSIGNED,)))
    page = _Page(
        height=int(tags[_HEIGHT]),
        width=int(tags[_WIDTH]),
        channels=int(tags.get(_SAMPLES, 1)),
        bits=int(max(bits)),
        form=int(max(forms)),
        photometric=int(tags.get(_PHOTOMETRIC, _GREY)),
        together=int(tags.get(_PLANAR, _TOGETHER)) == _TOGETHER,
        alpha=tuple(tags.get(_EXTRA, (0,)))[-1:] in {(kind,) for kind in _ALPHA},
        orientation=codec.orientation_of(tags.get(_ORIENTATION)),
    )
    if min(page[:3]) < 1:
        raise Unusable(CORRUPT)
    codec.check_size(page.width, page.height, 1)
    if len(bits) > 1 or page.bits not in (8, 16, 32, 64):
        raise Unusable(
            f"has values of {', '.join(map(str, sorted(bits)))} bits; save it with 8, 16 or 32"
        )
    if len(forms) > 1 or page.form not in (_UNSIGNED, _SIGNED, _FLOAT):
        raise Unusable("holds values that are neither whole nor real numbers")
    tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_HEIGHT, 0))
    if tile * page.channels * page.bits // 8 > _MOST_BLOCK:
        raise Unusable(f"is stored in tiles of {tile} px, more than are read; store it in smaller")
    return page


def _of_tiff(data: bytes, pages: list[_Page], bands: int) -> tuple[np.ndarray, bool]:
    """Returns (H, W) or (H, W, channels), upright, and whether the last channel is alpha."""
    page = pages[0]
    if page.photometric == _WHITE_IS_ZERO:
        raise Unusable("is a TIFF whose value 0 means white; save it with 0 for black")
    if len(pages) > 1:
        if page.channels > 1 or len(pages) != bands:
            raise Unusable(
                f"holds {len(pages)} pages of {page.channels} channels, but data.bands is {bands}; "
                "pages of one channel are bands if there are as many"
            )
        if not page.is_plain_grey:
            raise Unusable(f"holds pages of {page.bits} bits, which are not read; use 8, 16 or 32")
        return np.stack(_by_opencv(data, pages), axis=-1), False
    if page.is_plain_grey:
        return _by_opencv(data, pages)[0], False
    if page.is_plain_rgb:
        return _by_opencv(data, pages)[0][..., ::-1], False
    if page.photometric > _GREY and page.bits == 8 and page.channels in (1, 3):
        return codec.load(data, "TIFF", "RGB"), False
    return codec.turn(_by_rasterio(data, page), page.orientation), page.alpha


def _by_opencv(data: bytes, pages: list[_Page]) -> list[np.ndarray]:
    """Returns the pages, upright and with channels in OpenCV's order."""
    try:
        read, values = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise Unusable(CORRUPT) from error
    size = pages[0].height * pages[0].width * pages[0].channels
    if not read or len(values) < len(pages) or any(page.size != size for page in values):
        raise Unusable(CORRUPT)
    return list(values)


def _by_rasterio(data: bytes, page: _Page) -> np.ndarray:
    """Returns (H, W, channels) as stored."""
    try:
        import rasterio
        import rasterio.io
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ImportError as error:
        raise Unusable(
            f"is a TIFF of {page.channels} channels of {page.bits} bits, which needs rasterio: "
            "pip install 'csc-jax[tiles]'"
        ) from error
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    try:
        # Nothing but these bytes, and no format that names other files.
        with (
            rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
            rasterio.io.MemoryFile(data) as file,
            file.open(driver="GTiff") as source,
        ):
            if (source.height, source.width, source.count) != page[:3]:
                raise Unusable(CORRUPT)
            return np.ascontiguousarray(source.read().transpose(1, 2, 0))
    except (RasterioError, ValueError, MemoryError) as error:
        raise Unusable(CORRUPT) from error
