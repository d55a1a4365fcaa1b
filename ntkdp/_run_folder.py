"""Run folders: whole or not at all, and never written over by accident."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The file by which a folder is known to hold a run.
MARKER = "metrics.json"


class RunFolder:
    """A folder that a run will be put into.

    Parameters
    ----------
    path : path
        Where; it is made when the run is complete.
    overwrite : bool
        Replace a run that is there. A folder that holds anything else is never replaced.

    Raises
    ------
    FileExistsError
        If the folder holds another run and ``overwrite`` is false, or holds something else.
    PermissionError, NotADirectoryError
        If nothing can be written there.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        self.overwrite = overwrite
        self._check()
        parent = self._nearest_parent()
        if not parent.is_dir():
            raise NotADirectoryError(f"output folder {path}: {parent} is not a folder")
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"output folder {path}: {parent} cannot be written to")

    def _check(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise FileExistsError(f"output folder {self.path} is a file; choose another --out")
        if not any(self.path.iterdir()):
            return
        if not (self.path / MARKER).is_file():
            raise FileExistsError(
                f"output folder {self.path} holds files that are not a run; choose another --out"
            )
        if not self.overwrite:
            raise FileExistsError(
                f"output folder {self.path} holds another run; pass --overwrite to replace it, or "
                "choose another --out"
            )

    def _nearest_parent(self) -> Path:
        parent = self.path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        return parent

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """A temporary folder beside the final one, moved into place when the body ends well."""
        target = self.path.absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        temporary.chmod(0o755)
        try:
            yield temporary
            self._check()
            replaced = None
            if target.exists():
                replaced = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
                os.rename(target, replaced / target.name)
            os.rename(temporary, target)
            if replaced is not None:
                shutil.rmtree(replaced)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
