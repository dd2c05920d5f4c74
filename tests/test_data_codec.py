"""Files of images and labels, decoded one by one."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, picture, write_png

from csc_jax import data
from csc_jax.data import codec
from csc_jax.errors import UserError


def encoded(pixels, suffix, mode=None, **options):
    """Returns an image as Pillow writes it, in one of its modes."""
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, suffix, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["eps", "gif", "ppm", "tga", "jpeg2000", "ico", "pcx", "sgi"])
def test_formats_that_are_not_on_the_list_are_not_tried(monkeypatch, kind):
    """Pillow would start a program, Ghostscript, for EPS; OpenCV runs decoders few look at."""
    content = encoded(np.zeros(SIZE, np.uint8), kind)

    def tried(*_, **__):
        raise AssertionError("a decoder ran")

    monkeypatch.setattr(subprocess, "Popen", tried)
    monkeypatch.setattr(codec.cv2, "imdecode", tried)
    monkeypatch.setattr(codec.Image, "open", tried)
    for decode in (codec.decode_photo, lambda data: codec.decode_mask(data, ".png")):
        with pytest.raises(codec.Unusable, match="none of JPEG, PNG, WebP, BMP, TIFF"):
            decode(content)
    assert codec.decode_image(content) is None


def test_an_image_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.png cannot be read: No such file"):
        codec.read_image(tmp_path / "none.png")
    (tmp_path / "half.png").write_bytes(codec.encode_png(picture(0))[:50])
    with pytest.raises(UserError, match=r"half\.png is corrupt or truncated"):
        codec.read_image(tmp_path / "half.png")


def test_an_image_that_promises_too_many_pixels_is_corrupt():
    content = codec.encode_png(picture(0))
    header = b"IHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + content[24:29]
    huge = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    assert codec.decode_image(huge) is None
    assert codec.decode_image(b"") is None


def test_channels_are_rgb(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    write_png(tmp_path / "red.png", red)
    np.testing.assert_array_equal(data.read_image(tmp_path / "red.png"), red)
