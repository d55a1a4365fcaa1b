"""Ctrl-C and the signals that end a process: at any moment, one line and the status shells know.

Python alone would raise ``KeyboardInterrupt`` in the main thread. That waits for compiled code, is
lost in callbacks, and crashes extension modules that are being imported; while the interpreter
shuts down, threads of XLA crash it. Here a separate thread cleans up and exits.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
#: Restores a terminal after an interrupted progress bar: clears the line and shows the cursor.
_TERMINAL_AGAIN = "\r\x1b[K\x1b[?25h"

#: Functions that return the options that continue the work, if any; the last one counts.
_continuations: list[Callable[[], str | None]] = []
#: Functions that undo unfinished work, the outermost first.
_undoing: list[Callable[[], object]] = []
#: Held during a change that must not be interrupted.
_whole = threading.Lock()
#: The longest time that a signal waits for such a change.
_SECONDS_TO_BE_WHOLE = 30.0


def begin() -> None:
    """Let these signals end the process from here on, except those that it ignores."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in _known_signals():
        # nohup, and shells in the background, ignore some on purpose.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _halt)
    # The system's own handler writes to this at once, whatever the main thread is doing.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def end() -> None:
    """Leave signals to the system again, when all work is done."""
    for number in _known_signals():
        if signal.getsignal(number) is _halt:
            signal.signal(number, signal.SIG_DFL)
    # Last, because a signal that halts this thread must reach the one that cleans up.
    signal.set_wakeup_fd(-1)


def continued_by(options: Callable[[], str | None]) -> None:
    """Set the function that returns the options to continue with, for work stopped from now on."""
    _continuations.append(options)


@contextmanager
def undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` if a signal ends the process while the body runs."""
    _undoing.append(undo)
    try:
        yield
    finally:
        _undoing.remove(undo)


@contextmanager
def as_a_whole() -> Iterator[None]:
    """Make signals wait until the body has ended."""
    with _whole:
        yield


def line(options: str | None) -> str:
    """The line that is printed when work was stopped."""
    return "ntkdp: stopped" if options is None else f"ntkdp: stopped; {options} continues"


def _known_signals() -> list[signal.Signals]:
    return [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]


def _halt(number: int, frame: FrameType | None) -> None:
    """Keep the main thread from starting anything new while the other one cleans up."""
    del number, frame
    if not _whole.locked():
        threading.Event().wait()


def _watch(reading: int) -> None:
    number = 0
    # Signals of other handlers are written here too.
    while number not in _known_signals():
        number = os.read(reading, 1)[0]
    try:
        _whole.acquire(timeout=_SECONDS_TO_BE_WHOLE)
        for undo in reversed(_undoing):
            with suppress(Exception):
                undo()
        options = _continuations[-1]() if _continuations else None
        text = (_TERMINAL_AGAIN if os.isatty(2) else "") + line(options) + "\n"
        with suppress(OSError):
            os.write(2, text.encode(errors="backslashreplace"))
    finally:
        os._exit(128 + number)
