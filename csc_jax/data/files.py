"""The user's files: in folders, or in zip archives that nobody has to unpack.

`walk` is the one way in which the project looks for files; `read_text` the one way in which it
reads a text file of the user's.
"""

import dataclasses
import errno
import os
import re
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from csc_jax import paths
from csc_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # without loss, so that no value is invented

# Folders and files that systems leave beside the user's own; names with a leading dot are others.
_LEFT_BY_SYSTEMS = frozenset(
    (
        *("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"),
        *("thumbs.db", "desktop.ini"),
    )
)
_MAX_TEXT = 1 << 30  # bytes; the annotations of COCO have 450 million


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


@dataclasses.dataclass(frozen=True)
class Walk:
    """What is in a folder and its sub-folders.

    Attributes:
      found: files of the wanted suffixes, by their path relative to the folder, in name order. The
        path has "/" between its parts and is in Unicode's composed form (NFC), whichever form the
        disk has it in.
      others: the other files, in the same way; hidden ones and those of the system are in neither.
      repeated: (folder, the same folder under the name it was read by): links that were passed
        over because nothing new is behind them.
    """

    found: dict[str, Path]
    others: dict[str, Path]
    repeated: tuple[tuple[Path, Path], ...]

    def passed_over(self) -> str:
        """Returns what was left out as ": passed over 12 .gif, 1 without suffix", or ""."""
        counts = Counter(PurePosixPath(name).suffix.lower() for name in self.others)
        parts = [
            f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(counts.items())
        ]
        parts += [f"{link}, which is {first} again" for link, first in self.repeated]
        return f"; passed over {', '.join(parts)}" if parts else ""


def walk(folder: Path, suffixes: Sequence[str], field: str = "data.root") -> Walk:
    """Lists the files of a folder and its sub-folders.

    Links are followed. A folder that several links lead to is read once, under its own name where
    that lies in `folder`, else under the first link's. Hidden files and folders are skipped (those
    that begin with a dot, and what macOS, Windows and storage systems leave behind).

    Args:
      suffixes: of the files that are wanted, in small letters; the files may have them in any.
      field: or flag that named the folder, for messages.

    Raises:
      UserError: for a folder that cannot be read, a link that leads nowhere, something that is
        neither file nor folder, a name that no list can hold, or two names that Unicode calls one.
    """
    found: dict[str, Path] = {}
    others: dict[str, Path] = {}
    repeated: list[tuple[Path, Path]] = []
    try:
        seen = {_identity(folder): folder}
        folders, links = [folder], list[Path]()
        # Links come last, so that a folder goes by its own name and not by that of a link to it.
        while folders or links:
            current = folders.pop() if folders else links.pop(0)
            if current != folder:
                first = seen.setdefault(_identity(current), current)
                if first != current:
                    repeated.append((current, first))
                    continue
            for entry in _entries(current):
                name = _listed_name(Path(entry.path), folder, field)
                suffix = PurePosixPath(name).suffix.lower()
                wanted = suffix in suffixes
                broken = entry.is_symlink() and _is_broken(entry.path)
                if broken and not wanted:
                    target = str(Path(entry.path).readlink())
                    raise UserError(
                        f"{entry.path} is a link to {target!r}, which leads nowhere. Restore what "
                        f"it links to or remove the link ({field})."
                    )
                if not broken and entry.is_dir():
                    (links if entry.is_symlink() else folders).append(Path(entry.path))
                elif broken or entry.is_file():
                    listed = found if wanted else others
                    if name in listed:
                        raise UserError(
                            f"{field} {folder} holds {name!r} twice, in two Unicode forms that "
                            "look the same. Keep one of them or rename it."
                        )
                    listed[name] = Path(entry.path)  # reading a broken link says so, for all
                elif wanted:
                    raise UserError(
                        f"{entry.path} is neither a file nor a folder. Remove it ({field})."
                    )
            links.sort()
    except (OSError, ValueError) as error:
        raise unreadable(error, field, folder) from error
    return Walk(_in_name_order(found), _in_name_order(others), tuple(repeated))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        visible = [
            entry
            for entry in entries
            if not entry.name.startswith(".") and entry.name.casefold() not in _LEFT_BY_SYSTEMS
        ]
    return iter(sorted(visible, key=lambda entry: entry.name))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_broken(path: str) -> bool:
    """Whether it is a link that leads nowhere, or to itself."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _listed_name(path: Path, folder: Path, field: str) -> str:
    name = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())
    # Not `isprintable`: that also refuses the blanks of Japanese names and of macOS screenshots.
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise UserError(
            f"{field} {folder} holds {name!a}, whose name has a line break, a control "
            "character or bytes that are no UTF-8; no list can hold it. Rename it."
        )
    return name


def _in_name_order(listed: dict[str, Path]) -> dict[str, Path]:
    return dict(sorted(listed.items(), key=lambda item: item[0].split("/")))


def unreadable(error: Exception, field: str, path: object) -> UserError:
    """Returns the error to raise for a file or folder of the user's that cannot be read."""
    name = getattr(error, "filename", None) or path
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"{name} cannot be read: {reason} ({field}). Grant the right to read it, repair it, or "
        "name another."
    )


