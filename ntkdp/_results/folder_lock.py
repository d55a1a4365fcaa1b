"""One process at a time in a folder: two would remove and mix each other's files."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep others out of an existing folder while the body runs, or until the process ends.

    Some network file systems have no locks; there, nobody is kept out.

    Raises
    ------
    BlockingIOError
        If another process, or another part of this one, is at work in the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _take(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise BlockingIOError(
                f"another ntkdp is at work in {folder}; wait until it ends, or choose another --out"
            ) from error
