"""Cells of a sweep, or cases of a run, on disk: each lands whole or not at all, and stays."""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ntkdp._backend.files import make_folder, read_json
from ntkdp._backend.stopping import undone_by
from ntkdp._results.folder_lock import held
from ntkdp._results.out_path import check_path, check_writable
from ntkdp._results.own_files import OwnFiles, changed, shown
from ntkdp._results.provenance import VERSION

#: What is made of the content of a cell.
Cell = TypeVar("Cell")


class CellFolder:
    """A folder that a sweep grows in; :meth:`growing` makes it.

    Parameters
    ----------
    path : path
        Where.
    settings : dict
        What the cells depend on, as JSON can hold it. A sweep is resumed only with the same.
    resume, overwrite : bool
        Continue the sweep that the folder holds, or remove it. A folder that holds anything else
        is never touched.
    what : str
        What grows there, as errors call it. A file of this name holds the settings, and by it the
        folder is known.

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
        settings: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        what: str = "sweep",
    ) -> None:
        check_path(path)
        self.path = path
        self.notes: list[str] = []
        self._what = what
        self._marker = path / f"{what}.json"
        self._files = OwnFiles(path)
        self._overwrite = overwrite and not resume
        # As it reads from the file: tuples are lists there.
        self.settings = json.loads(json.dumps({"ntkdp": VERSION, **settings}))
        #: Whether what is there goes on, as is asked for or because this is what began it.
        self._continues = resume
        self._check_options()
        check_writable(path, path)

    def _check_options(self) -> None:
        """Raise unless what is there is what the options are for."""
        begun = self._has_begun()
        self._check(begun)
        if self._continues:
            if not begun:
                raise FileNotFoundError(
                    f"no {self._what} to resume in {self.path}: leave out --resume, or fix --out"
                )
            self._check_same()
        elif begun and not self._overwrite:
            raise FileExistsError(
                f"output folder {self.path} holds a {self._what}; pass --resume to continue it, "
                "--overwrite to replace it, or choose another --out"
            )

    def _has_begun(self) -> bool:
        """Whether the file of settings is there, be it damaged, and not another program's."""
        try:
            found = read_json(self._marker)
        except OSError:
            return False
        except ValueError:
            return self._files.has_written(self._marker.name)
        return isinstance(found, dict) and "ntkdp" in found

    def _check(self, begun: bool) -> None:
        """Raise if what is there must not be touched."""
        foreign = self._files.foreign()
        if begun and not self._overwrite:
            return
        if begun and foreign:
            raise FileExistsError(changed(self.path, self._what, foreign))
        if not begun and (others := foreign + self._files.finished()):
            raise FileExistsError(
                f"output folder {self.path} holds files that are not a {self._what}: "
                f"{shown(others)}; choose another --out"
            )

    def _check_same(self) -> None:
        try:
            found = read_json(self._marker)
        except ValueError as error:
            raise ValueError(
                f"{self._marker} is damaged ({error}); choose another --out, or remove "
                f"{self.path} yourself"
            ) from error
        differing = [
            f"{name if name.isprintable() else ascii(name)}: {found.get(name)!r} there, "
            f"{self.settings.get(name)!r} now"
            for name in sorted({*found, *self.settings})
            if found.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"the {self._what} in {self.path} has other settings "
                f"({_shortened('; '.join(differing))}); choose another --out, or pass --overwrite"
            )

    @contextmanager
    def growing(self) -> Iterator[None]:
        """The folder while cells come: killed from here on, it can be resumed.

        A sweep that is to be replaced is removed here. An error before the first cell leaves
        nothing behind.

        Raises
        ------
        BlockingIOError
            If another process is at work in the folder.
        FileExistsError, FileNotFoundError, ValueError
            If what is there is no longer what the options are for.
        """
        made = not self.path.exists()
        make_folder(self.path)
        with held(self.path):
            # Another process may have been at work here since the options were checked.
            self._check_options()
            begins = not self._continues

            def leave() -> None:
                if begins and not self._has_cells():
                    self._continues = False
                    # What went wrong first is what is told.
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
        with self._files.replacing(self._marker.name) as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        self._continues = True

    def remove(self) -> None:
        """Remove what has grown, last what it is known by, and the folder if nothing else is in
        it."""
        self._files.remove(last=self._marker.name)
        with suppress(OSError):
            self.path.rmdir()

    def _has_cells(self) -> bool:
        return any(self.path.glob("cells/[!.]*.json"))

    def file(self, name: str) -> Path:
        """Where a cell of this name is, or will be."""
        return self.path / "cells" / f"{name}.json"

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Put a cell on disk, whole or not at all, while the folder is growing.

        Raises
        ------
        OSError
            If it cannot be written, saying that the cells before it, if any, are safe.
        """
        encoded = _encoded(content)
        try:
            cells = self._files.subfolder("cells")
            # One that is damaged is made again.
            with cells.replacing(f"{name}.json", even_damaged=True) as temporary:
                whole = {"checksum": self._checksum(name, encoded), "content": encoded}
                temporary.write_text(json.dumps(whole) + "\n", encoding="utf-8")
        except OSError as error:
            if error.errno is None:  # it is our own, and says what to do
                raise
            more = ""
            if self._has_cells():
                more = " (what is finished is kept: fix this, then --resume continues)"
            raise OSError(error.errno, f"{error.strerror}{more}", str(self.file(name))) from error

    def read(self, name: str) -> dict[str, Any] | None:
        """A cell that is on disk, None if it is not.

        Raises
        ------
        DamagedCell
            If its file is not what was written.
        """
        path = self.file(name)
        try:
            whole = read_json(path)
            if whole["checksum"] != self._checksum(name, whole["content"]):
                raise ValueError("its checksum differs")
            content = _parsed(whole["content"])
            if not isinstance(content, dict):
                raise TypeError("it has no names")
        except FileNotFoundError:
            return None
        except (OSError, MemoryError):
            raise
        except Exception as error:  # what somebody else made may break anywhere
            raise DamagedCell(f"{path} is damaged ({error})") from error
        return content

    def find(self, name: str, parse: Callable[[Any], Cell]) -> Cell | None:
        """What ``parse`` makes of a cell that is on disk and whole, None if there is none.

        If it is damaged or holds something else, the notes say so.
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

    def _checksum(self, name: str, encoded: Any) -> str:
        # With the settings and the name: a cell of another sweep, or of another place in this one,
        # may have been put here.
        text = json.dumps([self.settings, name, encoded], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def resumable(path: Path, what: str = "sweep") -> bool:
    """Whether something has begun to grow there."""
    return (path / f"{what}.json").is_file()


class DamagedCell(ValueError):
    """A cell's file that is not what was written."""


def _encoded(value: Any) -> Any:
    """Arrays as their bytes, and numbers that JSON has no word for as ``float`` reads them."""
    if isinstance(value, dict):
        return {key: _encoded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(part) for part in value]
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"array": [value.dtype.str, list(value.shape), data]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _parsed(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        if set(value) == {"array"}:
            dtype, shape, data = value["array"]
            return np.frombuffer(base64.b64decode(data), dtype).reshape(shape)
        return {key: _parsed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_parsed(part) for part in value]
    return value


def _shortened(text: str) -> str:
    return text if len(text) < 300 else text[:300] + "..."
