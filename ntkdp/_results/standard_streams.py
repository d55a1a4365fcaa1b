"""Standard output and error on which no write fails, wherever they lead and whatever is written."""

import codecs
import io
import os
import sys
from typing import Any

#: What a terminal without these characters shows in their place.
_SPELLED = {"±": "+-", "≤": "<=", "≥": ">=", "×": "x", "−": "-", "…": "..."}
_HANDLER = "ntkdp.spelled"


class Stream(io.RawIOBase):
    """A file descriptor that remembers its first failed write, and takes what is written after it.

    So the work that prints goes on to its end, and what went wrong is said once.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        #: The error of the first write that failed.
        self.error: OSError | None = None

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, content: Any) -> int:
        """Write what can be written."""
        if self.error is None:
            try:
                return os.write(self._descriptor, content)
            except OSError as error:
                self.error = error
        return len(content)


def replace() -> Stream:
    """Put such streams in the place of ``sys.stdout``, which is returned, and ``sys.stderr``."""
    _open_closed()
    codecs.register_error(_HANDLER, _spell)
    output, errors = Stream(1), Stream(2)
    sys.stdout = _as_text(output, sys.stdout, line_buffering=output.isatty())
    sys.stderr = _as_text(errors, sys.stderr, line_buffering=True)
    return output


def _open_closed() -> None:
    """Let no data file get the number of a standard stream that was closed before the start."""
    # Output that nobody can get is an error, errors that nobody wants are none.
    for descriptor, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)


def _as_text(stream: Stream, former: Any, *, line_buffering: bool) -> io.TextIOWrapper:
    encoding = getattr(former, "encoding", None) or "utf-8"
    buffered: Any = io.BufferedWriter(stream)
    return io.TextIOWrapper(
        buffered, encoding=encoding, errors=_HANDLER, line_buffering=line_buffering
    )


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return spelled(error.object[error.start : error.end], "ascii"), error.end


def spelled(text: str, encoding: str) -> str:
    """The text in characters that the encoding has."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        in_ascii = "".join(_SPELLED.get(character, character) for character in text)
        return in_ascii.encode("ascii", "backslashreplace").decode()
    return text


def printable(text: object) -> str:
    """The text in one line, with control characters as backslash escapes: a terminal obeys none."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )
