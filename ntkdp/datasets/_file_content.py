"""What is in a file that the user names, whatever its size: a small one may unpack to terabytes."""

import gzip
import os
import zlib
from pathlib import Path

from ntkdp._backend import memory

#: Of the memory that is available, a file may take one part in so many: it is parsed and copied.
_PARTS = 4
_AT_ONCE = 2**20


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file that is there."""
    try:
        found = Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"data file {str(path)!r} does not exist: {error}") from error
    if not found.is_file():
        reason = "is a folder" if found.is_dir() else "does not exist"
        raise FileNotFoundError(f"data file {str(path)!r} {reason} (looked at {found.absolute()})")
    return found


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file, unpacked if it is gzipped.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is gzipped, and truncated or damaged.
    MemoryError
        If it takes more than a quarter of the memory that is available.
    """
    found = existing_file(path)
    require_room(path, found.stat().st_size)
    with open(found, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    if not is_packed:
        return found.read_bytes()
    try:
        # First without keeping anything.
        with gzip.open(found) as unpacked:
            size, most = 0, _most()
            while part := unpacked.read(_AT_ONCE):
                size += len(part)
                if size > most:
                    raise _too_large(path, size, most)
        return gzip.decompress(found.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is truncated or damaged: {error}") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, unpacked if it is gzipped; errors as of :func:`read_bytes`."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: {error}") from error


def require_room(path: str | os.PathLike[str], size: int) -> None:
    """Raise ``MemoryError`` unless so many bytes of a file may be read."""
    if size > (most := _most()):
        raise _too_large(path, size, most)


def _most() -> int:
    return memory.available_bytes() // _PARTS


def _too_large(path: str | os.PathLike[str], size: int, most: int) -> MemoryError:
    return MemoryError(
        f"data file {str(path)!r} takes {size:,} bytes or more once it is unpacked, and a file may "
        f"take {most:,}, a quarter of the memory that is available; use a smaller part of it"
    )
