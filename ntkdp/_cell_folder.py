"""Cells of a sweep, or cases of a run, on disk: each lands whole or not at all, and stays."""

import base64
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ntkdp import __version__
from ntkdp._files import replacing
from ntkdp._run_folder import check_writable


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
        self.path = path
        self.notes: list[str] = []
        self._what = what
        self._marker = path / f"{what}.json"
        # As it reads from the file: tuples are lists there.
        self.settings = json.loads(json.dumps({"ntkdp": __version__, **settings}))
        there = path.exists() and (not path.is_dir() or any(map(_kept, path.iterdir())))
        if there and not self._is_ours():
            raise FileExistsError(
                f"output folder {path} holds files that are not a {what}; choose another --out"
            )
        if resume and not there:
            raise FileNotFoundError(
                f"no {what} to resume in {path}: leave out --resume, or mend --out"
            )
        check_writable(path, path)
        if there and resume:
            self._check_same()
            self._remove_left_overs()
        elif overwrite and path.exists():
            self.remove()
        elif there:
            raise FileExistsError(
                f"output folder {path} holds a {what}; pass --resume to continue it, --overwrite "
                "to replace it, or choose another --out"
            )

    def _is_ours(self) -> bool:
        """Whether the file of settings is there, be it damaged, and not another program's."""
        try:
            found = json.loads(self._marker.read_bytes())
        except OSError:
            return False
        except ValueError:
            return True
        return isinstance(found, dict) and "ntkdp" in found

    def _check_same(self) -> None:
        try:
            found = json.loads(self._marker.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self._marker} is damaged ({error}); pass --overwrite to start again"
            ) from error
        differing = [
            f"{name}: {found.get(name)!r} there, {self.settings.get(name)!r} now"
            for name in sorted({*found, *self.settings})
            if found.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"the {self._what} in {self.path} has other settings "
                f"({_shortened('; '.join(differing))}); choose another --out, or pass --overwrite"
            )

    def _remove_left_overs(self) -> None:
        for folder in (self.path, self.path / "cells"):
            for path in folder.glob(".*"):
                if not _kept(path):
                    path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder, last what it is known by: killed half-way, it can be removed again."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self._marker:
                path.unlink()
        self._marker.unlink(missing_ok=True)
        # What a link points to stays, empty.
        if not self.path.is_symlink():
            self.path.rmdir()

    @contextmanager
    def growing(self) -> Iterator[None]:
        """The folder while cells come: killed from here on, it can be resumed.

        An error before the first cell leaves nothing behind.
        """
        try:
            if not self._marker.is_file():
                self.path.mkdir(parents=True, exist_ok=True)
                with replacing(self._marker) as temporary:
                    text = json.dumps(self.settings, indent=2)
                    temporary.write_text(text + "\n", encoding="utf-8")
            yield
        except BaseException:
            if self.path.is_dir() and not self._has_cells():
                # What went wrong first is what is told.
                with suppress(OSError):
                    self.remove()
            raise

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
            self.file(name).parent.mkdir(exist_ok=True)
            with replacing(self.file(name)) as temporary:
                whole = {"checksum": self._checksum(encoded), "content": encoded}
                temporary.write_text(json.dumps(whole) + "\n", encoding="utf-8")
        except OSError as error:
            more = ""
            if self._has_cells():
                more = " (what is finished is kept: mend this, then --resume continues)"
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
            whole = json.loads(path.read_text(encoding="utf-8"))
            if whole["checksum"] != self._checksum(whole["content"]):
                raise ValueError("its checksum differs")
            content: dict[str, Any] = _parsed(whole["content"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise DamagedCell(f"{path} is damaged ({error})") from error
        return content

    def find(self, name: str) -> dict[str, Any] | None:
        """A cell that is on disk and whole; of one that is damaged the notes tell."""
        try:
            return self.read(name)
        except DamagedCell as error:
            self.notes.append(f"{error}: made again")
            return None

    def _checksum(self, encoded: Any) -> str:
        # With the settings, for a cell that another process has put here is not of this sweep.
        text = json.dumps([self.settings, encoded], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def resumable(path: Path, what: str = "sweep") -> bool:
    """Whether something has begun to grow there."""
    return (path / f"{what}.json").is_file()


class DamagedCell(ValueError):
    """A cell's file that is not what was written."""


def _kept(path: Path) -> bool:
    """Whether this is no half-written file that a kill has left behind."""
    return not (path.name.startswith(".") and path.name.endswith(".tmp"))


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
