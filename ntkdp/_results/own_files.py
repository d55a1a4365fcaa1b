"""Which files of a folder are the program's: those that it lists there, as it wrote them."""

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
#: What is announced before it exists, for a kill may leave it with any content.
_WRITING, _FOLDER = "# being written: ", "# folder: "
_FILE = re.compile(r"([0-9a-f]{64})  (.+)")
#: How the names of temporary files and folders end, and no others.
_TEMPORARY = ".tmp"
#: A file of such a name only is believed to be the program's whatever it holds.
_BEING_WRITTEN = re.compile(rf"{_WRITING}(\..+\.[0-9a-f]{{16}}{re.escape(_TEMPORARY)})")
#: How many names an error shows.
_SHOWN = 5


class _Listed(NamedTuple):
    """What a list says: checksums of files by name, several of one that was replaced; names."""

    files: dict[str, set[str]]
    temporary: set[str]
    folders: set[str]


class OwnFiles:
    """The files that the program wrote into a folder, and may replace or remove.

    A file is the program's if the list in the folder has its name and the checksum of what it
    holds, a folder if the list has its name. What somebody else put there or has changed since is
    not, nor are links, other file systems, and what is read-only.

    Parameters
    ----------
    folder : path
        Where; it must exist before something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._list = folder / LIST

    @contextmanager
    def replacing(self, name: str, *, even_damaged: bool = False) -> Iterator[Path]:
        """A temporary file to write to, put under this name when the body ends well.

        Raises
        ------
        FileExistsError
            If there is something of that name that is not the program's. It may be a plain file
            of any content if ``even_damaged``.
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
            If there is something of that name that is not the program's.
        """
        with self.replacing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def subfolder(self, name: str) -> "OwnFiles":
        """A folder in the folder, made if it is not there.

        Raises
        ------
        FileExistsError
            If there is something else of that name, or a link.
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
        # Both lists are whole until the end: killed half-way, all files are known.
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
        """Whether a file of this name is listed, whatever it holds now."""
        return name in self._listed().files

    def foreign(self) -> list[str]:
        """Names of what is not the program's, those of folders with a slash at the end."""
        return [self._name(path) for path, own in self._entries() if not own]

    def finished(self) -> list[str]:
        """Names of the program's files, apart from lists and what was never finished."""
        names = [path.relative_to(self.folder) for path, own in self._entries() if own]
        return [
            str(name)
            for name in names
            if name.name != LIST and not any(part.endswith(_TEMPORARY) for part in name.parts)
        ]

    def remove(self, *, first: str = "", last: str = "") -> None:
        """Remove the program's files and leave the others, if any.

        The list goes at the very end: killed half-way, the rest can be removed later.
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
        # Where a file system is mounted it stays, empty.
        with suppress(OSError):
            self.folder.rmdir()

    def remove_left_overs(self) -> None:
        """Remove what a kill has left behind half-written, here and in the program's folders."""
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
        """Everything that is here and in the program's folders, and whether it is its own."""
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
        """Whether there is a list of the program's, be it one whose first line was cut short."""
        if not _is_plain(self._list):
            return False
        with open(self._list, "rb") as file:
            return _HEADER.encode().startswith(file.read(len(_HEADER)))

    def _listed(self) -> _Listed:
        listed = _Listed({}, set(), set())
        if self._is_listed():
            for line in self._list.read_text(encoding="utf-8", errors="replace").split("\n"):
                if found := _BEING_WRITTEN.fullmatch(line):
                    listed.temporary.add(found[1])
                elif line.startswith(_FOLDER):
                    listed.folders.add(line.removeprefix(_FOLDER))
                elif found := _FILE.fullmatch(line):
                    listed.files.setdefault(found[2], set()).add(found[1])
        return listed

    def _append(self, line: str) -> None:
        with suppress(FileExistsError):
            self._list.touch(exist_ok=False)
        if not self._is_listed():
            raise FileExistsError(f"{self._list} is no list of ntkdp's; move it away")
        # The line end first: what a full disk cut short does not spoil the next line.
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
    """Names for an error, the first few of many."""
    names = [name if name.isprintable() else ascii(name) for name in names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def changed(path: Path, what: str, foreign: list[str]) -> str:
    """Why a folder is not replaced."""
    return (
        f"output folder {path} holds a {what}, and what ntkdp did not write there or what has "
        f"changed since: {shown(foreign)}; nothing is removed: move it away, or choose another "
        "--out"
    )


def _is_plain(path: Path) -> bool:
    """Whether it is a file and no link, which its owner may write to."""
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
    # What is not listed at all is not read: it may be large.
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
