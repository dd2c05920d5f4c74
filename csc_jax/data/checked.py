"""What a preparation has checked and encoded so far, so that a killed one can be resumed."""

import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csc_jax.data.census import Facts
from csc_jax.data.moments import Moments


class Encoded(NamedTuple):
    """One image as it will be stored.

    Attributes:
      image: None = the user's own encoding.
      label: PNG of class ids.
      size: (height, width) px.
      facts: of both.
      pixel_type: of the image, as NumPy names it.
      moments: of its values, for an image that keeps them; None = RGB of 8 bits.
    """

    image: bytes | None
    label: bytes
    size: tuple[int, int]
    facts: Facts
    pixel_type: str = "uint8"
    moments: Moments | None = None


class Checked:
    """A folder with a file for each image that was checked and found good.

    A key must change whenever what belongs to it does. Different keys may be saved by several
    threads at once.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def load(self, key: str) -> Encoded | None:
        """Returns what was saved; None if there is nothing, or nothing whole."""
        try:
            # A zip archive, which has checksums.
            with self._path(key).open("rb") as file, np.load(file) as stored:
                image, label = stored["image"].tobytes(), stored["label"].tobytes()
                height, width = stored["size"].tolist()
                values = dict(stored["values"].tolist())
                facts = Facts(str(stored["digest"]), tuple(stored["ids"].tolist()), values)
                pixel_type, moments = "uint8", None
                if "mean" in stored:
                    pixel_type = str(stored["pixel_type"])
                    moments = Moments(height * width, stored["mean"], stored["squares"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return Encoded(image or None, label, (height, width), facts, pixel_type, moments)

    def save(self, key: str, encoded: Encoded) -> None:
        """Saves all or nothing; OSError if that is not possible."""
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._path(key).with_suffix(".unfinished")
        measured: dict[str, Any] = {}
        if encoded.moments is not None:
            mean, squares = encoded.moments.mean, encoded.moments.squares
            pixel_type = np.array(encoded.pixel_type)
            measured = {"pixel_type": pixel_type, "mean": mean, "squares": squares}
        try:
            with unfinished.open("wb") as file:
                np.savez(
                    file,
                    image=np.frombuffer(encoded.image or b"", np.uint8),
                    label=np.frombuffer(encoded.label, np.uint8),
                    size=np.array(encoded.size),
                    digest=np.array(encoded.facts.digest),
                    ids=np.array(encoded.facts.ids),
                    values=np.array(list(encoded.facts.values.items()), np.int64).reshape(-1, 2),
                    **measured,
                )
            unfinished.replace(self._path(key))
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def clear(self) -> None:
        """Removes everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.npz"
