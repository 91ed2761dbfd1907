"""Files of a data set, in a folder or in zip archives, by one kind of name."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm")

_UNREADABLE = (
    OSError,
    KeyError,
    EOFError,
    RuntimeError,  # an encrypted member; NotImplementedError, an unknown compression, is one too
    zipfile.BadZipFile,
    zlib.error,
)


class DataError(ValueError):
    """Something on disk is not what a data set needs; the message is one line."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Source:
    """A folder, or a zip archive, that holds a data set.

    Names are relative and use ``/``. A zip lying directly in the folder counts as a folder of its own name
    (``images.zip/Train/a.png``), so a data set works as downloaded, in parts. Where a folder and a zip hold
    the same layout, the shallower one is found first, then the first by name.

    An archive is opened on first use, once a process: a file handle that came through a fork shares its
    position with the parent's, and two readers would get each other's bytes.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self.damaged: list[str] = []
        if not self.root.exists():
            raise DataError(f"{self.root}: no such file or folder")
        self._is_archive = self.root.is_file()
        if self._is_archive and not zipfile.is_zipfile(self.root):
            size = self.root.stat().st_size
            raise DataError(f"{self.root}: neither a folder nor a readable zip archive ({size} bytes)")
        self._archives: dict[str, Path] = {}
        if self._is_archive:
            self._archives[""] = self.root
        elif not os.access(self.root, os.R_OK | os.X_OK):
            raise DataError(f"{self.root}: no permission to read this folder")
        else:
            for entry in sorted(os.scandir(self.root), key=lambda entry: entry.name):
                if entry.name.lower().endswith(".zip") and entry.is_file():
                    self._archives[entry.name] = Path(entry.path)
        self._folders: dict[str, set[str]] | None = None
        self._open: dict[str, zipfile.ZipFile] = {}
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"Source({str(self.root)!r})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}, "_folders": None}

    # Listing ---------------------------------------------------------------------------------------------

    @property
    def _listing(self) -> dict[str, set[str]]:
        """The names of every folder's files; hidden ones and what macOS adds to archives are left out."""
        if self._folders is None:
            self._folders = {"": set()}
            for name in self._archives:
                self._list_archive(name)
            if not self._is_archive:
                self._list_folder(str(self.root), "", set())
        return self._folders

    def _list_archive(self, archive: str) -> None:
        assert self._folders is not None
        try:
            members = self._archive(archive).namelist()
        except DataError as error:
            if self._is_archive:
                raise
            self.damaged.append(str(error))
            return
        prefix = f"{archive}/" if archive else ""
        self._folders.setdefault(archive, set())
        for member in members:
            parts = member.split("/")
            if any(part.startswith(".") or part == "__MACOSX" for part in parts):
                continue
            for depth in range(1, len(parts)):
                self._folders.setdefault(prefix + "/".join(parts[:depth]), set())
            if parts[-1]:
                self._folders[(prefix + "/".join(parts[:-1])).rstrip("/")].add(parts[-1])

    def _list_folder(self, path: str, name: str, above: set[tuple[int, int]]) -> None:
        assert self._folders is not None
        files = self._folders.setdefault(name, set())
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link to a folder above would be followed for ever
            return
        try:
            entries = list(os.scandir(path))
        except OSError as error:
            self.damaged.append(f"{path}: {error.strerror}")
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                below = f"{name}/{entry.name}" if name else entry.name
                self._list_folder(entry.path, below, above | {identity})
            elif name or entry.name not in self._archives:
                files.add(entry.name)

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name is there. A name that leads out of the root is not."""
        folder, _, file = name.rpartition("/")
        return name in self._listing or file in self._listing.get(folder, ())

    def files(self, folder: str = "", suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
        """Sorted names of the files right in ``folder``, images unless told otherwise."""
        return sorted(f for f in self._listing.get(folder, ()) if f.lower().endswith(suffixes))

    def folders(self, folder: str = "") -> list[str]:
        """Sorted names of the folders right in ``folder``."""
        prefix = f"{folder}/" if folder else ""
        return sorted(
            name[len(prefix) :]
            for name in self._listing
            if name and name.startswith(prefix) and "/" not in name[len(prefix) :]
        )

    def all_folders(self) -> Iterable[str]:
        """Every folder's name, the root's own as the empty one."""
        return self._listing.keys()

    def find(self, pattern: str) -> str | None:
        """The file or folder nearest the root whose last components match, as in ``Train*/label.csv``."""
        *above, last = pattern.split("/")
        found = [folder for folder in self._listing if folder and _ends_with(folder, [*above, last])]
        for folder, files in self._listing.items():
            if not above or _ends_with(folder, above):
                prefix = f"{folder}/" if folder else ""
                if "*" not in last:
                    found += [prefix + last] if last in files else []
                else:
                    found += [prefix + file for file in files if fnmatchcase(file, last)]
        return min(found, key=lambda name: (name.count("/"), name), default=None)

    # Reading ---------------------------------------------------------------------------------------------

    def _archive(self, name: str) -> zipfile.ZipFile:
        if self._pid != os.getpid():
            self._open, self._pid = {}, os.getpid()
        if name not in self._open:
            path = self._archives[name]
            try:
                self._open[name] = zipfile.ZipFile(path)
            except (*_UNREADABLE, ValueError) as error:
                raise DataError(f"{path}: damaged zip archive ({one_line(error)})") from None
        return self._open[name]

    def _locate(self, name: str) -> tuple[str | None, str]:
        """The archive that holds ``name`` and its name in there, or None and the name in the root folder."""
        if self._is_archive:
            return "", name
        first, _, rest = name.partition("/")
        return (first, rest) if first in self._archives else (None, name)

    def read(self, name: str) -> bytes:
        """The bytes of a file; DataError where it cannot be read."""
        archive, inner = self._locate(name)
        try:
            if archive is None:
                return (self.root / inner).read_bytes()
            return self._archive(archive).read(inner)
        except _UNREADABLE as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise DataError(f"{self.root}/{name}: cannot be read ({reason})") from None

    @contextmanager
    def open_text(self, name: str) -> Iterator[io.TextIOBase]:
        """A text file, line by line; a byte-order mark is taken off."""
        archive, inner = self._locate(name)
        try:
            if archive is None:
                with open(self.root / inner, encoding="utf-8-sig", newline="") as file:
                    yield file
            else:
                with self._archive(archive).open(inner) as raw:
                    yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.root}/{name}: not a text file ({one_line(error)})") from None
        except DataError:
            raise
        except _UNREADABLE as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise DataError(f"{self.root}/{name}: cannot be read ({reason})") from None

    def read_text(self, name: str) -> str:
        with self.open_text(name) as file:
            return file.read()


def _ends_with(name: str, patterns: list[str]) -> bool:
    parts = name.split("/")
    return len(parts) >= len(patterns) and all(
        fnmatchcase(part, pattern) for part, pattern in zip(parts[-len(patterns) :], patterns, strict=True)
    )
