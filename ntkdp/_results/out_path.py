"""The path of an output folder, checked before any work is done for it."""

import os
from pathlib import Path

#: Names next to a folder are longer than its own by fewer bytes than this.
_LONGER_NAME = 40
#: Paths in a folder are longer than its own by fewer bytes than this.
_LONGER_PATH = 200


def check_path(path: Path) -> None:
    """Raise unless a folder of this path can be made on any disk, and printed.

    Raises
    ------
    ValueError
        If it is not UTF-8, or too long.
    FileExistsError
        If the path exists and is no folder.
    """
    try:
        name = os.fsencode(path.absolute())
        name.decode("utf-8")
    except UnicodeError:
        raise ValueError(
            f"output folder {str(path)!a} is not UTF-8 text; choose another --out"
        ) from None
    if b"\0" in name:
        raise ValueError(f"output folder {str(path)!a} has a zero byte; choose another --out")
    _check_length(path, "its path", len(name), os.pathconf("/", "PC_PATH_MAX") - _LONGER_PATH)
    longest = max(map(len, name.split(b"/")))
    _check_length(path, "a name in it", longest, os.pathconf("/", "PC_NAME_MAX") - _LONGER_NAME)
    if path.name == ".." and not path.is_dir():
        raise ValueError(f"output folder {path} has no name; choose another --out")
    if os.path.lexists(path) and not path.is_dir():
        kind = "a link to no folder" if path.is_symlink() else "a file"
        raise FileExistsError(f"output folder {path} is {kind}; choose another --out")


def _check_length(path: Path, what: str, length: int, most: int) -> None:
    if length > most:
        start = ascii(str(path)[:40])
        raise ValueError(
            f"output folder {start}... is too long: {what} has {length} bytes, of at most {most}; "
            "choose another --out"
        )


def check_writable(path: Path, within: Path) -> None:
    """Raise unless the folder ``within``, which is written to for ``path``, is writable or can be
    made.

    Raises
    ------
    PermissionError, NotADirectoryError
        If it is not; the message names the folder above it that is in the way.
    """
    nearest = within.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(f"output folder {path}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"output folder {path}: {nearest} cannot be written to")
