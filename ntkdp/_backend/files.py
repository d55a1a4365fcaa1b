"""Files that are written whole or not at all, and JSON that any program may have written."""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ntkdp._backend.stopping import undone_by

#: No file of ours is nested deeper, and a deeper one could exhaust the stack of a recursion.
_DEEPEST = 100


@contextmanager
def replacing(
    path: str | os.PathLike[str], temporary: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """A temporary file to write to, next to ``path`` and renamed to it when the body succeeds.

    It is new, by default under a name that nothing else has. If ``path`` is a link, the file that
    it leads to is replaced.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    FileExistsError, PermissionError
        If ``path`` is a folder, a device or a pipe, or a file that its owner may not write to.
    """
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder of path does not exist: {path.parent}")
    _check_replaceable(path)
    temporary = temporary_name(path) if temporary is None else Path(temporary)

    def remove() -> None:
        temporary.unlink(missing_ok=True)

    with undone_by(remove):
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            os.replace(temporary, path)
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            # The error of a failed write has no file name.
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            remove()


def _check_replaceable(path: Path) -> None:
    """Raise if a renamed file would take the place of a device or of a protected file."""
    if not os.path.lexists(path):
        return
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"path is a directory: {path}; choose another")
    if not stat.S_ISREG(mode):
        raise FileExistsError(f"path is no plain file: {path}; choose another")
    if not mode & stat.S_IWUSR:
        raise PermissionError(f"path is read-only: {path}; choose another, or make it writable")


def temporary_name(path: Path) -> Path:
    """A name next to ``path`` that nothing else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def make_folder(path: Path) -> None:
    """Make a folder and its parents, without a recursion whose depth is their number."""
    for folder in reversed([path, *path.parents]):
        folder.mkdir(exist_ok=True)


def require_plain(path: Path) -> None:
    """Raise if the path is that of a folder, a pipe or a device."""
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no plain file; move it away")


def read_json(path: Path) -> object:
    """The content of a JSON file that any program may have written.

    Raises
    ------
    OSError
        If it cannot be read, or is not a plain file: a pipe or a device may never end.
    ValueError
        If it is not JSON, or nested deeper than 100 levels.
    """
    require_plain(path)
    try:
        tree = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels") from None
    _check_depth(tree)
    return tree


def _check_depth(tree: object) -> None:
    level: list[object] = [tree]
    for _ in range(_DEEPEST):
        inner = [list(part.values()) if isinstance(part, dict) else part for part in level]
        level = [part for parts in inner if isinstance(parts, list) for part in parts]
    if level:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
