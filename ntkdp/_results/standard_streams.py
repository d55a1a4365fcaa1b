"""Standard output and error on which no write fails, whatever they lead to or take."""

import codecs
import io
import os
import sys
from typing import Any

#: Replacements of characters that a terminal may lack.
_SPELLED = {"±": "+-", "≤": "<=", "≥": ">=", "×": "x", "−": "-", "…": "..."}
_HANDLER = "ntkdp.spelled"


class Stream(io.RawIOBase):
    """A file descriptor that remembers its first failed write, and ignores all writes after it.

    So the work that prints goes on to its end, and the error is reported once.
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
        """Write the content, or nothing after a write has failed."""
        if self.error is None:
            try:
                return os.write(self._descriptor, content)
            except OSError as error:
                self.error = error
        return len(content)


def replace() -> Stream:
    """Put such streams in the place of ``sys.stdout`` and ``sys.stderr``, and return the first."""
    _open_closed()
    codecs.register_error(_HANDLER, _spell)
    output, errors = Stream(1), Stream(2)
    sys.stdout = _as_text(output, sys.stdout, line_buffering=output.isatty())
    sys.stderr = _as_text(errors, sys.stderr, line_buffering=True)
    return output


def _open_closed() -> None:
    """Open closed standard streams, so that no data file gets their numbers."""
    # Writing to standard output must fail then, but writing to standard error need not.
    for descriptor, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)


def _as_text(stream: Stream, former: object, *, line_buffering: bool) -> io.TextIOWrapper:
    encoding = getattr(former, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(stream), encoding=encoding, errors=_HANDLER, line_buffering=line_buffering
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
    """The text in one line, with control characters as escapes that a terminal does not obey."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )
