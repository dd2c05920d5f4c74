"""Video files, frame by frame: an overlay video of the classes. PyAV is the extra `video`."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from csc_jax.errors import UserError
from csc_jax.text import name as printable_name

log = logging.getLogger("csc_jax")

# By suffix, so that FFmpeg does not guess: a playlist, which any file can be, names other files.
FORMATS = {
    ".mp4": "mov",
    ".m4v": "mov",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
}
_MOST_PIXELS = 1 << 26  # of a frame; 8K has 2^25
_RATE = Fraction(25)  # frames/s where the file does not say
_MOST_RATE = 1000


def segment(predict: Callable[[np.ndarray], Any], video: Path, out: Path) -> int:
    """Writes a video under the classes' colours, as MP4 with H.264; sound is left out.

    One frame is in memory at a time. Sides of an odd number of px lose the last one.

    Args:
      predict: frame (H, W, 3) uint8 RGB -> `Result`.
      video: with one of the suffixes of `FORMATS`.
      out: .mp4 to write.

    Returns:
      The number of frames.

    Raises:
      UserError: PyAV is not installed, or the file is no video that can be read.
    """
    av = library(video)
    unfinished = out.with_name(out.name + ".unfinished")
    began, count = time.monotonic(), 0
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(video.open("rb"))
            source = stack.enter_context(
                av.open(file, format=FORMATS[video.suffix.lower()], metadata_errors="replace")
            )
            if not source.streams.video:
                raise UserError(f"{video} holds no video.")
            stream = source.streams.video[0]
            size = _checked_size(stream, video)
            stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
            target = stack.enter_context(av.open(str(unfinished), "w", format="mp4"))
            written = target.add_stream("libx264", rate=_rate(stream))
            written.height, written.width = (side // 2 * 2 for side in size)
            written.pix_fmt = "yuv420p"
            bar = stack.enter_context(
                tqdm(total=stream.frames or None, unit="frame", disable=None, desc=video.name)
            )
            for frame in _frames(source, stream, size, video):
                picture = predict(frame).overlay()[: written.height, : written.width]
                drawn = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                target.mux(written.encode(drawn))
                count += 1
                bar.update()
            if not count:
                raise UserError(f"{video} holds no frame.")
            target.mux(written.encode())
        unfinished.replace(out)
    except av.FFmpegError as error:
        reason = printable_name(error)[:200]
        raise UserError(f"{video} cannot be read as a video after {count} frames: {reason}.") from (
            error
        )
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)
    log.info("%d frames written to %s, %.2g frames/s", count, out, count / _since(began))
    return count


def library(video: Path) -> Any:
    """Returns PyAV; UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"{video} is a video, which needs PyAV: pip install 'csc-jax[video]'."
        ) from error
    return av


def _checked_size(stream: Any, video: Path) -> tuple[int, int]:
    """Returns (height, width) px of the frames."""
    height, width = stream.codec_context.height, stream.codec_context.width
    if min(height, width) < 2 or height * width > _MOST_PIXELS:
        raise UserError(
            f"{video} has frames of {height}x{width} px; it takes sides of 2 px and more, and "
            f"{_MOST_PIXELS} px at most."
        )
    return height, width


def _rate(stream: Any) -> Fraction:
    rate = stream.average_rate
    return Fraction(rate) if rate and 0 < rate <= _MOST_RATE else _RATE


def _frames(source: Any, stream: Any, size: tuple[int, int], video: Path) -> Iterator[np.ndarray]:
    for frame in source.decode(stream):
        if (frame.height, frame.width) != size:
            raise UserError(
                f"{video} changes its size to {frame.height}x{frame.width} px on the way; it takes "
                "one size."
            )
        yield frame.to_ndarray(format="rgb24")


def _since(began: float) -> float:
    return max(time.monotonic() - began, 1e-9)
