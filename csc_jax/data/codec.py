"""Encoded images and labels to arrays and back.

What the user's files may be is decided here, by their content and never by their suffix: see the
table of docs/data.md. No decoder is tried on anything else.
"""

import functools
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from csc_jax.errors import UserError

# Grain and the builder already run one image per thread; OpenCV's own pool on top of that would
# only make the threads wait for each other.
cv2.setNumThreads(0)

# Pillow warns of images of half the size that it, and `MAX_PIXELS`, ends at.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# It also warns of damaged files, beside the error that names the file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

MAX_PIXELS = 178_956_970  # of one image or label: what Pillow takes; OpenCV takes 2^30

# As the bytes of a stored image are to be seen upright, the orientation of the user's file is
# applied when it is prepared. What is stored has none.
_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_AS_IS = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION

_ORIENTATION = 0x0112  # tags of TIFF and EXIF
_SUBFILE_TYPE, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 258, 259, 262
_REDUCED_OR_MASK = 5  # bits of the subfile type: a page that belongs to another
_WITH_LOSS = (6, 7, 34712, 50001)  # compressions: JPEG, JPEG, JPEG 2000, WebP
_WHITE_IS_ZERO = 0


class Unusable(Exception):
    """Content that cannot be used; the message goes on after the file's name: "is empty"."""


class Photo(NamedTuple):
    """An image of the user's.

    Attributes:
      pixels: (H, W, 3) uint8 RGB, or (H, W, K) of its own values (`raster.decode`), upright.
      as_stored: whether `decode_image` makes the same of the file's own bytes.
      turned: whether an EXIF orientation was applied.
    """

    pixels: np.ndarray
    as_stored: bool
    turned: bool


class Mask(NamedTuple):
    """A label of the user's, as stored.

    Attributes:
      values: (H, W) of an integer type: grey values, or indices of a palette; or colours,
        (H, W, 3) uint8 RGB.
      palette: (N, 3) uint8 RGB of the indices; None if there is none.
    """

    values: np.ndarray
    palette: np.ndarray | None = None


