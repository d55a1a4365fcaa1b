"""The program's own files in a folder: those in a list there, unchanged since they were written."""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ntkdp._backend.files import replacing, temporary_name
from ntkdp._backend.stopping import undone_by

#: The list, a file next to those that it lists.
LIST = "ntkdp-files.sha256"
_HEADER = "# Files that ntkdp wrote here and may remove, as sha256sum lists them."
#: Announces a file before it exists, because a kill may leave it with any content.
_WRITING = "# being written: "
#: Announces a folder before it exists.
_FOLDER = "# folder: "
_FILE = re.compile(r"([0-9a-f]{64})  (.+)")
#: The end of the names of temporary files and folders, and of no others.
_TEMPORARY = ".tmp"
#: Only a file with such a name counts as the program's whatever its content.
_BEING_WRITTEN = re.compile(rf"{_WRITING}(\..+\.[0-9a-f]{{16}}{re.escape(_TEMPORARY)})")
#: The number of names that an error shows.
_SHOWN = 5


class _Listed(NamedTuple):
    """The content of a list; a file that was replaced has several checksums."""

    files: dict[str, set[str]]
    temporary: set[str]
    folders: set[str]


class OwnFiles:
    """The files that the program wrote into a folder, and may replace or remove.

    A file is the program's if the list in the folder has its name and the checksum of its content,
    and a folder if the list has its name. Files that somebody else put there or has changed since
    are not, nor are links, other file systems, and read-only files.

    Parameters
    ----------
    folder : path
        The folder, which must exist before something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._list = folder / LIST

    @contextmanager
    def replacing(self, name: str, *, even_damaged: bool = False) -> Iterator[Path]:
        """A temporary file to write to, renamed to this name when the body succeeds.

        Raises
        ------
        FileExistsError
            If something of that name is not the program's. With ``even_damaged``, any plain file
            may be replaced.
        """
        path = self.folder / name
        self._check_replaceable(path, even_damaged)
        temporary = temporary_name(path)
        self._append(f"{_WRITING}{temporary.name}")
        with replacing(path, temporary):
            yield temporary
            self._append(f"{_checksum(temporary)}  {name}")
            self._check_replaceable(path, even_damaged)

    def write(self, name: str, text: str) -> None:
        """Put a text file under this name, whole or not at all.

        Raises
        ------
        FileExistsError
            If something of that name is not the program's.
        """
        with self.replacing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def subfolder(self, name: str) -> "OwnFiles":
        """A folder in the folder, made if it does not exist.

        Raises
        ------
        FileExistsError
            If something else has that name, or a link.
        """
        path = self.folder / name
        if not os.path.lexists(path):
            self._append(f"{_FOLDER}{name}")
            path.mkdir()
        if path.is_symlink() or not path.is_dir():
            raise FileExistsError(f"{path} is no folder that ntkdp made; move it away")
        return OwnFiles(path)

    @contextmanager
    def temporary_subfolder(self) -> Iterator[Path]:
        """A new folder in the folder; the program's files that are left in it are removed."""
        new = self.subfolder(temporary_name(self.folder / "new").name)
        with undone_by(new.remove_with_folder):
            try:
                yield new.folder
            finally:
                new.remove_with_folder()

    def take(self, new: Path, *, last: str) -> None:
        """Move all files here from a folder on the same disk, the file ``last`` after the others.

        Raises
        ------
        FileExistsError
            If a name is taken.
        """
        # Both lists are whole until the end, so that a kill half-way leaves no unknown files.
        if os.path.lexists(self._list):
            raise FileExistsError(f"{self._list} is in the way; move it away")
        copy = temporary_name(new / LIST)
        OwnFiles(new)._append(f"{_WRITING}{copy.name}")
        shutil.copyfile(new / LIST, copy)
        os.rename(copy, self._list)
        names = [path.name for path in new.iterdir() if path.name != LIST]
        for name in sorted(names, key=lambda name: name == last):
            if os.path.lexists(self.folder / name):
                raise FileExistsError(f"{self.folder / name} is in the way; move it away")
            os.rename(new / name, self.folder / name)

    def has_written(self, name: str) -> bool:
        """Whether a file of this name is listed, whatever its content is now."""
        return name in self._listed().files

    def foreign(self) -> list[str]:
        """Names of files and folders that are not the program's; folders end with a slash."""
        return [self._name(path) for path, own in self._entries() if not own]

    def finished(self) -> list[str]:
        """Names of the program's files, apart from lists and unfinished ones."""
        names = [path.relative_to(self.folder) for path, own in self._entries() if own]
        return [
            str(name)
            for name in names
            if name.name != LIST and not any(part.endswith(_TEMPORARY) for part in name.parts)
        ]

    def remove(self, *, first: str = "", last: str = "") -> None:
        """Remove the program's files and leave the others, if any.

        The list is removed last, so that after a kill half-way the rest can be removed later.
        """
        listed = self._listed()
        paths = [path for path in self._paths() if path.name != LIST]
        for path in sorted(paths, key=lambda path: (path.name != first, path.name == last)):
            if _is_own_folder(path, listed):
                OwnFiles(path).remove_with_folder()
            elif _is_own(path, listed):
                path.unlink(missing_ok=True)
        if self._is_listed():
            self._list.unlink()

    def remove_with_folder(self) -> None:
        """Remove the program's files, and the folder too unless something else is in it."""
        self.remove()
        # A mount point stays, empty.
        with suppress(OSError):
            self.folder.rmdir()

    def remove_left_overs(self) -> None:
        """Remove half-written files that a kill left here and in the program's folders."""
        listed = self._listed()
        for path in self._paths():
            if path.name in listed.temporary and _is_own(path, listed):
                path.unlink(missing_ok=True)
            elif _is_own_folder(path, listed):
                inner = OwnFiles(path)
                if path.name.endswith(_TEMPORARY):
                    inner.remove_with_folder()
                else:
                    inner.remove_left_overs()

    def _entries(self) -> Iterator[tuple[Path, bool]]:
        """Every path here and in the program's folders, and whether it is the program's."""
        listed = self._listed()
        for path in self._paths():
            if _is_own_folder(path, listed):
                yield from OwnFiles(path)._entries()
            elif path.name == LIST:
                yield path, self._is_listed()
            else:
                yield path, _is_own(path, listed)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _name(self, path: Path) -> str:
        slash = "/" if path.is_dir() and not path.is_symlink() else ""
        return f"{path.relative_to(self.folder)}{slash}"

    def _is_listed(self) -> bool:
        """Whether there is a list of the program's, whose first line may have been cut short."""
        if not _is_plain(self._list):
            return False
        with open(self._list, "rb") as file:
            return _HEADER.encode().startswith(file.read(len(_HEADER)))

    def _listed(self) -> _Listed:
        listed = _Listed({}, set(), set())
        if self._is_listed():
            for line in self._list.read_text(encoding="utf-8", errors="replace").split("\n"):
                if match := _BEING_WRITTEN.fullmatch(line):
                    listed.temporary.add(match[1])
                elif line.startswith(_FOLDER):
                    listed.folders.add(line.removeprefix(_FOLDER))
                elif match := _FILE.fullmatch(line):
                    listed.files.setdefault(match[2], set()).add(match[1])
        return listed

    def _append(self, line: str) -> None:
        with suppress(FileExistsError):
            self._list.touch(exist_ok=False)
        if not self._is_listed():
            raise FileExistsError(f"{self._list} is no list of ntkdp's; move it away")
        # The line end comes first, so that a line cut short by a full disk does not spoil the next.
        with open(self._list, "a", encoding="utf-8") as file:
            if file.tell() < len(_HEADER):
                file.truncate(0)
                file.write(_HEADER)
            file.write(f"\n{line}")

    def _check_replaceable(self, path: Path, even_damaged: bool) -> None:
        if not os.path.lexists(path) or (even_damaged and _is_plain(path)):
            return
        if not _is_own(path, self._listed()):
            raise FileExistsError(
                f"{path} is not what ntkdp wrote there, or has changed since; move it away"
            )


def shown(names: Iterable[str]) -> str:
    """Names for an error message; of many, only the first few."""
    names = [name if name.isprintable() else ascii(name) for name in names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def changed(path: Path, kind: str, foreign: list[str]) -> str:
    """The reason why a folder is not replaced, for an error message."""
    return (
        f"output folder {path} holds a {kind}, and files that ntkdp did not write there or that "
        f"have changed since: {shown(foreign)}; nothing is removed: move them away, or choose "
        "another --out"
    )


def _is_plain(path: Path) -> bool:
    """Whether the path is that of a file, not a link, which its owner may write to."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) and bool(mode & stat.S_IWUSR)


def _is_own(path: Path, listed: _Listed) -> bool:
    if not _is_plain(path):
        return False
    if path.name in listed.temporary:
        return True
    # A file that is not listed at all is not read, because it may be large.
    checksums = listed.files.get(path.name)
    try:
        return checksums is not None and _checksum(path) in checksums
    except OSError:
        return False


def _is_own_folder(path: Path, listed: _Listed) -> bool:
    if path.name not in listed.folders or path.is_symlink() or not path.is_dir():
        return False
    same_disk = path.stat().st_dev == path.parent.stat().st_dev
    return same_disk and os.access(path, os.W_OK)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
