"""Run folders: whole or not at all, and never written over by accident."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ntkdp._backend.files import make_folder, read_json
from ntkdp._backend.stopping import as_a_whole, undone_by
from ntkdp._results.folder_lock import held
from ntkdp._results.out_path import check_path, check_writable
from ntkdp._results.own_files import OwnFiles, changed, shown
from ntkdp._results.provenance import VERSION

#: The file by which a folder is known to hold a run.
MARKER = "metrics.json"
#: Those of folders that grow cell by cell, some of which have a ``metrics.json`` too.
_OF_CELLS = ("sweep.json", "run.json")
#: Where a run grows in a folder that is there already, and may be a mount point.
_INSIDE = ".partial"


class RunFolder:
    """A folder that a run will be put into.

    Parameters
    ----------
    path : path
        Where; it is made when the run is complete. If it is there already, it stays what it is, a
        mount point or a link too, and files are put into it.
    overwrite : bool
        Replace a run that is there. Only files that are as the program wrote them are removed: if
        there are others, nothing is.
    finished : dict, optional
        The configuration of a run that is resumed, and may be there: what was to be made is there
        already.

    Attributes
    ----------
    partial : path
        The folder in which the run may grow until it is complete: next to the folder, or in it if
        it is there already.

    Raises
    ------
    FileExistsError
        If the folder holds another run and ``overwrite`` is false, or holds something else, which
        is named.
    ValueError
        If the path is too long, or not UTF-8 text.
    PermissionError, NotADirectoryError
        If nothing can be written there.
    """

    def __init__(
        self, path: Path, *, overwrite: bool = False, finished: dict[str, Any] | None = None
    ) -> None:
        check_path(path)
        self.path = path
        self.overwrite = overwrite
        target = path.absolute()
        there = path.is_dir()
        self.partial = target / _INSIDE if there else target.with_name(f".{target.name}-partial")
        self._resumed = finished is not None
        #: Whether the run that was to be made is there.
        self.is_finished = finished is not None and self._holds(finished)
        if not self.is_finished:
            self._check()
        check_writable(path, target if there else target.parent)

    def _run(self) -> dict[str, Any]:
        """What the run that is there says of itself; nothing if there is none."""
        try:
            found = read_json(self.path / MARKER)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and "ntkdp" in found else {}

    def _holds(self, config: dict[str, Any]) -> bool:
        run = self._run()
        same_version = run.get("ntkdp") == VERSION
        return same_version and bool(run.get("config") == json.loads(json.dumps(config)))

    def _check(self) -> None:
        files = OwnFiles(self.path)
        # What grows in there has a list of its own, and is left alone.
        foreign = [name for name in files.foreign() if name != f"{_INSIDE}/"]
        cells = [name for name in _OF_CELLS if (self.path / name).exists()]
        is_run = bool(self._run()) and not cells
        if cells or (foreign and not is_run):
            raise FileExistsError(
                f"output folder {self.path} holds files that are not a run: "
                f"{shown(foreign or cells)}; choose another --out"
            )
        if foreign:
            raise FileExistsError(changed(self.path, "run", foreign))
        if is_run and not self.overwrite:
            replace = (
                "pass --overwrite beside --resume to replace it with what is resumed"
                if self._resumed
                else "pass --overwrite to replace it"
            )
            raise FileExistsError(
                f"output folder {self.path} holds another run; {replace}, or choose another --out"
            )

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """A temporary folder, whose files are put into place when the body ends well.

        The body writes them as :class:`OwnFiles`, and so they are known when they are replaced.
        """
        growing = OwnFiles(self.partial)

        def leave() -> None:
            # What went wrong first is what is told.
            with suppress(OSError):
                if not growing.finished():
                    growing.remove_with_folder()

        make_folder(self.partial)
        with held(self.partial), undone_by(leave):
            try:
                with growing.temporary_subfolder() as new:
                    yield new
                    self._check()
                    with as_a_whole():
                        self._put(new)
            finally:
                leave()

    def _put(self, new: Path) -> None:
        target = self.path.absolute()
        if target.is_dir():
            # A mount point or a link cannot be replaced, so its files are. Without a marker the
            # folder is not taken for a whole run in between.
            there = OwnFiles(target)
            there.remove(first=MARKER)
            there.take(new, last=MARKER)
        else:
            make_folder(target.parent)
            os.rename(new, target)