def cpu_count() -> int:
    """Returns how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- Stored images -------------------------------------------------------------------------------


_RAW = struct.Struct("<8sBIII")  # its magic, bytes of a value, height, width, bands
_MAGIC = b"CSCBANDS"
_MOST_RAW = 1 << 30  # bytes
_RAW_TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<f4")}


def encode_image(pixels: np.ndarray) -> bytes:
    """Encodes (H, W, K) uint8, uint16 or float32 without loss: PNG for RGB of 8 bits.

    Others are compressed by zlib, the first bytes of all values before the second ones, which
    halves what 12 bits of 16 take.
    """
    if pixels.dtype == np.uint8 and pixels.shape[-1] == 3:
        return encode_png(pixels)
    size = pixels.dtype.itemsize
    values = np.ascontiguousarray(pixels, _RAW_TYPES[size])
    planes = values.reshape(-1, 1).view(np.uint8).T.tobytes()
    return _RAW.pack(_MAGIC, size, *pixels.shape) + zlib.compress(planes, 1)


def decode_image(data: bytes) -> np.ndarray | None:
    """Returns a stored image, or None if it is corrupt or truncated.

    (H, W, K) as `encode_image` was given it; or of the user's own encoding (H, W, 3) uint8 RGB, as
    it lies in memory: no orientation, and of 16 bits the upper 8. `decode_photo` reads the user's
    files.
    """
    if data.startswith(_MAGIC):
        return _decode_raw(data)
    return _decode(data, _RGB)


def _decode_raw(data: bytes) -> np.ndarray | None:
    try:
        _, size, height, width, bands = _RAW.unpack_from(data)
        shape = int(height), int(width), int(bands)
        dtype = _RAW_TYPES[size]
        length = size * math.prod(shape)
        if not 0 < length <= _MOST_RAW:
            return None
        inflate = zlib.decompressobj()
        planes = inflate.decompress(memoryview(data)[_RAW.size :], length + 1)
    except (struct.error, KeyError, zlib.error, OverflowError):
        return None
    if len(planes) != length or not inflate.eof:
        return None
    values = np.frombuffer(planes, np.uint8).reshape(size, -1).T
    native = dtype.newbyteorder("=")
    return np.ascontiguousarray(values).view(dtype).reshape(shape).astype(native, copy=False)


def decode_label(data: bytes) -> np.ndarray | None:
    """Returns a label that `encode_png` wrote, (H, W) uint8, or None if it is corrupt."""
    return _decode(data, cv2.IMREAD_UNCHANGED)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes (H, W, 3) RGB or (H, W), uint8, without loss."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", pixels)[1].tobytes()


# ---- The user's images ---------------------------------------------------------------------------


def read_image(path: Path, bits: int = 0) -> np.ndarray:
    """Reads one image file as (H, W, 3) uint8 RGB, upright; UserError if that is not possible."""
    return read_photo(path, bits).pixels


def read_photo(path: Path, bits: int = 0) -> Photo:
    """Reads one image file; UserError if that is not possible.

    Args:
      bits: `data.image_bits`.
    """
    return read_with(path, functools.partial(decode_photo, bits=bits))


def read_with(path: Path, decode: Callable[[bytes], Photo]) -> Photo:
    """Reads one image file by one of the decoders; UserError if that is not possible."""
    try:
        return decode(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}.") from error
    except Unusable as error:
        raise UserError(f"{path} {error}.") from error


def decode_photo(data: bytes, bits: int = 0) -> Photo:
    """Decodes an image of the user's.

    Alpha is not read; grey, palettes and CMYK become RGB. An image of more than 8 bits is scaled by
    one rule for all, round(255 v / (2^bits - 1)), with 16 bits unless `bits` names fewer.

    Args:
      bits: `data.image_bits`, 0 for as many as the file has. An image that would be nearly black
        because its values end at 12 bits of 16 is refused, unless `bits` says that it is meant.

    Raises:
      Unusable: no format of the list, corrupt, more than one page or `MAX_PIXELS`, brighter than
        `bits` has room for, or of floating-point values.
    """
    kind, depth, orientation = check_header(data)
    if kind in ("BMP", "TIFF") and depth == 8:
        pixels = load(data, kind, "RGB")
    elif depth == 8:
        decoded = _decode(data, _RGB)
        if decoded is None:
            raise Unusable(CORRUPT)
        pixels = decoded
    else:
        deep = _decode(data, _AS_IS)
        if deep is None or deep.dtype != np.uint16:
            raise Unusable(CORRUPT if deep is None else _NOT_RGB)
        pixels = _scaled(deep, bits)
    # OpenCV turns a TIFF by itself, Pillow as well.
    if orientation != 1 and kind != "TIFF":
        pixels = turn(pixels, orientation)
    kept = kind in ("JPEG", "PNG", "WEBP") and depth == 8 and orientation == 1
    return Photo(pixels, as_stored=kept, turned=orientation != 1)


def _scaled(deep: np.ndarray, bits: int) -> np.ndarray:
    if deep.ndim == 2:
        deep = np.repeat(deep[..., None], 3, axis=-1)
    deep = deep[..., 2::-1]  # BGR, maybe with alpha
    brightest = int(deep.max())
    if not bits and brightest < 1 << 12:
        raise Unusable(
            f"has 16 bits, of which its values use {max(brightest.bit_length(), 1)} (up to "
            f"{brightest}), and would be nearly black; name the bits that the camera or the export "
            "used, for all images: --config.data.image_bits=12 for 12 of them, 16 if it is as dark "
            "as that (or data.bands, which keeps the values of images of your own)"
        )
    highest = (1 << (bits or 16)) - 1
    if brightest > highest:
        raise Unusable(
            f"holds the value {brightest}, more than the {bits} bits of data.image_bits have room "
            "for; give data.image_bits the bits of the brightest image"
        )
    table = (np.arange(highest + 1, dtype=np.uint32) * 255 + highest // 2) // highest
    return table.astype(np.uint8)[deep]


def channels(data: bytes, kind: str) -> np.ndarray:
    """Decodes an image of the user's as it is: (H, W) grey, or (H, W, 3 or 4) RGB and alpha.

    Args:
      data: content of a file other than a TIFF.
      kind: of `kind_of`.

    Raises:
      Unusable: it is corrupt.
    """
    if kind == "BMP":
        return load(data, kind, "RGB")
    pixels = _decode(data, _AS_IS)
    if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
        raise Unusable(CORRUPT)
    return pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[-1]]]


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns what an EXIF orientation, 1 to 8, describes upright."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


# ---- The user's labels ---------------------------------------------------------------------------


def decode_mask(data: bytes, suffix: str) -> Mask:
    """Decodes a label file of the user's.

    Args:
      suffix: ".mat" for a class map of SBD, any other for an image.

    Raises:
      Unusable: no format that keeps values as they are, corrupt, more than one page or
        `MAX_PIXELS`, an EXIF orientation, or values that are no whole numbers.
    """
    if suffix.lower() == ".mat":
        return Mask(_sbd(data))
    kind, depth, orientation = check_header(data)
    if kind in ("JPEG", "WEBP"):
        raise Unusable(
            f"is a {_NAMES[kind]}, which need not keep the values that it is given; save labels as "
            "PNG, TIFF or BMP"
        )
    if orientation != 1:
        raise Unusable(
            "has an EXIF orientation; labels are taken as they are stored. Save it upright, "
            "without that tag"
        )
    with _opened(data, kind) as image:
        mode, bits = image.mode, depth
        if kind == "PNG":
            bits = data[24]
        if kind == "TIFF":
            bits = _tiff_bits(image)
        if mode in ("RGB", "RGBA", "RGBX", "LA") and depth == 16:
            values = _deep_colors(data, kind)
        elif mode in ("RGB", "RGBA", "RGBX"):
            values = _array(image)[..., :3]
        elif mode in ("1", "L", "P", "LA") or mode.startswith("I"):
            values = _array(image)
            if mode == "LA":
                values = values[..., 0]
            if mode == "L" and bits < 8:
                values = values // np.uint8(255 // ((1 << bits) - 1))  # Pillow spreads them
        else:
            raise Unusable(
                f"holds {_MODES.get(mode, f'pixels of the kind {mode}')}; labels are class ids in "
                "one channel of 1 to 16 bits, a palette, or RGB colours"
            )
        colors = image.getpalette("RGB") if mode == "P" else None
    return Mask(
        values.astype(np.uint8) if values.dtype == bool else values,
        None if colors is None else np.array(colors, np.uint8).reshape(-1, 3),
    )


def _tiff_bits(image: Image.Image) -> int:
    """Returns the bits a value of a label has; Unusable if they are not the values as given."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise Unusable("is a TIFF whose value 0 means white; save it as PNG")
    if tags.get(_COMPRESSION) in _WITH_LOSS:
        raise Unusable("is a TIFF compressed with loss, which changes ids; save it as PNG")
    return max(tags.get(_BITS, (1,)))


