"""Videos come back frame by frame under the classes' colours."""

import sys

import numpy as np
import pytest

from csc_jax.deploy import Result, video
from csc_jax.errors import UserError

PALETTE = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="PyAV is not installed (extra video)")


def brightest(image):
    classes = image.argmax(axis=-1).astype(np.uint8)
    confidence = np.ones(classes.shape, np.float32)
    return Result(image, classes, confidence, None, ("a", "b", "c"), PALETTE)


def frames(count=6, height=48, width=64):
    """Halves in two colours, whose border moves to the right."""
    made = np.zeros((count, height, width, 3), np.uint8)
    for index, frame in enumerate(made):
        frame[:, : 16 + 4 * index] = (220, 40, 40)
        frame[:, 16 + 4 * index :] = (40, 40, 220)
    return made


def save(av, path, pictures, rate=10):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1"})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parity
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_video_comes_back_under_its_colours(av, tmp_path, suffix, caplog):
    caplog.set_level("INFO", "csc_jax")
    pictures = frames(height=49)  # an odd side
    path, out = save(av, tmp_path / f"a.{suffix}", pictures), tmp_path / "out.mp4"
    assert video.segment(brightest, path, out) == len(pictures)
    assert "6 frames written" in caplog.text
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 10
        found = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert found.shape == (6, 48, 64, 3)
    expected = np.stack([brightest(picture).overlay() for picture in pictures])[:, :48]
    difference = np.abs(found.astype(int) - expected)
    assert np.median(difference) <= 8  # H.264 loses some, most where colours meet
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "out.mp4"]


@pytest.mark.parity
def test_what_is_no_video_is_named(av, tmp_path, monkeypatch):
    out = tmp_path / "out.mp4"
    path = save(av, tmp_path / "a.mp4", frames())
    # FFmpeg would take it for a playlist, whatever its name, and open what it lists.
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[:300])
    for bad in (playlist, cut):
        with pytest.raises(UserError, match=f"{bad.name} cannot be read as a video"):
            video.segment(brightest, bad, out)
    monkeypatch.setattr(video, "_MOST_PIXELS", 48 * 64 - 1)
    with pytest.raises(UserError, match="has frames of 48x64 px; it takes"):
        video.segment(brightest, path, out)
    assert not list(tmp_path.glob("out*"))


def test_without_the_library_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"a\.mp4 is a video, .*csc-jax\[video\]"):
        video.segment(brightest, tmp_path / "a.mp4", tmp_path / "out.mp4")
