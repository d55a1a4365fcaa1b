"""Run folders: whole or not at all, and never written over by accident."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ntkdp import __version__

#: The file by which a folder is known to hold a run.
MARKER = "metrics.json"
#: That of a sweep, which has a ``metrics.json`` too.
_OF_A_SWEEP = "sweep.json"


class RunFolder:
    """A folder that a run will be put into.

    Parameters
    ----------
    path : path
        Where; it is made when the run is complete.
    overwrite : bool
        Replace a run that is there. A folder that holds anything else is never replaced.
    finished : dict, optional
        The configuration of a run that is resumed, and may be there: what was to be made is there
        already.

    Raises
    ------
    FileExistsError
        If the folder holds another run and ``overwrite`` is false, or holds something else.
    PermissionError, NotADirectoryError
        If nothing can be written there.
    """

    def __init__(
        self, path: Path, *, overwrite: bool = False, finished: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.overwrite = overwrite
        self._resumed = finished is not None
        #: Whether the run that was to be made is there.
        self.is_finished = finished is not None and self._holds(finished)
        if not self.is_finished:
            self._check()
        check_writable(path, path.absolute().parent)

    @property
    def partial(self) -> Path:
        """The folder beside it in which the run may grow until it is complete."""
        target = self.path.absolute()
        return target.with_name(f".{target.name}-partial")

    def _run(self) -> dict[str, Any]:
        """What the run that is there says of itself; nothing if there is none."""
        try:
            found = json.loads((self.path / MARKER).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and "ntkdp" in found else {}

    def _holds(self, config: dict[str, Any]) -> bool:
        run = self._run()
        same_version = run.get("ntkdp") == __version__
        return same_version and bool(run.get("config") == json.loads(json.dumps(config)))

    def _check(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise FileExistsError(f"output folder {self.path} is a file; choose another --out")
        if not any(self.path.iterdir()):
            return
        if not self._run() or (self.path / _OF_A_SWEEP).exists():
            raise FileExistsError(
                f"output folder {self.path} holds files that are not a run; choose another --out"
            )
        if not self.overwrite:
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
        """A temporary folder beside the final one, moved into place when the body ends well.

        Where the run grows in ``partial``, everything temporary is in there.
        """
        target = self.path.absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = self.partial if self.partial.is_dir() else target.parent
        temporary = Path(tempfile.mkdtemp(dir=beside, prefix=f".{target.name}-"))
        temporary.chmod(0o755)
        try:
            yield temporary
            self._check()
            replaced = None
            if target.exists():
                replaced = Path(tempfile.mkdtemp(dir=beside, prefix=f".{target.name}-old-"))
                os.rename(target, replaced / target.name)
            os.rename(temporary, target)
            if replaced is not None:
                shutil.rmtree(replaced)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_writable(path: Path, within: Path) -> None:
    """Raise unless the folder ``within``, which is written to for ``path``, is writable or can be
    made.

    Raises
    ------
    PermissionError, NotADirectoryError
        Naming the folder above it that is in the way.
    """
    nearest = within.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(f"output folder {path}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"output folder {path}: {nearest} cannot be written to")