_PNG_GREY_ALPHA = 4
_MODES = {"F": "floating-point values", "CMYK": "CMYK colours", "LAB": "L*a*b* colours"}


def _deep_colors(data: bytes, kind: str) -> np.ndarray:
    """Returns values of 16 bits that have an alpha, or colours; Pillow has their upper 8 bits."""
    deep = _decode(data, _AS_IS)
    if deep is None or deep.dtype != np.uint16 or deep.ndim != 3 or deep.shape[-1] < 3:
        raise Unusable(CORRUPT)
    if kind == "PNG" and data[25] == _PNG_GREY_ALPHA:
        return deep[..., 0]
    if (deep % 257).any():  # 8 bits as others write them with 16
        raise Unusable("is a colour image of 16 bits; save its colours with 8 bits")
    return (deep[..., 2::-1] // 257).astype(np.uint8)


def _sbd(data: bytes) -> np.ndarray:
    try:
        from scipy import io as scipy_io  # takes its time, and few need it

        values = scipy_io.loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # on a damaged file it raises nearly anything
        raise Unusable(CORRUPT) from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biu" or values.ndim != 2:
        raise Unusable(CORRUPT)
    return values


# ---- Both ----------------------------------------------------------------------------------------

CORRUPT = "is corrupt or truncated"
_NOT_RGB = (
    "has values that are no 8 or 16 bits (data.bands keeps those of images of your own, as in "
    "data.bands=1 for grey)"
)
_NAMES = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "BMP": "BMP", "TIFF": "TIFF"}
_LFS = b"version https://git-lfs"


