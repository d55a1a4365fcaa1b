"""Cells of a sweep, or cases of a run, on disk: each is written whole or not at all, and stays."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ntkdp._backend.files import make_folder, read_json, require_plain
from ntkdp._backend.stopping import undone_by
from ntkdp._results import cell_file
from ntkdp._results.cell_file import Content
from ntkdp._results.folder_lock import held
from ntkdp._results.out_path import check_path, check_writable
from ntkdp._results.own_files import OwnFiles, changed, shown
from ntkdp._results.provenance import VERSION

#: What a caller makes from the content of a cell.
Cell = TypeVar("Cell")


class NoFolder:
    """Cells that are kept nowhere, for a sweep or run without a folder."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Do nothing around the body."""
        yield

    def find(self, name: str, parse: Callable[[Any], Cell]) -> Cell | None:
        """Return None, because no cell has been kept."""
        del name, parse
        return None

    def write(self, name: str, content: Mapping[str, object]) -> None:
        """Keep nothing."""
        del name, content


class CellFolder:
    """A folder in which a sweep grows cell by cell; :meth:`growing` makes it.

    Parameters
    ----------
    path : path
        The folder.
    settings : dict
        Everything that the cells depend on, as JSON can hold it. A sweep is resumed only if its
        settings are equal.
    resume, overwrite : bool
        Continue the sweep that the folder holds, or remove it. A folder that holds anything else
        is never touched.
    kind : str
        The kind of work that grows there, as errors call it. A file of this name holds the
        settings, and shows that the folder is of this kind.

    Attributes
    ----------
    notes : list of str
        The damaged cells that :meth:`find` met.

    Raises
    ------
    FileExistsError
        If the folder holds a sweep and neither is asked for, or holds something else.
    FileNotFoundError
        If there is nothing to resume.
    ValueError
        If the sweep there has other settings, naming them.
    PermissionError, NotADirectoryError
        If nothing can be written there.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, object],
        *,
        resume: bool = False,
        overwrite: bool = False,
        kind: str = "sweep",
    ) -> None:
        check_path(path)
        self.path = path
        self.notes: list[str] = []
        self._kind = kind
        self._marker = path / f"{kind}.json"
        self._files = OwnFiles(path)
        self._overwrite = overwrite and not resume
        # In the form that is read from the file, where tuples are lists.
        self.settings: dict[str, object] = json.loads(json.dumps({"ntkdp": VERSION, **settings}))
        #: Whether the sweep in the folder goes on: by request, or because this object began it.
        self._continues = resume
        self._check_options()
        check_writable(path, path)

    def _check_options(self) -> None:
        """Raise unless the options fit what the folder holds."""
        begun = self._has_begun()
        self._check(begun)
        if self._continues:
            if not begun:
                raise FileNotFoundError(
                    f"no {self._kind} to resume in {self.path}: leave out --resume, or fix --out"
                )
            self._check_same()
        elif begun and not self._overwrite:
            raise FileExistsError(
                f"output folder {self.path} holds a {self._kind}; pass --resume to continue it, "
                "--overwrite to replace it, or choose another --out"
            )

    def _has_begun(self) -> bool:
        """Whether ntkdp's file of settings is there, whole or damaged."""
        try:
            settings = read_json(self._marker)
        except OSError:
            return False
        except ValueError:
            return self._files.has_written(self._marker.name)
        return isinstance(settings, dict) and "ntkdp" in settings

    def _check(self, begun: bool) -> None:
        """Raise if the folder holds something that must not be touched."""
        foreign = self._files.foreign()
        if begun and not self._overwrite:
            return
        if begun and foreign:
            raise FileExistsError(changed(self.path, self._kind, foreign))
        if not begun and (others := foreign + self._files.finished()):
            raise FileExistsError(
                f"output folder {self.path} holds files that are not a {self._kind}: "
                f"{shown(others)}; choose another --out"
            )

    def _check_same(self) -> None:
        """Raise unless the folder has these settings."""
        try:
            there = read_json(self._marker)
            if not isinstance(there, dict):
                raise ValueError("it has no names")
        except ValueError as error:
            raise ValueError(
                f"{self._marker} is damaged ({error}); choose another --out, or remove "
                f"{self.path} yourself"
            ) from error
        differing = [
            f"{name if name.isprintable() else ascii(name)}: {there.get(name)!r} there, "
            f"{self.settings.get(name)!r} now"
            for name in sorted({*there, *self.settings})
            if there.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"the {self._kind} in {self.path} has other settings "
                f"({_shortened('; '.join(differing))}); choose another --out, or pass --overwrite"
            )

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Hold the folder while cells are written: a kill from here on can be resumed.

        On entry, a sweep that is to be replaced is removed. An error before the first cell leaves
        nothing behind.

        Raises
        ------
        BlockingIOError
            If another process is at work in the folder.
        FileExistsError, FileNotFoundError, ValueError
            If the options no longer fit what the folder holds.
        """
        made = not self.path.exists()
        make_folder(self.path)
        with held(self.path):
            # Another process may have worked here since the options were checked.
            self._check_options()
            begins = not self._continues

            def leave() -> None:
                if begins and not self._has_cells():
                    self._continues = False
                    # The user is told of the first error, not of this one.
                    with suppress(OSError):
                        self._files.remove(last=self._marker.name)
                        if made:
                            self.path.rmdir()

            with undone_by(leave):
                try:
                    if begins:
                        self._begin()
                    else:
                        self._files.remove_left_overs()
                    yield
                except BaseException:
                    leave()
                    raise

    def _begin(self) -> None:
        self._files.remove(last=self._marker.name)
        self._files.write(self._marker.name, json.dumps(self.settings, indent=2) + "\n")
        self._continues = True

    def remove(self) -> None:
        """Remove the cells, then the file of settings, then the folder if it is empty."""
        self._files.remove(last=self._marker.name)
        with suppress(OSError):
            self.path.rmdir()

    def _has_cells(self) -> bool:
        return any(self.path.glob(f"cells/[!.]*{cell_file.SUFFIX}"))

    def file(self, name: str) -> Path:
        """The path of the cell of this name, whether it is there or not."""
        return self.path / "cells" / f"{name}{cell_file.SUFFIX}"

    def write(self, name: str, content: Mapping[str, object]) -> None:
        """Put a cell on disk, whole or not at all, while the folder is growing.

        Raises
        ------
        OSError
            If it cannot be written; the message says whether earlier cells are safe.
        """
        data = cell_file.encode(content, self._label(name))
        try:
            cells = self._files.subfolder("cells")
            # A damaged cell is replaced.
            with cells.replacing(self.file(name).name, even_damaged=True) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            if error.errno is None:  # our own error, which says what to do
                raise
            more = ""
            if self._has_cells():
                more = " (finished work is kept: fix this, then --resume continues)"
            raise OSError(error.errno, f"{error.strerror}{more}", str(self.file(name))) from error

    def read(self, name: str) -> Content | None:
        """The content of a cell, or None if it is not on disk.

        Raises
        ------
        DamagedCell
            If its file is not as it was written.
        OSError
            If it cannot be read, or is not a plain file.
        """
        path = self.file(name)
        if not path.exists():
            return None
        require_plain(path)
        data = path.read_bytes()
        try:
            return cell_file.decode(data, self._label(name))
        except MemoryError:
            raise
        except Exception as error:  # bytes that somebody else wrote may break any part of it
            raise DamagedCell(f"{path} is damaged ({error})") from error

    def find(self, name: str, parse: Callable[[Any], Cell]) -> Cell | None:
        """The result of ``parse`` on a cell that is on disk and whole, or None if there is none.

        If the cell is damaged or holds something else, the notes say so.
        """
        try:
            content = self.read(name)
            return None if content is None else parse(content)
        except DamagedCell as error:
            note = str(error)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            note = f"{self.file(name)} is damaged (it holds something else: {error!r})"
        self.notes.append(f"{note}: made again")
        return None

    def _label(self, name: str) -> dict[str, object]:
        """Tells the cell from those of other settings, and from others of this folder."""
        return {"settings": self.settings, "name": name}


def open_cells(
    folder: str | os.PathLike[str] | None,
    config: BaseModel,
    kind: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> CellFolder | NoFolder:
    """The cells that a configuration leads to, in a folder if one is given.

    Raises
    ------
    FileExistsError, FileNotFoundError, ValueError, PermissionError, NotADirectoryError
        See :class:`CellFolder`.
    """
    if folder is None:
        return NoFolder()
    settings = config.model_dump(mode="json")
    return CellFolder(Path(folder), settings, resume=resume, overwrite=overwrite, kind=kind)


def resumable(path: Path, kind: str = "sweep") -> bool:
    """Whether work of this kind has begun in the folder."""
    return (path / f"{kind}.json").is_file()


class DamagedCell(ValueError):
    """A cell's file is not as it was written."""


def _shortened(text: str) -> str:
    return text if len(text) < 300 else text[:300] + "..."
