"""The user's files: in folders, or in zip archives that nobody has to unpack."""

import dataclasses
import errno
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from csc_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class Member:
    """A file inside a zip archive; has those methods of `Path` that a reader needs."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    def __str__(self) -> str:
        return f"{self.archive.filename}/{self.info.filename}"

    @property
    def suffix(self) -> str:
        """As of a path: ".png"."""
        return PurePosixPath(self.info.filename).suffix

    def is_file(self) -> bool:
        """A member that is listed is there."""
        return True

    def read_bytes(self) -> bytes:
        """Returns the content; OSError if it is damaged or encrypted."""
        try:
            return self.archive.read(self.info)
        # RuntimeError: encrypted. NotImplementedError, one of its kind: unknown compression.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise OSError(errno.EIO, str(error), str(self)) from error


File = Path | Member


def stamp(file: File) -> str:
    """Returns a text that changes whenever the file's content does."""
    if isinstance(file, Member):
        return f"{file.info.filename} {file.info.file_size} {file.info.CRC}"
    try:
        status = file.stat()
    except FileNotFoundError:
        return f"{file} missing"
    return f"{file} {status.st_size} {status.st_mtime_ns}"


def existing_root(root: str, layout: str) -> Path:
    """Returns `data.root` as an absolute path; if missing, UserError says what belongs in it."""
    if not root:
        raise UserError(
            f"data.root is not set; pass --config.data.root=DIR, a folder with {layout}."
        )
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"data.root {root} is not a folder; it must be one with {layout}.")
    return folder


def open_archives(folder: Path, names: Sequence[str]) -> list[zipfile.ZipFile]:
    """Opens those of the zip archives that are in `folder`.

    Raises:
      UserError: for one that is no zip archive, is cut off, or has a member outside its own root.
    """
    archives = []
    for path in (folder / name for name in names):
        if not path.is_file():
            continue
        try:
            archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} cannot be read as a zip archive ({error}); it may be cut off. Download it "
                "again, or put its unpacked folder beside it and remove it."
            ) from error
        for name in archive.namelist():
            if re.match(r"[/\\]|\w:", name) or ".." in re.split(r"[/\\]", name):
                raise UserError(
                    f"{path} holds the member {name!r}, which lies outside the archive's own root; "
                    "it is not the official archive. Download it again."
                )
        archives.append(archive)
    return archives


def find(folder: Path, pattern: str, archives: Sequence[zipfile.ZipFile]) -> dict[str, File]:
    """Returns the files that match, by path relative to `folder`, in name order.

    Args:
      pattern: of the relative path; "*" stands for no "/".
      archives: are searched too; a file that is also in the folder is taken from there.
    """
    found: dict[str, File] = {}
    for archive in archives:
        for info in archive.infolist():
            path = PurePosixPath(info.filename)
            if path.match(pattern) and len(path.parts) == pattern.count("/") + 1:
                found[path.as_posix()] = Member(archive, info)
    found |= {path.relative_to(folder).as_posix(): path for path in folder.glob(pattern)}
    return dict(sorted(found.items()))
