"""Run folders: written whole or not at all, and never overwritten by accident."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ntkdp._backend.files import make_folder, read_json
from ntkdp._backend.stopping import as_a_whole, undone_by
from ntkdp._results.folder_lock import held
from ntkdp._results.out_path import check_path, check_writable
from ntkdp._results.own_files import OwnFiles, changed, shown
from ntkdp._results.provenance import VERSION

#: The file that shows that a folder holds a run.
MARKER = "metrics.json"
#: The files that show that a folder grows cell by cell; it may have a ``metrics.json`` too.
_CELL_MARKERS = ("sweep.json", "run.json")
#: The folder in which a run grows if its output folder exists, which may be a mount point.
_INSIDE = ".partial"


class RunFolder:
    """A folder that a run will be put into.

    Parameters
    ----------
    path : path
        The folder, which is made when the run is complete. If it exists, files are put into it,
        and it stays what it is, for instance a mount point or a link.
    overwrite : bool
        Replace the run that the folder holds. Only files that are as the program wrote them are
        removed; if there are others, none is.
    finished : dict, optional
        The configuration of a run that is resumed. If the folder holds this run whole, nothing is
        left to do.

    Attributes
    ----------
    partial : path
        The folder in which the run may grow until it is complete: next to the output folder, or
        in it if that exists.

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
        self, path: Path, *, overwrite: bool = False, finished: Mapping[str, object] | None = None
    ) -> None:
        check_path(path)
        self.path = path
        self.overwrite = overwrite
        target = path.absolute()
        exists = path.is_dir()
        self.partial = target / _INSIDE if exists else target.with_name(f".{target.name}-partial")
        self._resumed = finished is not None
        #: Whether the folder holds the requested run already.
        self.is_finished = finished is not None and self._holds(finished)
        if not self.is_finished:
            self._check()
        check_writable(path, target if exists else target.parent)

    def _run(self) -> Mapping[str, object]:
        """The metrics of the run that the folder holds, empty if there is none."""
        try:
            metrics = read_json(self.path / MARKER)
        except (OSError, ValueError):
            return {}
        return metrics if isinstance(metrics, dict) and "ntkdp" in metrics else {}

    def _holds(self, config: Mapping[str, object]) -> bool:
        run = self._run()
        # Runs that were recorded elsewhere are not those that the configuration trains.
        same_kind = run.get("ntkdp") == VERSION and run.get("runs", "trained") == "trained"
        return same_kind and bool(run.get("config") == json.loads(json.dumps(config)))

    def _check(self) -> None:
        files = OwnFiles(self.path)
        # A run that grows in there has a list of its own, and is left alone.
        foreign = [name for name in files.foreign() if name != f"{_INSIDE}/"]
        cells = [name for name in _CELL_MARKERS if (self.path / name).exists()]
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
                "pass --overwrite with --resume to replace it with the resumed run"
                if self._resumed
                else "pass --overwrite to replace it"
            )
            raise FileExistsError(
                f"output folder {self.path} holds another run; {replace}, or choose another --out"
            )

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """A temporary folder, whose files are put into place when the body succeeds.

        The body writes them as :class:`OwnFiles`, so that they are known when they are replaced.
        """
        growing = OwnFiles(self.partial)

        def leave() -> None:
            # The user is told of the first error, not of this one.
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
            # A mount point or a link cannot be replaced, so its files are. In between, the folder
            # has no marker and does not count as a whole run.
            there = OwnFiles(target)
            there.remove(first=MARKER)
            there.take(new, last=MARKER)
        else:
            make_folder(target.parent)
            os.rename(new, target)