def kind_of(data: bytes) -> str:
    """Returns Pillow's name of the format; Unusable if it is none of the list."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM"):
        return "BMP"
    if not data:
        raise Unusable(f"{CORRUPT} (it is empty)")
    if data.startswith(_LFS):
        raise Unusable("is a pointer of Git LFS, not the file itself; run git lfs pull")
    raise Unusable(f"{CORRUPT}, or none of {', '.join(_NAMES.values())}")


def check_header(data: bytes) -> tuple[str, int, int]:
    """Looks at the header: returns Pillow's name of the format, 8 or 16 bits, and orientation."""
    kind = kind_of(data)
    exif: bytes | None = None
    try:
        if kind == "PNG":
            width, height, depth = struct.unpack(">IIB", data[16:25])
            pages, exif = _chunks(data)
            check_size(width, height, pages)
        else:
            with _opened(data, kind) as image:
                check_size(*image.size, _pages(image, kind))
                depth = 8
                if kind == "TIFF":
                    tags = image.tag_v2  # type: ignore[attr-defined]
                    depth = max(tags.get(_BITS, (1,)))
                    if image.mode in ("F", "I"):
                        depth = 32  # neither is an image; one can be a label
                    return kind, 16 if depth > 8 else 8, orientation_of(tags.get(_ORIENTATION))
                exif = image.info.get("exif")
    except Unusable:
        raise
    except Exception as error:  # on a damaged file Pillow raises nearly anything
        raise Unusable(CORRUPT) from error
    return kind, 16 if depth > 8 else 8, _exif_orientation(exif)


def check_size(width: int, height: int, pages: int) -> None:
    """Raises Unusable for more than `MAX_PIXELS` or one page."""
    if width * height > MAX_PIXELS:
        raise Unusable(
            f"says that it is {height}x{width} px (height x width), more than the {MAX_PIXELS} px "
            "of the largest image that is read; cut it into tiles"
        )
    if pages > 1:
        raise Unusable(
            f"holds {pages} pages or frames; save each that you want as a file of its own (pages "
            f"that are channels of an image of your own are read with data.bands={pages})"
        )


def _pages(image: Image.Image, kind: str) -> int:
    if kind == "JPEG":  # what follows the first picture of a phone's is a preview or a depth map
        return 1
    count = getattr(image, "n_frames", 1)
    if kind != "TIFF" or count == 1:
        return count
    full = 0
    for page in range(count):
        image.seek(page)
        full += not image.tag_v2.get(_SUBFILE_TYPE, 0) & _REDUCED_OR_MASK  # type: ignore[attr-defined]
    image.seek(0)
    return full


def _chunks(data: bytes) -> tuple[int, bytes | None]:
    """Returns the frames of a PNG and its EXIF; Pillow would decode all of it to say that."""
    frames, exif, at = 1, None, 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"acTL" and length >= 4:
            (frames,) = struct.unpack_from(">I", data, at + 8)
        if name == b"eXIf":
            exif = data[at + 8 : at + 8 + length]
        at += 12 + length
    return frames, exif


def _exif_orientation(exif: bytes | None) -> int:
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        return orientation_of(tags.get(_ORIENTATION))
    except Exception:  # as above; a damaged tag says nothing
        return 1


def orientation_of(value: object) -> int:
    """Returns what an EXIF tag says, 1 to 8; 1, upright, for what means nothing."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _opened(data: bytes, kind: str) -> Image.Image:
    try:
        # One format, whatever the content says: for others Pillow starts programs like Ghostscript.
        return Image.open(io.BytesIO(data), formats=(kind,))
    except Image.DecompressionBombError as error:
        raise Unusable(
            f"says that it has more than the {MAX_PIXELS} px of the largest image that is read; "
            "cut it into tiles"
        ) from error
    except Exception as error:
        other = ", or a TIFF of more than 4 channels or 16 bits" if kind == "TIFF" else ""
        raise Unusable(CORRUPT + other) from error


def load(data: bytes, kind: str, mode: str) -> np.ndarray:
    """Decodes an image in one of Pillow's modes; Unusable where that is not possible."""
    with _opened(data, kind) as image:
        if image.mode in _MODES and image.mode != "CMYK":
            raise Unusable(f"holds {_MODES[image.mode]}; save it with 8 or 16 bits a channel")
        try:
            return np.asarray(image.convert(mode))
        except Exception as error:
            raise Unusable(CORRUPT) from error


def _array(image: Image.Image) -> np.ndarray:
    try:
        return np.asarray(image)
    except Exception as error:
        raise Unusable(CORRUPT) from error


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    try:
        kind_of(data)  # no decoder is tried on anything else
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (Unusable, cv2.error):
        return None
