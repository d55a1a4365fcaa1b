"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ntkdp._stopping import undone_by


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to, renamed to it when the body ends well.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder of path does not exist: {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def remove() -> None:
        temporary.unlink(missing_ok=True)

    with undone_by(remove):
        try:
            yield temporary
            os.replace(temporary, path)
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            # A write that failed does not say where.
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            remove()