def is_folder(path: Path, field: str) -> bool:
    """Whether there is such a folder; UserError if that cannot be told."""
    try:
        return path.is_dir()
    except OSError as error:
        raise unreadable(error, field, path) from error


def is_file(path: Path, field: str) -> bool:
    """Whether there is such a file; UserError if that cannot be told."""
    try:
        return path.is_file()
    except OSError as error:
        raise unreadable(error, field, path) from error


def read_text(path: Path, field: str) -> str:
    """Returns a text file's content: UTF-8, or UTF-16 as Windows writes it; without its BOM.

    Every line ends in a line feed alone.

    Raises:
      UserError: it cannot be read, or is no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TEXT + 1)
    except (OSError, ValueError) as error:  # ValueError: no possible name of a file
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{field} {path} cannot be read as a text file: {reason}.") from error
    if len(content) > _MAX_TEXT:
        raise UserError(
            f"{field} {path} cannot be read as a text file: it has more than {_MAX_TEXT} bytes."
        )
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in content[:2]:  # ASCII comes first in every list
        encoding = "utf-16-be" if content[0] == 0 else "utf-16-le"
    else:
        encoding = "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{field} {path} cannot be read as a text file: {error}. Save it as UTF-8."
        ) from error
    if "\0" in text:
        raise UserError(
            f"{field} {path} cannot be read as a text file: it holds NUL characters. Save it as "
            "UTF-8."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def stamp(file: File) -> str:
    """Returns a text that changes whenever the file's content does."""
    if isinstance(file, Member):
        return f"{file.info.filename} {file.info.file_size} {file.info.CRC}"
    try:
        status = file.stat()
    except OSError as error:  # reading the file, later, says so in full
        return f"{file} missing {error.errno}"
    return f"{file} {status.st_size} {status.st_mtime_ns}"


def existing_root(root: str, layout: str) -> Path:
    """Returns `data.root` as an absolute path; if missing, UserError says what belongs in it."""
    if not root:
        raise UserError(
            f"data.root is not set; pass --config.data.root=DIR, a folder with {layout}."
        )
    try:
        folder = paths.given("data.root", root).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise unreadable(error, "data.root", root) from error
    if not is_folder(folder, "data.root"):
        raise UserError(f"data.root {root} is not a folder; it must be one with {layout}.")
    return folder


def open_archives(folder: Path, names: Sequence[str]) -> list[zipfile.ZipFile]:
    """Opens those of the zip archives that are in `folder`.

    Raises:
      UserError: for one that is no zip archive, is cut off, or has a member outside its own root.
    """
    archives = []
    for path in (folder / name for name in names):
        if not is_file(path, "data.root"):
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
      pattern: of the relative path; its first parts are a folder and "*" stands for no "/".
      archives: are searched too; a file that is also in the folder is taken from there.
    """
    found: dict[str, File] = {}
    for archive in archives:
        for info in archive.infolist():
            path = PurePosixPath(unicodedata.normalize("NFC", info.filename))
            if _matches(path, pattern) and not any(part.startswith(".") for part in path.parts):
                found[path.as_posix()] = Member(archive, info)
    start = PurePosixPath(pattern.partition("*")[0]).parts
    base = folder.joinpath(*start)
    if is_folder(base, "data.root"):
        for name, file in walk(base, (PurePosixPath(pattern).suffix,)).found.items():
            path = PurePosixPath(*start, name)
            if _matches(path, pattern):
                found[path.as_posix()] = file
    return dict(sorted(found.items()))


def _matches(path: PurePosixPath, pattern: str) -> bool:
    return path.match(pattern) and len(path.parts) == pattern.count("/") + 1
