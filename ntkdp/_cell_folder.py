"""Cells of a sweep on disk: each lands as it finishes, whole or not at all, and is found again."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

from ntkdp import __version__
from ntkdp._files import replacing

#: The file by which a folder is known to hold a sweep, finished or not.
MARKER = "sweep.json"


class CellFolder:
    """A folder that a sweep grows in.

    Parameters
    ----------
    path : path
        Where; it is made, with the sweep's settings in it, before the first cell.
    settings : dict
        What the cells depend on, as JSON can hold it. A sweep is resumed only with the same.
    resume, overwrite : bool
        Continue the sweep that the folder holds, or remove it. A folder that holds anything else
        is never touched.

    Raises
    ------
    FileExistsError
        If the folder holds a sweep and neither is asked for, or holds something else.
    FileNotFoundError
        If there is nothing to resume.
    ValueError
        If the sweep there has other settings, naming them.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = path
        # As it reads from the file: tuples are lists there.
        self.settings = json.loads(json.dumps({"ntkdp": __version__, **settings}))
        there = path.exists() and (not path.is_dir() or any(path.iterdir()))
        holds_sweep = (path / MARKER).is_file()
        if there and not holds_sweep:
            raise FileExistsError(
                f"output folder {path} holds files that are not a sweep; choose another --out"
            )
        if resume and not there:
            raise FileNotFoundError(
                f"no sweep to resume in {path}: leave out --resume, or mend --out"
            )
        if there and resume:
            self._check_same()
        elif there and overwrite:
            shutil.rmtree(path)
        elif there:
            raise FileExistsError(
                f"output folder {path} holds a sweep; pass --resume to continue it, --overwrite to "
                "replace it, or choose another --out"
            )
        (path / "cells").mkdir(parents=True, exist_ok=True)
        for left_over in (path / "cells").glob(".*.tmp"):
            left_over.unlink()
        if not holds_sweep or not resume:
            with replacing(path / MARKER) as temporary:
                temporary.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def _check_same(self) -> None:
        try:
            found = json.loads((self.path / MARKER).read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path / MARKER} is damaged ({error}); pass --overwrite to start again"
            ) from error
        differing = [
            f"{name}: {found.get(name)!r} there, {self.settings.get(name)!r} now"
            for name in sorted({*found, *self.settings})
            if found.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"the sweep in {self.path} has other settings "
                f"({_shortened('; '.join(differing))}); choose another --out, or pass --overwrite"
            )

    def file(self, name: str) -> Path:
        """Where a cell of this name is, or will be."""
        return self.path / "cells" / f"{name}.json"

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Put a cell on disk, whole or not at all."""
        text = _text(content)
        with replacing(self.file(name)) as temporary:
            temporary.write_text(
                json.dumps({"checksum": _checksum(text), "content": json.loads(text)}) + "\n",
                encoding="utf-8",
            )

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
            content: dict[str, Any] = whole["content"]
            if whole["checksum"] != _checksum(_text(_parsed(content))):
                raise ValueError("its checksum differs")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise DamagedCell(f"{path} is damaged ({error})") from error
        parsed: dict[str, Any] = _parsed(content)
        return parsed


class DamagedCell(ValueError):
    """A cell's file that is not what was written."""


def _text(content: Any) -> str:
    return json.dumps(_encoded(content), sort_keys=True, allow_nan=False)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _encoded(value: Any) -> Any:
    """Numbers that JSON has no word for, as the words that ``float`` reads."""
    if isinstance(value, dict):
        return {key: _encoded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _parsed(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        return {key: _parsed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_parsed(part) for part in value]
    return value


def _shortened(text: str) -> str:
    return text if len(text) < 300 else text[:300] + "..."
